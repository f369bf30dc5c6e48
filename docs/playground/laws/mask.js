// The mask law, version 1: see docs/law.md.

import { asFraction, roundedQuotient } from "./exact.js";
import { MASK_TAG, absorbed } from "./keys.js";
import { threefry2x32, threefryInto } from "./threefry.js";

const LANES = 4;

/** The key under which the blocks of a digit are hashed. */
export function maskKey(key, digit) {
  return threefry2x32(absorbed(key), [MASK_TAG, (1 << 16) | digit]);
}

/** {threshold, digits}: the integer that numbers are compared with, and their digits of 16 bits. */
export function threshold(rate, precision = null) {
  const [dropped, bits] = asFraction(rate);
  const one = 1n << bits;
  const kept = one - dropped;
  const short = roundedQuotient(kept << 16n, one);
  const miss = (short << bits) - (kept << 16n);
  const near = (miss < 0n ? -miss : miss) * 1000n <= dropped << 16n;
  if (precision === 16 || (precision === null && near))
    return { threshold: Number(short), digits: 1 };
  return { threshold: Number(roundedQuotient(kept << 32n, one)), digits: 2 };
}

/** The threshold of a traced rate, as that of a schedule: rounded to float32, then to 16 bits. */
export function tracedThreshold(rate) {
  const [dropped, bits] = asFraction(Math.fround(rate));
  return { threshold: 65536 - Number(roundedQuotient(dropped << 16n, 1n << bits)), digits: 1 };
}

/** The probability with which a threshold keeps. */
export function keepProbability({ threshold, digits }) {
  return threshold / 2 ** (16 * digits);
}

export function effectiveRate(rate, precision = null) {
  return 1 - keepProbability(threshold(rate, precision));
}

/** What `dropout` multiplies kept values with. */
export function scaleOf(limit) {
  return limit.threshold > 0 ? 1 / keepProbability(limit) : 1;
}

/** The mask that `dropout` applies, in row-major order: 1 where an element is kept. */
export function keepMask(key, rate, shape, { precision = null, ...place } = {}) {
  return maskBelow(key, threshold(rate, precision), shape, place);
}

export function maskBelow(key, limit, shape, place = {}) {
  const numbers = uniformNumbers(key, limit.digits, shape, place);
  const kept = new Uint8Array(numbers.data.length);
  for (let i = 0; i < kept.length; i++) kept[i] = numbers.data[i] < limit.threshold ? 1 : 0;
  return broadcast(kept, numbers.shape, shape);
}

/**
 * The uniform numbers that a mask compares, of one digit of 16 bits or of two: {data, shape}, where
 * the axes in broadcastDims have size 1. With `start`, those of a part of an array of globalShape.
 */
export function uniformNumbers(key, digits, shape, place = {}) {
  return numbersOf(
    key,
    Array.from({ length: digits }, (_, digit) => digit),
    shape,
    place,
  );
}

/** Numbers whose digits are those under the mask keys of the given numbers. */
export function numbersOf(key, digits, shape, place = {}) {
  const { broadcastDims = [], start = null, globalShape = null } = place;
  const whole = [...(globalShape ?? shape)];
  for (const axis of broadcastDims) whole[axis < 0 ? axis + whole.length : axis] = 1;
  const axes = whole.flatMap((size, axis) => (size === 1 ? [] : [axis]));
  const sizes = axes.map((axis) => whole[axis]);
  const counts = axes.map((axis) => shape[axis]);
  const first = axes.map((axis) => start?.[axis] ?? 0);
  while (sizes.length < 2) {
    sizes.push(1);
    counts.push(1);
    first.push(0);
  }
  const blockSizes = sizes.map((size, i) =>
    i === sizes.length - 2 ? Math.ceil(size / LANES) : size,
  );
  const total = blockSizes.reduce((product, size) => product * BigInt(size), 1n);
  const number = total > 2n ** 53n ? BigInt : Number; // BigInts are slow, and rarely needed
  const leads = sizes.length - 2;
  const columns = counts[leads + 1];
  const keys = digits.map((digit) => maskKey(key, digit));
  const data = new Uint32Array(counts.reduce((product, count) => product * count, 1));
  const words = keys.map(() => new Uint32Array(2 * columns)); // of the blocks that a row meets
  const word = [0, 0];
  const index = new Array(leads + 1).fill(0);
  let hashed = null;
  for (let offset = 0; offset < data.length; offset += columns) {
    // Of a row: the index of its first block, and its lane.
    let block = number(0);
    for (let axis = 0; axis < leads; axis++) {
      block = block * number(sizes[axis]) + number(first[axis] + index[axis]);
    }
    const row = first[leads] + index[leads];
    const lane = row % LANES;
    block = block * number(blockSizes[leads]) + number(Math.floor(row / LANES));
    block = block * number(sizes[leads + 1]) + number(first[leads + 1]);
    for (let column = 0; column < columns && block !== hashed; column++) {
      const b = block + number(column);
      const high = number === Number ? Math.floor(b / 2 ** 32) : Number(b >> 32n);
      const low = number === Number ? b >>> 0 : Number(b & 0xffffffffn);
      keys.forEach((key, digit) => {
        threefryInto(word, key[0], key[1], high, low);
        words[digit].set(word, 2 * column);
      });
    }
    hashed = block;
    for (let column = 0; column < columns; column++) {
      let value = 0;
      for (let digit = 0; digit < keys.length; digit++) {
        const half = words[digit][2 * column + (lane >> 1)];
        value = value * 65536 + (lane & 1 ? half >>> 16 : half & 0xffff);
      }
      data[offset + column] = value;
    }
    for (let axis = leads; axis >= 0 && ++index[axis] === counts[axis]; axis--) index[axis] = 0;
  }
  return { data, shape: shape.map((count, axis) => (whole[axis] === 1 ? 1 : count)) };
}

/** Repeats values along the axes where `from` has size 1. */
export function broadcast(values, from, to) {
  if (from.every((size, axis) => size === to[axis])) return values;
  const size = to.reduce((product, count) => product * count, 1);
  const result = new values.constructor(size);
  for (let i = 0; i < size; i++) {
    let rest = i;
    let source = 0;
    let stride = 1;
    for (let axis = to.length - 1; axis >= 0; axis--) {
      if (from[axis] !== 1) source += (rest % to[axis]) * stride;
      stride *= from[axis];
      rest = Math.floor(rest / to[axis]);
    }
    result[i] = values[source];
  }
  return result;
}

/** The bits of a mask in hexadecimal digits, the first element in the highest bit. */
export function maskHex(mask) {
  let text = "";
  for (let i = 0; i < mask.length; i += 8) {
    let byte = 0;
    for (let bit = 0; bit < 8; bit++) byte = byte * 2 + (mask[i + bit] ? 1 : 0);
    text += byte.toString(16).padStart(2, "0");
  }
  return text;
}
