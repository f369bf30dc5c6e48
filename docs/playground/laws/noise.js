// Noise from the uniform numbers of the mask law, equal to the library's up to rounding.

import { broadcast, uniformNumbers } from "./mask.js";

/** A value for each uniform number: `inverse` of it, taken of the half with less probability. */
function quantiles(inverse, key, shape, place = {}) {
  const drawn = uniformNumbers(key, 2, shape, place);
  const values = Float64Array.from(drawn.data, (bits) => {
    const upper = bits >= 2 ** 31;
    const value = inverse(((upper ? 2 ** 32 - 1 - bits : bits) + 0.5) / 2 ** 32);
    return upper ? -value : value;
  });
  return broadcast(values, drawn.shape, shape);
}

export function normals(key, shape, place) {
  return quantiles(normalQuantile, key, shape, place);
}

/** Uniform between -1 and 1. */
export function symmetricUniforms(key, shape, place) {
  return quantiles((u) => 2 * u - 1, key, shape, place);
}

export function logistics(key, shape, place) {
  return quantiles((u) => Math.log(u) - Math.log1p(-u), key, shape, place);
}

const polynomial = (coefficients, x) => coefficients.reduceRight((sum, c) => sum * x + c, 0);

// M. J. Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (1988).
const A = [
  3.387132872796366608, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
  45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727,
];
const B = [
  1, 42.313330701600911252, 687.1870074920579083, 5394.1960214247511077, 21213.794301586595867,
  39307.89580009271061, 28729.085735721942674, 5226.495278852545925,
];
const C = [
  1.42343711074968357734, 4.6303378461565452959, 5.7694972214606914055, 3.64784832476320460504,
  1.27045825245236838258, 0.24178072517745061177, 0.0227238449892691845833,
  7.7454501427834140764e-4,
];
const D = [
  1, 2.05319162663775882187, 1.6763848301838038494, 0.68976733498510000455, 0.14810397642748007459,
  0.0151986665636164571966, 5.475938084995344946e-4, 1.05075007164441684324e-9,
];
const E = [
  6.6579046435011037772, 5.4637849111641143699, 1.7848265399172913358, 0.29656057182850489123,
  0.026532189526576123093, 0.0012426609473880784386, 2.71155556874348757815e-5,
  2.01033439929228813265e-7,
];
const F = [
  1, 0.59983220655588793769, 0.13692988092273580531, 0.0148753612908506148525,
  7.868691311456132591e-4, 1.8463183175100546818e-5, 1.4215117583164458887e-7,
  2.04426310338993978564e-15,
];

/** The inverse normal distribution function, of a probability up to 1/2. */
function normalQuantile(p) {
  const centred = p - 0.5;
  if (centred > -0.425) {
    const r = 0.180625 - centred * centred;
    return (centred * polynomial(A, r)) / polynomial(B, r);
  }
  const r = Math.sqrt(-Math.log(p));
  if (r <= 5) return -polynomial(C, r - 1.6) / polynomial(D, r - 1.6);
  return -polynomial(E, r - 5) / polynomial(F, r - 5);
}

/** `jax.random.uniform(key, shape, minval=low)`: JAX's own numbers, not the library's. */
export function jaxUniforms(key, size, low, threefry2x32) {
  return Float64Array.from({ length: size }, (_, i) => {
    const [a, b] = threefry2x32(key, [0, i]);
    const unit = Math.fround(((a ^ b) >>> 9) / 2 ** 23);
    return Math.max(low, Math.fround(Math.fround(unit * Math.fround(1 - low)) + low));
  });
}
