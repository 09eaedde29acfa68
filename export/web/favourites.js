// A star on each cat of the grid marks it as a favourite, and a field has the command that generates all favourites. They
// are in the page's address (favourites=3,7-9), which app.js rewrites with each change: they are then added again.

const grid = document.getElementById("grid");
const menu = document.getElementById("class"); // empty if the generator has no classes
const psi = document.getElementById("psi");
const [field, copy, clear, status] = ["command", "copy-command", "clear", "favourites-status"].map((id) =>
  document.getElementById(id));
const MAX_SEED = 2 ** 32 - 1; // as in catinfer
const stars = document.createElement("div");
stars.className = "stars";
const frame = document.createElement("div");
frame.className = "stars-frame";
grid.replaceWith(frame);
frame.append(grid, stars);
let seeds = readAddress(location.hash);

function readAddress(hash) {
  const given = new URLSearchParams(hash.slice(1)).get("favourites") ?? "";
  const found = new Set();
  for (const part of given.match(/\d{1,15}(-\d{1,15})?/g) ?? []) {
    const [first, last = first] = part.split("-").map(Number);
    for (let seed = first; seed <= Math.min(last, MAX_SEED) && found.size < 1000; seed += 1) found.add(seed);
  }
  return found;
}

// [3, 7, 8, 9] -> "3,7-9", as --seeds takes them.
function ranges() {
  const found = [];
  for (const seed of [...seeds].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last && seed === last[1] + 1) last[1] = seed;
    else found.push([seed, seed]);
  }
  return found.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join();
}

function show() {
  const tiles = [...grid.querySelectorAll("button")];
  while (stars.childElementCount < tiles.length) stars.append(makeStar());
  tiles.forEach((tile, i) => {
    const star = stars.children[i];
    star.dataset.seed = tile.dataset.seed;
    star.title = `Seed ${tile.dataset.seed}`;
    star.setAttribute("aria-label", `Favourite cat ${tile.dataset.seed}`);
    star.setAttribute("aria-pressed", seeds.has(Number(tile.dataset.seed)));
  });
  const variety = psi.value === "1" ? "" : ` --psi ${psi.value}`;
  const option = menu.value ? ` ${quoted(`--class=${menu.value}`)}` : "";
  field.value = seeds.size ? `catinfer --onnx gen.onnx --seeds ${ranges()}${variety}${option}` : "";
  field.closest("section").hidden = !seeds.size;
  status.textContent = `${seeds.size} marked.`;
  const address = new URLSearchParams(location.hash.slice(1));
  if ((address.get("favourites") ?? "") === ranges()) return;
  if (seeds.size) address.set("favourites", ranges());
  else address.delete("favourites");
  history.replaceState(null, "", `#${address.toString().replaceAll("%2C", ",")}`);
}

// A word for a shell, as Python's shlex.quote.
function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
}

function makeStar() {
  const star = document.createElement("button");
  star.type = "button";
  star.textContent = "★";
  star.addEventListener("click", () => {
    const seed = Number(star.dataset.seed);
    if (!seeds.delete(seed)) seeds.add(seed);
    show();
  });
  return star;
}

copy.addEventListener("click", async () => {
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    status.textContent = "Command copied.";
  } catch {
    status.textContent = "The browser does not allow copying; the command is selected, copy it with the keyboard.";
  }
});
clear.addEventListener("click", () => {
  seeds.clear();
  show();
  stars.firstChild.focus();
});
addEventListener("hashchange", ({ newURL }) => {
  seeds = readAddress(new URL(newURL).hash);
  show();
});
// app.js sets the seeds of the tiles with each change of the page's state.
new MutationObserver(show).observe(grid, { childList: true, subtree: true, attributeFilter: ["data-seed"] });
