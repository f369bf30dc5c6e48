// What happens if one forgets the scale, the key or the flag.

import {
  factorsAt,
  gridFrom,
  makeData,
  meanSquaredError,
  newNetwork,
  train,
  truth,
} from "../experiment.js";
import { predict } from "../network.js";
import { chart, legend } from "../ui/charts.js";
import {
  button,
  card,
  choice,
  controls,
  h,
  rateControl,
  t,
  write,
  writePython,
} from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { onSeed, root } from "../ui/seed.js";
import { training } from "../ui/training.js";

const STEPS = 800;
const GRID = gridFrom(-1, 1, 81);
const OPTIONS = { scale: { scaled: false }, key: { sameKey: true }, flag: {} };
const CODE = {
  scale: [
    "y = jnp.where(jdropout.keep_mask(key, rate, x.shape), x, 0)",
    "y = jdropout.dropout(key, x, rate)",
  ],
  key: [
    'key = site_key(root, step=0, site="hidden1")',
    'key = site_key(root, step=step, site="hidden1")',
  ],
  flag: [
    "y = jdropout.dropout(key, x, rate)",
    "y = jdropout.dropout(key, x, rate, deterministic=not training)",
  ],
};

export function mistakesCard() {
  const state = { rate: 0.3, mistake: "scale" };
  const note = h("p", { class: "note" });
  const wrongCode = h("code", { class: "python", translate: "no" });
  const rightCode = h("code", { class: "python", translate: "no" });
  const curve = { x: GRID, y: GRID.map(truth) };

  function begin() {
    trained.pause();
    state.data = makeData(root(), 24, { noise: 0.1 });
    state.right = newNetwork(root());
    state.wrong = newNetwork(root());
    state.losses = null;
  }

  /** The wrong predictions in evaluation. With the flag forgotten, each call has other masks. */
  function wrongCurves() {
    if (state.mistake !== "flag") return [predict(state.wrong, GRID, GRID.length)];
    return [0, 1, 2].map((call) => {
      const factors = factorsAt(root(), STEPS + call, state.rate, GRID.length);
      return predict(state.wrong, GRID, GRID.length, factors);
    });
  }

  const fit = chart(330, (plot) => {
    plot.axes({
      x: [-1, 1],
      y: [-3, 3],
      xTicks: [-1, -0.5, 0, 0.5, 1],
      yTicks: [-3, -2, -1, 0, 1, 2, 3],
      xLabel: say("inputX"),
      yLabel: say("outputY"),
    });
    const wrong = wrongCurves();
    plot.line(GRID, curve.y, "muted dotted");
    wrong.forEach((output) =>
      plot.line(GRID, output, wrong.length > 1 ? "orange thin" : "orange dashed"),
    );
    plot.line(GRID, predict(state.right, GRID, GRID.length), "blue");
    plot.points(state.data.x, state.data.y, "ink-fill");
    const errorOf = (output) =>
      output.reduce((sum, y, i) => sum + (y - curve.y[i]) ** 2, 0) / GRID.length;
    const bad = wrong.reduce((sum, output) => sum + errorOf(output), 0) / wrong.length;
    const facts = [
      state.right.steps,
      meanSquaredError(state.right, curve).toFixed(3),
      bad.toFixed(3),
      ...(state.losses ?? []).map((loss) => loss.toFixed(3)),
    ];
    plot.describe(say("mistakesPicture", ...facts));
    write(
      note,
      state.right.steps
        ? say(`mistakes-${state.mistake}-note`, ...facts)
        : say(`mistakes-${state.mistake}-before`),
    );
  });

  function draw() {
    fit.redraw();
    writePython(wrongCode, CODE[state.mistake][0]);
    writePython(rightCode, CODE[state.mistake][1]);
    trained.show();
  }

  function one() {
    const { rate, data } = state;
    state.losses = [
      train(state.right, root(), data, rate, 0.005),
      train(state.wrong, root(), data, rate, 0.005, OPTIONS[state.mistake]),
    ];
    return state.right.steps < STEPS;
  }

  function reset() {
    begin();
    draw();
  }

  const trained = training("mistakesTrain", STEPS, {
    steps: () => state.right.steps,
    one,
    begin,
    draw,
    note,
  });
  const rate = rateControl({
    value: state.rate,
    high: 0.9,
    onvalue: (value) => {
      state.rate = value;
      reset();
    },
  });
  const which = choice("mistake", ["scale", "key", "flag"], state.mistake, (mistake) => {
    state.mistake = mistake;
    reset();
  });

  begin();
  onSeed(reset);
  onLanguage(draw);
  return card(
    "mistakes",
    controls(
      which,
      rate.root,
      h("div", { class: "buttons" }, trained.button, button("restart", reset)),
      trained.progress,
    ),
    fit.root,
    legend(
      ["ink-fill", t("span", "legendData"), "point"],
      ["muted dotted", t("span", "legendTruth"), "line"],
      ["blue", t("span", "legendRight"), "line"],
      ["orange dashed", t("span", "legendWrong"), "line"],
    ),
    note,
    h(
      "dl",
      { class: "code-pair" },
      t("dt", "codeWrong"),
      h("dd", {}, wrongCode),
      t("dt", "codeRight"),
      h("dd", {}, rightCode),
    ),
  );
}
