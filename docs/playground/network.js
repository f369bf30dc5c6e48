// A small network that the page trains: dense layers, ReLU and dropout after each hidden layer, and
// Adam. Its masks are the library's bits; its arithmetic is in doubles, not in JAX's float32.

import { atSite } from "./laws/keys.js";
import { normals, symmetricUniforms } from "./laws/noise.js";

/** Layers of the given widths, such as [1, 48, 48, 1], initialised from a key. */
export function createNetwork(key, widths) {
  const layers = widths.slice(1).map((outputs, layer) => {
    const inputs = widths[layer];
    const place = ["layer", layer];
    const last = layer === widths.length - 2;
    const spread = Math.sqrt((last ? 1 : 2) / inputs);
    const weights = normals(atSite(key, [...place, "weights"]), [inputs, outputs]).map(
      (z) => z * spread,
    );
    // Kinks of the first layer all over the inputs, where zeros would put them all at 0.
    const bias =
      layer > 0
        ? new Float64Array(outputs)
        : symmetricUniforms(atSite(key, [...place, "bias"]), [outputs]);
    return { inputs, outputs, parameters: [weights, bias].map(withMoments) };
  });
  return { layers, steps: 0 };
}

const withMoments = (values) => ({
  values,
  gradient: new Float64Array(values.length),
  mean: new Float64Array(values.length),
  square: new Float64Array(values.length),
});

/**
 * The outputs for `count` rows of inputs. `factors` has for each hidden layer what dropout multiplies
 * with: null for nothing, an array for every row, or one of a row that all of them share.
 */
export function predict(network, inputs, count, factors = []) {
  return forward(network, inputs, count, factors).at(-1);
}

function forward({ layers }, inputs, count, factors) {
  const values = [inputs];
  layers.forEach((layer, index) => {
    const [weights, bias] = layer.parameters.map((parameter) => parameter.values);
    const x = values[index];
    const y = new Float64Array(count * layer.outputs);
    const factor = factors[index];
    const shared = factor?.length === layer.outputs;
    for (let row = 0; row < count; row++) {
      const at = row * layer.outputs;
      for (let j = 0; j < layer.outputs; j++) y[at + j] = bias[j];
      for (let i = 0; i < layer.inputs; i++) {
        const value = x[row * layer.inputs + i];
        if (value === 0) continue; // a dropped unit, or one that is off
        const from = i * layer.outputs;
        for (let j = 0; j < layer.outputs; j++) y[at + j] += value * weights[from + j];
      }
      if (index === layers.length - 1) continue;
      for (let j = 0; j < layer.outputs; j++) {
        const active = Math.max(0, y[at + j]);
        y[at + j] = factor ? active * factor[shared ? j : at + j] : active;
      }
    }
    values.push(y);
  });
  return values;
}

/** One step of Adam on the mean squared error, which it returns. */
export function trainStep(network, inputs, targets, factors, learningRate) {
  const count = targets.length;
  const values = forward(network, inputs, count, factors);
  let loss = 0;
  let slope = values.at(-1).map((output, i) => {
    const error = output - targets[i];
    loss += (error * error) / count;
    return (2 * error) / count;
  });
  for (let index = network.layers.length - 1; index >= 0; index--) {
    slope = backward(
      network.layers[index],
      values[index],
      slope,
      count,
      factors[index - 1],
      index > 0,
    );
  }
  network.steps += 1;
  for (const { parameters } of network.layers) {
    for (const parameter of parameters) adam(parameter, network.steps, learningRate);
  }
  return loss;
}

/** Writes the gradients of a layer, and returns those of the layer before it, ahead of its ReLU. */
function backward(layer, x, slope, count, factor, wanted) {
  const [weights, bias] = layer.parameters;
  weights.gradient.fill(0);
  bias.gradient.fill(0);
  const before = wanted ? new Float64Array(count * layer.inputs) : null;
  for (let row = 0; row < count; row++) {
    const at = row * layer.outputs;
    for (let j = 0; j < layer.outputs; j++) bias.gradient[j] += slope[at + j];
    for (let i = 0; i < layer.inputs; i++) {
      const place = row * layer.inputs + i;
      const value = x[place];
      if (value === 0) continue; // then its slope is 0 as well: dropped, or off
      const from = i * layer.outputs;
      let sum = 0;
      for (let j = 0; j < layer.outputs; j++) {
        weights.gradient[from + j] += value * slope[at + j];
        sum += weights.values[from + j] * slope[at + j];
      }
      if (wanted) before[place] = factor ? sum * factor[place] : sum;
    }
  }
  return before;
}

function adam({ values, gradient, mean, square }, steps, learningRate) {
  const rate = (learningRate * Math.sqrt(1 - 0.999 ** steps)) / (1 - 0.9 ** steps);
  for (let i = 0; i < values.length; i++) {
    mean[i] += 0.1 * (gradient[i] - mean[i]);
    square[i] += 0.001 * (gradient[i] * gradient[i] - square[i]);
    values[i] -= (rate * mean[i]) / (Math.sqrt(square[i]) + 1e-8);
  }
}
