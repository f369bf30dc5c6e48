// The strata law, version 1: see docs/law.md. It couples the masks of several samples.

import { broadcast, numbersOf, threshold, uniformNumbers } from "./mask.js";

const ORDER = 2; // in place of the number of a digit

/** The mask of a sample among `size` of them, all of which have the same key. */
export function sampleMask(key, rate, shape, sample, size, { precision = null, ...place } = {}) {
  const limit = threshold(rate, precision);
  const numbers = uniformNumbers(key, limit.digits, shape, place);
  const order = numbersOf(key, [ORDER], shape, place);
  const unit = 65536 ** (limit.digits - 1); // of the first digit
  const prime = primeAbove(size);
  const kept = new Uint8Array(numbers.data.length);
  for (let i = 0; i < kept.length; i++) {
    const factor = 1 + Math.floor((order.data[i] * (prime - 1)) / 65536);
    const shift = Math.floor((65536 * stratum(factor, sample, size, prime)) / size);
    const number = (numbers.data[i] + shift * unit) % (65536 * unit);
    kept[i] = number < limit.threshold ? 1 : 0;
  }
  return broadcast(kept, numbers.shape, shape);
}

/** The rank of a sample's multiple of the factor among those of all samples. */
function stratum(factor, sample, size, prime) {
  const own = (factor * (sample + 1)) % prime;
  let rank = 0;
  for (let other = 1; other <= size; other++) if ((factor * other) % prime < own) rank += 1;
  return rank;
}

function primeAbove(number) {
  for (let prime = number + 1; ; prime++) {
    let divisible = false;
    for (let d = 2; d * d <= prime; d++) divisible = divisible || prime % d === 0;
    if (!divisible) return prime;
  }
}
