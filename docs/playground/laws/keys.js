// The key law, version 1: see docs/keys.md. A key is an array of its words.

import { sha256Words } from "./sha256.js";
import { threefry2x32 } from "./threefry.js";

export const MASK_TAG = 0x6a64726f;
const INDEX_TAG = 0x6a646978;
const WORDS_TAG = 0x6a647764;
const RESERVED = [0, MASK_TAG, INDEX_TAG, WORDS_TAG];

/** The words of `jax.random.key(seed)`, for a seed of 32 bits. */
export function seedKey(seed) {
  return [0, seed];
}

/** The key of a site in a microbatch of a step. Steps of more than 53 bits are BigInts. */
export function siteKey(root, { step, site, microbatch = 0 }) {
  return atSite(stepKey(root, { step, microbatch }), site);
}

export function stepKey(root, { step, microbatch = 0 }) {
  const wide = BigInt(step);
  const high = Number(0x80000000n | (wide >> 32n));
  return childKey(childKey(root, [high, Number(wide & 0xffffffffn)]), [INDEX_TAG, microbatch]);
}

/** The key at a path below a key: strings are names, numbers are indices. */
export function atSite(key, site) {
  for (const part of Array.isArray(site) ? site : [site]) {
    key = childKey(key, typeof part === "string" ? nameCounter(part) : [INDEX_TAG, part]);
  }
  return key;
}

/** `jax.random.fold_in(key, number)`, for a key of two words. */
export function foldIn(key, number) {
  return threefry2x32(key, [0, number]);
}

export function childKey(key, counter) {
  const state = threefry2x32(absorbed(key), counter);
  const words = [...state];
  for (let number = 1; 2 * number < key.length; number++) {
    words.push(...threefry2x32(state, [WORDS_TAG, number]));
  }
  return words.slice(0, key.length);
}

const counters = new Map(); // a training step asks for the same few names

function nameCounter(name) {
  if (!counters.has(name)) {
    const words = sha256Words(name);
    let first = 0;
    while (RESERVED.includes(words[first])) first += 2;
    counters.set(name, [words[first], words[first + 1]]);
  }
  return counters.get(name);
}

/** A key's words, absorbed into two: step 6 of the mask law. */
export function absorbed(key) {
  if (key.length === 2) return key;
  let state = [MASK_TAG, key.length];
  for (let i = 0; i < key.length; i += 2) state = threefry2x32(state, [key[i], key[i + 1] ?? 0]);
  return state;
}
