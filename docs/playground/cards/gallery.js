// The family: every function of the library that has a mask or noise, applied to ones.

import { FAMILY, SENTENCES } from "../laws/family.js";
import { cells, legend } from "../ui/charts.js";
import { card, controls, h, pythonLine, rateControl, s, t } from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { currentSeed, onSeed, root } from "../ui/seed.js";

const TABLE = "jnp.ones((8, 17))";
const HALVES = "jnp.tile(jnp.arange(18) > 8, (8, 1)).astype(jnp.float32)";

/** For each panel the function, and the line that makes it, or its first part. */
const CALLS = {
  dropout: ["dropout", (key, r) => `jdropout.dropout(${key('"dropout"')}, ${TABLE}, ${r})`],
  broadcast: [
    "dropout",
    (key, r) => `jdropout.dropout(${key('"shared"')}, ${TABLE}, ${r}, broadcast_dims=(0,))`,
  ],
  spatial: [
    "spatial_dropout",
    (key, r) => `jdropout.spatial_dropout(${key('"spatial"')}, jnp.ones((2, 3, 3, 5)), ${r})`,
  ],
  locked: [
    "locked_dropout",
    (key, r) => `jdropout.locked_dropout(${key('"locked"')}, jnp.ones((3, 8, 5)), ${r})`,
  ],
  path: ["drop_path", (key, r) => `jdropout.drop_path(${key('"path"')}, ${TABLE}, ${r})`],
  pathBatch: [
    "drop_path",
    (key, r) => `jdropout.drop_path(${key('("batch", 0)')}, jnp.ones((8, 3)), ${r}, mode="batch")`,
  ],
  layer: [
    "layer_drop",
    (key, r) =>
      `jdropout.layer_drop(${key('("layer", 0, 0)')}, lambda x: x + 1, jnp.float32(0), ${r})`,
  ],
  zoneout: [
    "zoneout",
    (key, r) =>
      `jdropout.zoneout(${key('("zoneout", 0)')}, jnp.full(8, jnp.inf), jnp.ones(8), ${r})`,
  ],
  block1: [
    "drop_block",
    (key, r) =>
      `jdropout.drop_block(${key('"runs"')}, jnp.ones((8, 17, 1)), ${r}, block_size=3, spatial_axes=(1,))`,
  ],
  block2: [
    "drop_block",
    (key, r) =>
      `jdropout.drop_block(${key('"squares"')}, jnp.ones((1, 8, 8, 2)), ${r}, block_size=3)`,
  ],
  blockChannels: [
    "drop_block",
    (key, r) =>
      `jdropout.drop_block(${key('"squares"')}, jnp.ones((1, 8, 8, 2)), ${r}, block_size=3, shared_channels=False)`,
  ],
  patch: [
    "patch_dropout",
    (key, r) =>
      `jdropout.patch_dropout(${key('"patches"')}, jnp.ones((8, 16, 1)), ${r}, num_prefix_tokens=0)[1]`,
  ],
  subset: [
    "keep_indices",
    (key, r) => `jdropout.keep_indices(${key('"subset"')}, ${r}, 16, shape=(8,))`,
  ],
  subsetGroups: [
    "keep_indices",
    (key, r) => `jdropout.keep_indices(${key('"groups"')}, ${r}, 16, groups=4, shape=(8,))`,
  ],
  strata: [
    "stratified_key",
    (key, r) =>
      `jnp.stack([jdropout.keep_mask(jdropout.keys.stratified_key(${key('"strata"')}, t, 10), ${r}, (17,)) for t in range(10)])`,
  ],
  word: [
    "word_dropout",
    (key, r) =>
      `jdropout.word_dropout(${key('"words"')}, jnp.ones((5, 6), jnp.int32), ${r}, replacement=0)`,
  ],
  embedding: [
    "embedding_dropout",
    (key, r) => `jdropout.embedding_dropout(${key('"rows"')}, ${TABLE}, ${r})`,
  ],
  connect: [
    "drop_connect",
    (key, r) => `jdropout.drop_connect(${key('"connect"')}, ${TABLE}, ${r})`,
  ],
  targeted: [
    "targeted_dropout",
    (key, r) =>
      `jdropout.targeted_dropout(${key('"target"')}, jax.random.uniform(${key('"weights"')}, (8, 17), minval=0.15), ${r}, target_fraction=0.5)`,
  ],
  gaussian: [
    "gaussian_dropout",
    (key, r) => `jdropout.gaussian_dropout(${key('"times"')}, ${HALVES}, ${r})`,
  ],
  gaussianNoise: [
    "gaussian_noise",
    (key, r) => `jdropout.gaussian_noise(${key('"plus"')}, ${HALVES}, (${r} / (1 - ${r})) ** 0.5)`,
  ],
  uniformNoise: [
    "uniform_noise",
    (key, r) =>
      `jdropout.uniform_noise(${key('"uniform"')}, ${HALVES}, (3 * ${r} / (1 - ${r})) ** 0.5)`,
  ],
  variational: [
    "variational_dropout",
    (key) =>
      `jdropout.variational_dropout(${key('"variational"')}, ${TABLE}, jnp.tile(jnp.linspace(-6.0, 1.0, 17), (8, 1)))`,
  ],
  alpha: ["alpha_dropout", (key, r) => `jdropout.alpha_dropout(${key('"alpha"')}, ${TABLE}, ${r})`],
  featureAlpha: [
    "feature_alpha_dropout",
    (key, r) =>
      `jdropout.feature_alpha_dropout(${key('"features"')}, jnp.ones((2, 3, 3, 5)), ${r})`,
  ],
  standout: [
    "standout",
    (key, r) =>
      `jdropout.standout(${key('"standout"')}, ${TABLE}, jnp.tile(jnp.linspace(-3.0, 3.0, 17), (8, 1)), beta=float(jnp.log((1 - ${r}) / ${r})))`,
  ],
  concrete: [
    "concrete_dropout",
    (key, r) =>
      `jdropout.concrete_dropout(${key('"concrete"')}, ${TABLE}, jnp.log(${r} / (1 - ${r})))`,
  ],
};

const GROUPS = {
  axes: ["dropout", "broadcast", "spatial", "locked"],
  branches: ["path", "pathBatch", "layer", "zoneout"],
  regions: ["block1", "block2", "blockChannels"],
  subsets: ["patch", "subset", "subsetGroups", "strata"],
  words: ["word", "embedding", "connect", "targeted"],
  noise: ["gaussian", "gaussianNoise", "uniformNoise", "variational"],
  values: ["alpha", "featureAlpha", "standout", "concrete"],
};

export function galleryCard() {
  const state = { rate: 0.3 };
  const panels = Object.values(GROUPS)
    .flat()
    .map((name) => panelOf(name));
  const draw = () => panels.forEach((panel) => panel.draw(state.rate));
  const rate = rateControl({
    name: "galleryRate",
    value: state.rate,
    low: 0.05,
    high: 0.9,
    onvalue: (value) => {
      state.rate = value;
      draw();
    },
  });

  onSeed(draw);
  onLanguage(draw);
  return card(
    "gallery",
    controls(rate.root),
    legend(
      ["dropped", t("span", "galleryDropped"), "small"],
      ["one", t("span", "galleryOne")],
      ["blue", t("span", "galleryScaled")],
      ["orange", t("span", "galleryNegative")],
      ["replaced", t("span", "galleryReplaced")],
      ["left-out", t("span", "galleryLeftOut")],
    ),
    ...Object.entries(GROUPS).map(([group, names]) =>
      h(
        "div",
        { class: "group" },
        t("h3", `group-${group}`),
        h(
          "div",
          { class: "panels" },
          ...names.map((name) => panels.find((panel) => panel.name === name).root),
        ),
      ),
    ),
  );
}

function panelOf(name) {
  const [called, call] = CALLS[name];
  const shape = FAMILY[name](root(), 0.3).shape;
  const [down, across, rows, columns] = shape;
  const picture = cells(rows, columns, down, across, name === "word" ? { wide: 1.75 } : {});
  const line = pythonLine();
  const words = name === "word" ? wordTexts(picture) : null;
  const figure = h(
    "figure",
    { class: "panel", "data-panel": name },
    h("figcaption", {}, h("code", { translate: "no" }, called), t("span", `panel-${name}`)),
    picture.root,
    t("p", `axes-${name}`, { class: "panel-axes" }),
    h("details", {}, t("summary", "python"), line.root),
  );

  function draw(rate) {
    const panel = FAMILY[name](root(), rate);
    const kept = [...panel.values].filter((value) => value !== 0 && Number.isFinite(value)).length;
    const describe = say("panelPicture", called, say(`panel-${name}`), kept, panel.values.length);
    picture.show(describe, (i) => {
      const side = 0.86 * (panel.sizes?.[i] ?? 1);
      return look(panel.values[i], side);
    });
    words?.(panel.values);
    const key = (site) => `jdropout.keys.at_site(jax.random.key(${currentSeed()}), ${site})`;
    line.show(call(key, rate));
  }
  return { name, root: figure, draw };
}

/** The colour of a value: orange below 0, faint at 0, light blue at 1, blue above. */
function look(value, side) {
  if (Number.isNaN(value)) return { style: "left-out", side: side * 0.92 };
  if (value === Infinity) return { style: "replaced", side };
  if (value === 0) return { style: "dropped", side: Math.min(side, 0.24) };
  const mix = (low, high, part) =>
    `color-mix(in oklab, var(--${high}) ${(100 * Math.min(1, part)).toFixed(1)}%, var(--${low}))`;
  if (value < 0) return { style: "value", side, fill: mix("zero", "orange", -value / 1.2) };
  if (value <= 1) return { style: "value", side, fill: mix("zero", "one", value) };
  return { style: "value", side, fill: mix("one", "blue", (value - 1) / 0.6) };
}

function wordTexts(picture) {
  const words = SENTENCES.flat();
  const texts = picture.all.map(({ x, y }, i) => {
    const text = s(
      "text",
      { class: "word", x, y: y + 0.14, "text-anchor": "middle", "aria-hidden": "true" },
      words[i],
    );
    picture.root.append(text);
    return text;
  });
  return (values) =>
    texts.forEach((text, i) => {
      text.textContent = values[i] === Infinity ? "<unk>" : words[i];
      text.setAttribute("class", values[i] === Infinity ? "word on-replaced" : "word");
    });
}
