// The latents of NumPy's Generator(PCG64(seed)).standard_normal(dtype=float32), bit for bit, so that a seed gives the
// same cat here and in catinfer.

const MASK32 = 0xffffffffn;
const MASK64 = (1n << 64n) - 1n;
const MASK128 = (1n << 128n) - 1n;

/** Four 64-bit words from a seed >= 0 (O'Neill, "Developing a seed_seq Alternative", 2015; NumPy's SeedSequence). */
export function seedWords(seed) {
  const entropy = [];
  for (let rest = BigInt(seed); rest > 0n || entropy.length === 0; rest >>= 32n) entropy.push(Number(rest & MASK32));
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const value = (Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715)) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const pool = [0, 1, 2, 3].map((i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++)
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  for (const word of entropy.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(word));

  constant = 0x8b51f9dd;
  const halves = Array.from({ length: 8 }, (_, i) => {
    let value = pool[i % 4] ^ constant;
    constant = Math.imul(constant, 0x58f38ded);
    value = Math.imul(value, constant);
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => halves[i] | (halves[i + 1] << 32n));
}

/** A function that returns the next 32 random bits of PCG64 (XSL-RR 128/64; O'Neill, "PCG", 2014). */
export function pcg64(seed) {
  const multiplier = 0x2360ed051fc65da44385df649fccf645n;
  const [high, low, streamHigh, streamLow] = seedWords(seed);
  const increment = ((((streamHigh << 64n) | streamLow) << 1n) | 1n) & MASK128;
  const step = (state) => (state * multiplier + increment) & MASK128;
  let state = step(increment + ((high << 64n) | low));
  let kept = null; // the lower half of a 64-bit word is used before the upper half
  return () => {
    if (kept !== null) {
      const half = kept;
      kept = null;
      return half;
    }
    state = step(state);
    const folded = (state >> 64n) ^ (state & MASK64);
    const turn = state >> 122n;
    const word = ((folded >> turn) | (folded << (64n - turn))) & MASK64;
    kept = Number(word >> 32n);
    return Number(word & MASK32);
  };
}

// Marsaglia and Tsang, "The Ziggurat Method for Generating Random Variables", 2000: 256 layers of equal area AREA
// under exp(-x^2 / 2). The lowest one starts the tail at TAIL. x = width * 23 random bits.
const TAIL = 3.6541528853610088;
const AREA = 0.004928673233974658;
const { width, inside, height } = layers();

function layers() {
  const density = (x) => Math.exp(-0.5 * x * x);
  const scale = 2 ** 23;
  const width = new Float32Array(256);
  const inside = new Uint32Array(256);
  const height = new Float32Array(256);
  let x = TAIL;
  const base = AREA / density(x);
  width[0] = base / scale;
  inside[0] = (x / base) * scale;
  height[0] = 1;
  for (let i = 255; i > 0; i--) {
    width[i] = x / scale;
    height[i] = density(x);
    const next = i > 1 ? Math.sqrt(-2 * Math.log(AREA / x + density(x))) : 0;
    inside[i] = (next / x) * scale;
    x = next;
  }
  return { width, inside, height };
}

/** Standard normal latents, a Float32Array of `length`, of an integer seed >= 0. */
export function latent(seed, length) {
  const next32 = pcg64(seed);
  const uniform = () => (next32() >>> 8) / 2 ** 24;
  return Float32Array.from({ length }, () => normal(next32, uniform));
}

function normal(next32, uniform) {
  const f = Math.fround;
  for (;;) {
    const bits = next32();
    const layer = bits & 0xff;
    const magnitude = bits >>> 9;
    const x = f(magnitude * width[layer]) * (bits & 0x100 ? -1 : 1);
    if (magnitude < inside[layer]) return x;
    if (layer === 0) {
      for (;;) {
        const beyond = f(-f(1 / TAIL) * f(Math.log1p(-uniform())));
        const drop = f(-Math.log1p(-uniform()));
        if (f(drop + drop) > f(beyond * beyond)) return f(f(TAIL) + beyond) * ((magnitude >>> 8) & 1 ? -1 : 1);
      }
    }
    const gap = f(height[layer - 1] - height[layer]);
    if (f(f(gap * uniform()) + height[layer]) < Math.exp(-0.5 * x * x)) return x;
  }
}

/** The point at `t` in [0, 1] on the great circle from `a` to `b`; on the straight line if they are parallel. */
export function slerp(a, b, t) {
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const cosine = dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
  const sine = Math.sin(angle);
  const [left, right] = sine < 1e-4 ? [1 - t, t] : [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  return a.map((value, i) => left * value + right * b[i]);
}
