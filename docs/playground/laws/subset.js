// The subset law, version 1: see docs/law.md.

import { asFraction, roundedQuotient } from "./exact.js";
import { uniformNumbers } from "./mask.js";

/** How many elements of a group are kept. */
export function keptCount(groupSize, rate) {
  const [dropped, bits] = asFraction(rate);
  const one = 1n << bits;
  const millionths = roundedQuotient(BigInt(groupSize) * (one - dropped) * 1000000n, one);
  return Math.max(1, Number(roundedQuotient(millionths, 1000000n)));
}

/** The indices of random subsets of exact size: an array of them for every index of `shape`. */
export function keepIndices(key, rate, size, { groups = 1, shape = [], ...place } = {}) {
  const groupSize = size / groups;
  const count = keptCount(groupSize, rate);
  const { data } = uniformNumbers(key, 2, [...shape, size], place);
  const subsets = [];
  for (let offset = 0; offset < data.length; offset += size) {
    const kept = [];
    for (let group = 0; group < size; group += groupSize) {
      const smallest = smallestOf(data.subarray(offset + group, offset + group + groupSize), count);
      kept.push(...smallest.sort((a, b) => a - b).map((i) => group + i));
    }
    subsets.push(kept);
  }
  return nested(subsets, shape);
}

/** The indices of the `count` smallest numbers, smallest first; of equal ones the first. */
export function smallestOf(numbers, count) {
  const order = Array.from(numbers, (_, i) => i);
  return order.sort((a, b) => numbers[a] - numbers[b] || a - b).slice(0, count);
}

function nested(items, shape) {
  for (const size of shape.slice(1).reverse()) {
    items = Array.from({ length: items.length / size }, (_, i) =>
      items.slice(i * size, (i + 1) * size),
    );
  }
  return shape.length ? items : items[0];
}
