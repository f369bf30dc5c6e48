// What the three cards that train have in common: data, masks, and runs of steps.

import { atSite, siteKey, stepKey } from "./laws/keys.js";
import { keepMask, maskBelow, scaleOf, threshold, tracedThreshold } from "./laws/mask.js";
import { normals, symmetricUniforms } from "./laws/noise.js";
import { createNetwork, predict, trainStep } from "./network.js";

export const WIDTH = 64;
export const SITES = ["hidden1", "hidden2"];
export const truth = (x) => Math.sin(3.2 * x) + 0.3 * x;

/** Noisy points of the curve; `gap` leaves the middle out. */
export function makeData(root, count, { gap = 0, noise = 0.1, site = "data" } = {}) {
  const places = symmetricUniforms(atSite(root, [site, "x"]), [count]);
  const x = places.map((u) => (gap > 0 ? Math.sign(u) * (gap + (1 - gap) * Math.abs(u)) : u));
  const y = normals(atSite(root, [site, "y"]), [count]).map((z, i) => truth(x[i]) + noise * z);
  return { x, y };
}

export function newNetwork(root) {
  return createNetwork(atSite(root, "init"), [1, WIDTH, WIDTH, 1]);
}

/** What training multiplies with at a step: a mask for every example and hidden layer. */
export function factorsAt(
  root,
  step,
  rate,
  count,
  { scaled = true, sameKey = false, traced = false } = {},
) {
  const limit = traced ? tracedThreshold(rate) : threshold(rate);
  if (limit.threshold === 2 ** (16 * limit.digits)) return [null, null];
  const scale = scaled ? scaleOf(limit) : 1;
  return SITES.map((site) => {
    const key = siteKey(root, { step: sameKey ? 0 : step, site });
    return scaledMask(maskBelow(key, limit, [count, WIDTH]), scale);
  });
}

/** The factors of a sample of Monte Carlo dropout: a mask of the units, which all inputs share. */
export function sampleFactors(root, step, rate, sample) {
  const scale = scaleOf(threshold(rate));
  const key = stepKey(root, { step });
  return SITES.map((site) => {
    const mask = keepMask(atSite(key, ["sample", sample, site]), rate, [WIDTH]);
    return scaledMask(mask, scale);
  });
}

function scaledMask(mask, scale) {
  const factors = new Float64Array(mask.length);
  for (let i = 0; i < mask.length; i++) factors[i] = mask[i] * scale;
  return factors;
}

/** The mean of many samples on a grid, and their standard deviation. */
export function monteCarlo(network, root, rate, grid, samples) {
  const outputs = Array.from({ length: samples }, (_, sample) =>
    predict(network, grid, grid.length, sampleFactors(root, network.steps, rate, sample)),
  );
  const mean = grid.map((_, i) => outputs.reduce((sum, output) => sum + output[i], 0) / samples);
  const spread = grid.map((_, i) => {
    const squares = outputs.reduce((sum, output) => sum + (output[i] - mean[i]) ** 2, 0);
    return Math.sqrt(squares / Math.max(1, samples - 1));
  });
  return { mean, spread, outputs };
}

export function meanSquaredError(network, { x, y }, factors = []) {
  const outputs = predict(network, x, x.length, factors);
  return outputs.reduce((sum, output, i) => sum + (output - y[i]) ** 2, 0) / x.length;
}

export function gridFrom(low, high, count) {
  return Float64Array.from({ length: count }, (_, i) => low + ((high - low) * i) / (count - 1));
}

/** A step of training at a rate, with the masks of the network's own count of steps. */
export function train(network, root, data, rate, learningRate, options) {
  const factors = factorsAt(root, network.steps, rate, data.x.length, options);
  return trainStep(network, data.x, data.y, factors, learningRate);
}
