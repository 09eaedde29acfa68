// Sliders that move a latent along the generator's directions, as catinfer --direction. In the page's address a slider
// that is not at 0 is d1=2.5: the number of the direction, from 1 on, and a number of standard deviations.

const MAX = 3;
const STEP = 0.1;

/** Adds a slider for each direction to `container`; `changed(moves)` is called with the moves of all of them. */
export function addSliders(container, directions, changed) {
  directions.forEach((_, i) => {
    const label = document.createElement("label");
    label.className = "field";
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: -MAX, max: MAX, step: STEP, value: 0, name: `d${i + 1}` });
    label.append(`Direction ${i + 1} `, input, document.createElement("output"));
    input.addEventListener("input", () => changed(movesOf(container)));
    container.append(label);
  });
}

function movesOf(container) {
  const inputs = [...container.querySelectorAll("input")];
  return Object.fromEntries(inputs.filter((input) => Number(input.value)).map((input) => [input.name, input.value]));
}

/** Sets the sliders to `moves`. */
export function showMoves(container, moves) {
  for (const input of container.querySelectorAll("input")) {
    input.value = moves[input.name] ?? 0;
    input.nextSibling.value = Number(input.value).toFixed(1);
  }
}

/** The moves in an address, { d1: "2.5" }; what is not one of them is left out. */
export function readMoves(parameters, directions) {
  const names = directions.map((_, i) => `d${i + 1}`);
  const isMove = (text) => /^-?\d(\.\d)?$/.test(text) && Math.abs(text) <= MAX && Number(text) !== 0;
  return Object.fromEntries(names.map((name) => [name, parameters.get(name)]).filter(([, text]) => isMove(text)));
}

/** The sum of the directions, unit vectors, each times its number of standard deviations; [] if no slider is moved. */
export function movement(moves, directions) {
  const used = directions.map((vector, i) => [Number(moves[`d${i + 1}`] ?? 0), vector]).filter(([amount]) => amount);
  if (!used.length) return [];
  return used[0][1].map((_, j) => used.reduce((sum, [amount, vector]) => sum + amount * vector[j], 0));
}
