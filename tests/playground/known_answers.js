// The known answers, as questions to the playground's laws: in the order in which docs/law.md asks
// them. Returns what is wrong.

import { siteKey } from "/laws/keys.js";
import { keepMask, maskHex, maskKey, threshold, uniformNumbers, broadcast } from "/laws/mask.js";
import { keepIndices } from "/laws/subset.js";
import { sampleMask } from "/laws/strata.js";
import { threefry2x32 } from "/laws/threefry.js";

const words = (texts) => texts.map((text) => parseInt(text, 16));
const place = (vector) => ({
  broadcastDims: vector.broadcast_dims ?? [],
  start: vector.start,
  globalShape: vector.global_shape,
});

export function failures(files) {
  const wrong = [];
  let asked = 0;
  const expect = (answer, expected, what) => {
    asked += 1;
    const [a, b] = [JSON.stringify(answer), JSON.stringify(expected)];
    if (a !== b) wrong.push(`${JSON.stringify(what)}: ${a} instead of ${b}`);
  };
  for (const vector of files["threefry2x32.json"].vectors) {
    if (vector.rounds !== 20) continue;
    expect(threefry2x32(words(vector.key), words(vector.counter)), words(vector.output), vector);
  }
  for (const vector of files["golden_thresholds.json"].vectors) {
    const { rate, precision, threshold: number, digits, checks } = vector;
    expect(threshold(rate, precision), { threshold: number, digits }, checks);
  }
  for (const vector of files["golden_masks.json"].vectors) {
    const key = words(vector.key_words);
    const { rate, precision, threshold: number, digits, shape, checks } = vector;
    expect(threshold(rate, precision), { threshold: number, digits }, checks);
    vector.mask_keys.forEach((expected, d) => expect(maskKey(key, d), words(expected), checks));
    const drawn = uniformNumbers(key, digits, shape, place(vector));
    const first = broadcast(drawn.data, drawn.shape, shape).slice(0, 8);
    expect([...first], vector.first_numbers, checks);
    const mask = keepMask(key, rate, shape, { precision, ...place(vector) });
    expect(maskHex(mask), vector.mask, checks);
  }
  for (const vector of files["golden_keys.json"].vectors) {
    const { site, microbatch } = vector;
    const step = BigInt(`0x${vector.step}`);
    const key = siteKey(words(vector.root_words), { step, site, microbatch });
    expect(key, words(vector.key_words), vector);
  }
  for (const vector of files["golden_subsets.json"].vectors) {
    const { rate, size, groups, shape, start, indices, checks } = vector;
    const options = { groups, shape, start, globalShape: vector.global_shape };
    expect(keepIndices(words(vector.key_words), rate, size, options), indices, checks);
  }
  for (const vector of files["golden_strata.json"].vectors) {
    const { sample, size, rate, shape, precision, checks } = vector;
    const options = { precision, ...place(vector) };
    const mask = sampleMask(words(vector.key_words), rate, shape, sample, size, options);
    expect(maskHex(mask), vector.mask, checks);
  }
  return { asked, wrong };
}
