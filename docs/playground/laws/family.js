// The functions of the library that the gallery shows, applied as examples/gallery.py applies them.
// A panel is {shape: [tiles down, tiles across, rows, columns], values}; NaN is a place that was
// left out, and Infinity one that was replaced or not updated.

import { atSite } from "./keys.js";
import {
  effectiveRate,
  keepMask,
  keepProbability,
  scaleOf,
  threshold,
  uniformNumbers,
} from "./mask.js";
import { jaxUniforms, logistics, normals, symmetricUniforms } from "./noise.js";
import { sampleMask } from "./strata.js";
import { keepIndices, smallestOf } from "./subset.js";
import { threefry2x32 } from "./threefry.js";

const ROWS = 8;
const COLUMNS = 17;
const SELU_FLOOR = -1.7580993408473766;

const size = (shape) => shape.reduce((product, count) => product * count, 1);
const table = (values, rows = ROWS, columns = COLUMNS) => ({
  shape: [1, 1, rows, columns],
  values,
});

/** `dropout` of ones. */
function dropped(key, rate, shape, broadcastDims = [], formula = null) {
  const limit = threshold(rate);
  const scale = scaleOf(limit);
  const mask = keepMask(key, rate, shape, { broadcastDims });
  return Float64Array.from(mask, formula ?? ((kept) => (kept ? scale : 0)));
}

/** Values of shape (example, height, width, channel) as a tile for each example and channel. */
function tiles(values, [examples, height, width, channels]) {
  const result = new Float64Array(values.length);
  let i = 0;
  for (let e = 0; e < examples; e++) {
    for (let c = 0; c < channels; c++) {
      for (let place = 0; place < height * width; place++) {
        result[i++] = values[(e * height * width + place) * channels + c];
      }
    }
  }
  return { shape: [examples, channels, height, width], values: result };
}

/** Columns that are made one after another, as those of time steps. */
function columns(make, count, rows, width = 1) {
  const result = new Float64Array(count * rows * width);
  for (let column = 0; column < count; column++) {
    make(column).forEach((value, i) => {
      const row = Math.floor(i / width);
      result[(row * count + column) * width + (i % width)] = value;
    });
  }
  return result;
}

/** The probability with which `drop_block` starts a block: it makes the dropped part the rate. */
export function dropBlockGamma(rate, mapShape, block) {
  if (rate === 0 || rate === 1) return rate;
  const coverage = coverageOf(
    mapShape,
    mapShape.map((n) => Math.min(n, block)),
  );
  let [low, high] = [0, 1];
  for (;;) {
    const gamma = (low + high) / 2;
    if (!(low < gamma && gamma < high)) return gamma;
    const log = Math.log1p(-gamma);
    const drops = -coverage.reduce((sum, [count, part]) => sum + part * Math.expm1(count * log), 0);
    if (drops < rate) low = gamma;
    else high = gamma;
  }
}

/** Pairs of a number of blocks that can cover an element, and the part of elements with it. */
function coverageOf(sizes, block) {
  let together = new Map([[1, 1]]);
  sizes.forEach((n, axis) => {
    const most = Math.min(block[axis], n - block[axis] + 1);
    const product = new Map();
    const add = (count, number) => product.set(count, (product.get(count) ?? 0) + number);
    for (const [count, number] of together) {
      for (let k = 1; k < most; k++) add(count * k, number * 2);
      add(count * most, number * (n - 2 * (most - 1)));
    }
    together = product;
  });
  return [...together].map(([count, number]) => [count, number / size(sizes)]);
}

/** `drop_block` of ones of shape (example, height, width, channel); a height of 1 is a sequence. */
function dropBlock(key, rate, [examples, height, width, channels], block, { shared = true } = {}) {
  const map = height > 1 ? [height, width] : [width];
  const corners = [examples, ...map.map((n) => n - block + 1), channels];
  const limit = threshold(dropBlockGamma(rate, map, block), 32);
  const free = keepProbability(limit);
  const kept = coverageOf(
    map,
    map.map(() => block),
  ).reduce((sum, [n, part]) => sum + part * free ** n, 0);
  const broadcastDims = shared ? [corners.length - 1] : [];
  const starts = keepMask(key, dropBlockGamma(rate, map, block), corners, {
    precision: 32,
    broadcastDims,
  });
  const values = new Float64Array(examples * height * width * channels).fill(1 / kept);
  const [down, across] = height > 1 ? corners.slice(1) : [1, corners[1]];
  starts.forEach((outside, i) => {
    if (outside) return;
    const channel = i % channels;
    const left = Math.floor(i / channels) % across;
    const top = Math.floor(i / channels / across) % down;
    const example = Math.floor(i / channels / across / down);
    for (let y = top; y < Math.min(height, top + block); y++) {
      for (let x = left; x < left + block; x++) {
        values[((example * height + y) * width + x) * channels + channel] = 0;
      }
    }
  });
  return values;
}

function patchDropout(key, rate) {
  const count = Math.max(1, Math.floor(Math.round(16 * (1 - rate) * 1e6) / 1e6));
  const numbers = uniformNumbers(key, 2, [8, 16]).data;
  const values = new Float64Array(8 * 16).fill(NaN);
  for (let example = 0; example < 8; example++) {
    const own = numbers.subarray(16 * example, 16 * example + 16);
    for (const i of smallestOf(own, count)) values[16 * example + i] = 1;
  }
  return { shape: [2, 4, 4, 4], values };
}

function keptSubsets(key, rate, groups) {
  const values = new Float64Array(ROWS * 16).fill(NaN);
  keepIndices(key, rate, 16, { shape: [ROWS], groups }).forEach((kept, row) => {
    for (const i of kept) values[16 * row + i] = 1;
  });
  return table(values, ROWS, 16);
}

export const SENTENCES = [
  ["the", "dog", "saw", "a", "red", "fox"],
  ["we", "like", "the", "old", "blue", "car"],
  ["she", "found", "it", "<pad>", "<pad>", "<pad>"],
  ["it", "rains", "on", "the", "hill", "<pad>"],
  ["birds", "sing", "<pad>", "<pad>", "<pad>", "<pad>"],
];

function wordDropout(key, rate) {
  const words = SENTENCES.flat();
  const kept = keepMask(key, rate, [SENTENCES.length, 6]);
  return table(
    Float64Array.from(kept, (k, i) => (k || words[i] === "<pad>" ? 1 : Infinity)),
    SENTENCES.length,
    6,
  );
}

function targetedDropout(key, weightKey, rate) {
  const weights = jaxUniforms(weightKey, ROWS * COLUMNS, Math.fround(0.15), threefry2x32);
  const kept = keepMask(key, rate, [ROWS, COLUMNS]);
  const values = new Float64Array(weights.length).fill(1);
  for (let unit = 0; unit < COLUMNS; unit++) {
    const own = Array.from({ length: ROWS }, (_, row) => weights[row * COLUMNS + unit]);
    for (const row of smallestOf(own, ROWS / 2)) {
      if (!kept[row * COLUMNS + unit]) values[row * COLUMNS + unit] = 0;
    }
  }
  return { ...table(values), sizes: weights.map(Math.sqrt) };
}

function alpha(key, rate, shape, broadcastDims) {
  const r = effectiveRate(rate);
  if (r === 1) return new Float64Array(size(shape));
  const a = Math.sqrt(1 / (1 - r) / (1 + r * SELU_FLOOR ** 2));
  return dropped(
    key,
    rate,
    shape,
    broadcastDims,
    (kept) => a * (kept ? 1 : SELU_FLOOR) - a * r * SELU_FLOOR,
  );
}

const logistic = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

function standout(key, rate) {
  const beta = Math.log((1 - rate) / rate);
  const numbers = uniformNumbers(key, 2, [ROWS, COLUMNS]).data;
  return Float64Array.from(numbers, (number, i) => {
    const input = -3 + (6 * (i % COLUMNS)) / (COLUMNS - 1);
    return number < Math.round(logistic(input + beta) * 2 ** 32) ? 1 : 0;
  });
}

function concrete(key, rate) {
  const logit = Math.log(rate / (1 - rate));
  const noise = logistics(key, [ROWS, COLUMNS]);
  return noise.map((z) => Math.exp(softplus(logit) - softplus((logit + z) / 0.1)));
}

/** Noise on zeros at the left and ones at the right. */
function noisy(noise, combine) {
  const width = COLUMNS + 1;
  return table(
    noise.map((z, i) => combine(i % width > COLUMNS / 2 ? 1 : 0, z)),
    ROWS,
    width,
  );
}

const HALVES = [ROWS, COLUMNS + 1];
const deviation = (rate) => Math.sqrt(rate / (1 - rate));

/** A panel for each name, from a key and a rate. */
export const FAMILY = {
  dropout: (key, rate) => table(dropped(atSite(key, "dropout"), rate, [ROWS, COLUMNS])),
  broadcast: (key, rate) => table(dropped(atSite(key, "shared"), rate, [ROWS, COLUMNS], [0])),
  spatial: (key, rate) =>
    tiles(dropped(atSite(key, "spatial"), rate, [2, 3, 3, 5], [1, 2]), [2, 3, 3, 5]),
  locked: (key, rate) => ({
    shape: [1, 3, ROWS, 5],
    values: dropped(atSite(key, "locked"), rate, [3, ROWS, 5], [1]),
  }),
  path: (key, rate) => table(dropped(atSite(key, "path"), rate, [ROWS, COLUMNS], [1])),
  pathBatch: (key, rate) => {
    const steps = [0, 1, 2, 3].map((i) =>
      dropped(atSite(key, ["batch", i]), rate, [ROWS, 3], [0, 1]),
    );
    return {
      shape: [1, 4, ROWS, 3],
      values: Float64Array.from(steps.flatMap((step) => [...step])),
    };
  },
  layer: (key, rate) => {
    const run = (step, layer) => keepMask(atSite(key, ["layer", step, layer]), rate, [])[0];
    const all = (step) => Array.from({ length: ROWS }, (_, layer) => run(step, layer));
    return table(columns(all, COLUMNS, ROWS));
  },
  zoneout: (key, rate) => {
    const update = (time) => [...keepMask(atSite(key, ["zoneout", time]), rate, [ROWS])];
    return table(
      columns((time) => update(time).map((kept) => (kept ? 1 : Infinity)), COLUMNS, ROWS),
    );
  },
  block1: (key, rate) => table(dropBlock(atSite(key, "runs"), rate, [ROWS, 1, COLUMNS, 1], 3)),
  block2: (key, rate) => {
    const shape = [1, ROWS, ROWS, 2];
    return tiles(dropBlock(atSite(key, "squares"), rate, shape, 3), shape);
  },
  blockChannels: (key, rate) => {
    const shape = [1, ROWS, ROWS, 2];
    return tiles(dropBlock(atSite(key, "squares"), rate, shape, 3, { shared: false }), shape);
  },
  patch: (key, rate) => patchDropout(atSite(key, "patches"), rate),
  subset: (key, rate) => keptSubsets(atSite(key, "subset"), rate, 1),
  subsetGroups: (key, rate) => keptSubsets(atSite(key, "groups"), rate, 4),
  strata: (key, rate) => {
    const samples = Array.from({ length: 10 }, (_, sample) =>
      sampleMask(atSite(key, "strata"), rate, [COLUMNS], sample, 10),
    );
    return table(Float64Array.from(samples.flatMap((mask) => [...mask])), 10);
  },
  word: (key, rate) => wordDropout(atSite(key, "words"), rate),
  embedding: (key, rate) => table(dropped(atSite(key, "rows"), rate, [ROWS, COLUMNS], [1])),
  connect: (key, rate) => table(dropped(atSite(key, "connect"), rate, [ROWS, COLUMNS])),
  targeted: (key, rate) => targetedDropout(atSite(key, "target"), atSite(key, "weights"), rate),
  gaussian: (key, rate) =>
    noisy(normals(atSite(key, "times"), HALVES), (x, z) => x * (1 + deviation(rate) * z)),
  gaussianNoise: (key, rate) =>
    noisy(normals(atSite(key, "plus"), HALVES), (x, z) => x + deviation(rate) * z),
  uniformNoise: (key, rate) =>
    noisy(
      symmetricUniforms(atSite(key, "uniform"), HALVES),
      (x, z) => x + Math.sqrt(3) * deviation(rate) * z,
    ),
  variational: (key) => {
    const noise = normals(atSite(key, "variational"), [ROWS, COLUMNS]);
    const logAlpha = (i) => -6 + (7 * (i % COLUMNS)) / (COLUMNS - 1);
    return table(noise.map((z, i) => 1 + Math.exp(logAlpha(i) / 2) * z));
  },
  alpha: (key, rate) => table(alpha(atSite(key, "alpha"), rate, [ROWS, COLUMNS])),
  featureAlpha: (key, rate) =>
    tiles(alpha(atSite(key, "features"), rate, [2, 3, 3, 5], [1, 2]), [2, 3, 3, 5]),
  standout: (key, rate) => table(standout(atSite(key, "standout"), rate)),
  concrete: (key, rate) => table(concrete(atSite(key, "concrete"), rate)),
};
