// Runs the ONNX generator on one thread. That needs neither cross-origin isolation, so any static host works, nor a
// worker, which the page's content security policy does not allow.

import * as ort from "./ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;

/**
 * Open gen.onnx: { size, zDim, directions, classes, origin, generate }, where generate(z, psi, canvas, move, label) shows
 * the image of a latent on a canvas, and origin is what downloads say about their generator. As in catinfer, psi in
 * [0, 1] is the graph's input if it has one, else it scales the latent, and move is added to the latent after that. The
 * label is an index into classes, not used if there are none.
 */
export async function openGenerator() {
  const { size, z_dim: zDim, directions = [], classes = [], ...origin } = await (await load("gen.json")).json();
  const model = new Uint8Array(await (await load("gen.onnx")).arrayBuffer());
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });

  const hasPsi = session.inputNames.includes("psi");

  async function generate(z, psi, canvas, move = [], label = 0) {
    const scale = hasPsi ? 1 : Math.fround(psi);
    const point = z.map((value, i) => value * scale + (move[i] ?? 0));
    const inputs = { z: new ort.Tensor("float32", point, [1, zDim]) };
    if (classes.length) inputs.label = new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]);
    if (hasPsi) inputs.psi = new ort.Tensor("float32", [psi], []);
    const { image } = await session.run(inputs);
    canvas.width = canvas.height = size;
    canvas.getContext("2d").putImageData(new ImageData(toPixels(image.data, size), size), 0, 0);
  }
  return { size, zDim, directions, classes, origin, generate };
}

async function load(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} did not load (${response.status})`);
  return response;
}

/** RGBA bytes of float planes [3, size, size] in [-1, 1]. */
function toPixels(planes, size) {
  const area = size * size;
  const pixels = new Uint8ClampedArray(4 * area).fill(255); // rounds half to even, like NumPy's rint
  for (let i = 0; i < area; i++)
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = (planes[c * area + i] + 1) * 127.5;
  return pixels;
}
