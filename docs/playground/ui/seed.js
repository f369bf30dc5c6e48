// The seed of the whole page: every card's masks come from its key.

import { seedKey } from "../laws/keys.js";

const listeners = [];
let seed = 37; // that of the gallery in the documentation

export const currentSeed = () => seed;
export const root = () => seedKey(seed);

export function setSeed(next) {
  seed = Number(next);
  listeners.forEach((listener) => listener());
}

export function onSeed(listener) {
  listeners.push(listener);
}
