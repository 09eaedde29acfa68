// The page's state is in its address: #seed=0&left=3&right=7&mix=50&psi=1. Every change updates it, so that a link
// shows the same cats.

import { addClasses, readClass } from "./classes.js";
import { addSliders, movement, readMoves, showMoves } from "./directions.js";
import { openGenerator } from "./generator.js";
import { packetOf, withPacket } from "./provenance.js";
import { latent, slerp } from "./random.js";

const CATS = 16;
const MAX_SEED = 2 ** 32 - 1; // as in catinfer
const MAX_FIRST = MAX_SEED + 1 - CATS; // of the grid, whose other seeds follow it
const element = (id) => document.getElementById(id);
const [grid, status, blend] = [element("grid"), element("status"), element("blend")];
const tiles = Array.from({ length: CATS }, makeTile);
let generator;
let state;
let gridRound = 0; // a new grid cancels the previous one
let blendRound = 0;
let blended; // what the blend's canvas shows

function makeTile() {
  const button = document.createElement("button");
  button.type = "button";
  button.disabled = true;
  button.append(document.createElement("canvas"));
  button.addEventListener("click", () => change({ left: state.right, right: Number(button.dataset.seed), mix: 100 }));
  grid.append(button);
  return button;
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name, fallback, max) => {
    const text = given.get(name) ?? "";
    return /^\d{1,15}(\.\d{1,2})?$/.test(text) && Number(text) <= max ? Number(text) : fallback;
  };
  const seed = (name, fallback) => Math.floor(number(name, fallback, MAX_SEED));
  const first = Math.min(seed("seed", randomSeed()), MAX_FIRST);
  return {
    seed: first,
    left: seed("left", first),
    right: seed("right", first + 1),
    mix: Math.round(number("mix", given.has("left") ? 50 : 0, 100)),
    psi: number("psi", 1, 1),
    ...readClass(given, generator.classes),
    moves: readMoves(given, generator.directions),
  };
}

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
}

function change(changes) {
  show({ ...state, ...changes });
}

function show(next) {
  const before = state;
  state = next;
  const { moves, ...others } = next;
  history.replaceState(null, "", `#${new URLSearchParams({ ...others, ...moves })}`);
  showMoves(element("sliders"), moves);
  element("seed").value = next.seed;
  element("psi").value = next.psi;
  element("class").value = next.class ?? "";
  element("psi-value").value = next.psi.toFixed(2);
  element("mix").value = next.mix;
  element("mix").setAttribute("aria-valuetext", `${next.mix}% of cat ${next.right}`);
  element("left-name").textContent = `Cat ${next.left}`;
  element("right-name").textContent = `Cat ${next.right}`;
  tiles.forEach((tile, i) => {
    tile.dataset.seed = next.seed + i;
    tile.setAttribute("aria-label", `Cat ${next.seed + i}`);
    tile.setAttribute("aria-pressed", [next.left, next.right].includes(next.seed + i));
  });
  if (["seed", "psi", "class"].some((name) => before?.[name] !== next[name])) generateGrid().catch(fail);
  generateBlend().catch(fail);
}

// Generating an image blocks the page; this lets it handle input before the next one.
const handleInput = () => new Promise((resolve) => setTimeout(resolve));

async function generateGrid() {
  const round = ++gridRound;
  status.textContent = "Generating…";
  let spent = 0;
  for (const [i, tile] of tiles.entries()) {
    await handleInput();
    if (round !== gridRound) return;
    spent += await timed(() => generate(latent(state.seed + i, generator.zDim), state, tile.firstChild));
    tile.disabled = false;
  }
  if (round === gridRound) status.textContent = `${CATS} cats generated, ${milliseconds(spent / CATS)} each.`;
}

async function generateBlend() {
  const round = ++blendRound;
  await handleInput();
  if (round !== blendRound) return;
  const shown = state;
  const { left, right, mix, moves } = shown;
  const [a, b] = [left, right].map((seed) => latent(seed, generator.zDim));
  const move = movement(moves, generator.directions);
  const spent = await timed(() => generate(slerp(a, b, mix / 100), shown, blend, move));
  blended = shown;
  const along = Object.keys(moves).length ? ", moved along directions" : "";
  const kind = shown.class === undefined ? "" : ` of the class ${shown.class}`;
  blend.setAttribute("aria-label", `A cat${kind}, ${100 - mix}% cat ${left} and ${mix}% cat ${right}${along}`);
  element("blend-time").textContent = `Generated in ${milliseconds(spent)}.`;
}

// onnxruntime generates one image at a time.
let last = Promise.resolve();
function generate(z, { psi, class: name }, canvas, move) {
  last = last.then(() => generator.generate(z, psi, canvas, move, generator.classes.indexOf(name)));
  return last;
}

async function timed(work) {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

function milliseconds(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function fail(error) {
  status.textContent = `The cats could not be generated: ${error.message}. Reload the page to try again.`;
  console.error(error);
}

function save() {
  if (!blended) return;
  const { left, right, mix } = blended;
  const packet = packetOf({ ...generator.origin, ...blended });
  blend.toBlob(async (png) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await withPacket(png, packet));
    link.download = `cat-${left}-${right}-${mix}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

async function share() {
  try {
    await navigator.clipboard.writeText(location.href);
    status.textContent = "Link copied.";
  } catch {
    status.textContent = "The browser does not allow copying; take the link from the address bar.";
  }
}

function listen() {
  const newGrid = (seed) => change({ seed, left: seed, right: seed + 1, mix: 0 });
  element("new").addEventListener("click", () => newGrid(randomSeed()));
  element("seed").addEventListener("change", ({ target }) => {
    target.setCustomValidity(Number(target.value) > MAX_FIRST ? `Give at most ${MAX_FIRST}.` : "");
    if (target.reportValidity()) newGrid(Number(target.value));
  });
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  element("psi").addEventListener("input", ({ target }) => change({ psi: Number(target.value) }));
  element("mix").addEventListener("input", ({ target }) => change({ mix: Number(target.value) }));
  addClasses(element("class-field"), generator.classes, (name) => change({ class: name }));
  element("directions").hidden = generator.directions.length === 0;
  addSliders(element("sliders"), generator.directions, (moves) => change({ moves }));
  element("reset").addEventListener("click", () => change({ moves: {} }));
  element("save").addEventListener("click", save);
  element("share").addEventListener("click", share);
  addEventListener("hashchange", () => show(readAddress()));
}

try {
  generator = await openGenerator();
  listen();
  show(readAddress());
} catch (error) {
  fail(error);
}
