// A network trained in the page, and the band of its Monte Carlo samples.

import {
  gridFrom,
  makeData,
  meanSquaredError,
  monteCarlo,
  newNetwork,
  train,
  truth,
  WIDTH,
} from "../experiment.js";
import { predict } from "../network.js";
import { chart, legend } from "../ui/charts.js";
import { button, card, controls, h, pythonLine, rateControl, t, toggle, write } from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { pythonKey, pythonMask } from "../ui/python.js";
import { currentSeed, onSeed, root } from "../ui/seed.js";
import { training } from "../ui/training.js";

const STEPS = 1200;
const POINTS = 30;
const GAP = 0.5;
const SAMPLES = 60;
const GRID = gridFrom(-1.5, 1.5, 91);

export function bandCard() {
  const state = { rate: 0.1, singles: false };
  const note = h("p", { class: "note" });
  const line = pythonLine();

  function begin() {
    trained.pause();
    state.data = makeData(root(), POINTS, { gap: GAP, noise: 0.05 });
    state.network = newNetwork(root());
    state.losses = [];
    state.first = meanSquaredError(state.network, state.data);
  }

  const fit = chart(330, (plot) => {
    const running = trained.running();
    const { mean, spread, outputs } = monteCarlo(
      state.network,
      root(),
      state.rate,
      GRID,
      running ? 16 : SAMPLES,
    );
    plot.axes({
      x: [-1.5, 1.5],
      y: [-2, 2],
      xTicks: [-1.5, -1, -0.5, 0, 0.5, 1, 1.5],
      yTicks: [-2, -1, 0, 1, 2],
      xLabel: say("inputX"),
      yLabel: say("outputY"),
    });
    plot.band(
      GRID,
      mean.map((m, i) => m - 2 * spread[i]),
      mean.map((m, i) => m + 2 * spread[i]),
      "blue",
    );
    if (state.singles)
      outputs.slice(0, 6).forEach((output) => plot.line(GRID, output, "blue thin"));
    plot.line(GRID, GRID.map(truth), "muted dotted");
    plot.line(GRID, mean, "blue");
    plot.line(GRID, predict(state.network, GRID, GRID.length), "ink dashed");
    plot.points(state.data.x, state.data.y, "orange");
    const average = (inside) => {
      const chosen = [...spread].filter((_, i) => inside(Math.abs(GRID[i])));
      return (chosen.reduce((sum, each) => sum + each, 0) / chosen.length).toFixed(3);
    };
    const facts = [
      average((x) => x > GAP && x < 1),
      average((x) => x < GAP / 2),
      average((x) => x > 1.25),
    ];
    const loss = meanSquaredError(state.network, state.data);
    plot.describe(say("bandPicture", state.network.steps, loss.toFixed(4), ...facts));
    if (!running)
      write(
        note,
        say("bandNote", state.network.steps, state.first.toFixed(3), loss.toFixed(4), ...facts),
      );
  });

  const losses = chart(150, (plot) => {
    const logs = state.losses.map((loss) => Math.max(-4, Math.log10(loss)));
    plot.axes({
      x: [0, STEPS],
      y: [-3, 1],
      xTicks: plot.width < 420 ? [0, 400, 800, 1200] : [0, 200, 400, 600, 800, 1000, 1200],
      yTicks: [-3, -2, -1, 0, 1],
      xLabel: say("stepX"),
      yLabel: say("lossY"),
    });
    if (logs.length > 1)
      plot.line(
        logs.map((_, i) => i),
        logs,
        "orange",
      );
    const last = state.losses.at(-1);
    plot.describe(
      last === undefined
        ? say("lossEmpty")
        : say("lossPicture", state.losses.length, last.toFixed(4)),
    );
  });

  function draw() {
    fit.redraw();
    losses.redraw();
    const next = Math.min(state.network.steps, STEPS - 1);
    line.show(pythonMask(pythonKey(currentSeed(), next, "hidden1"), state.rate, [POINTS, WIDTH]));
    trained.show();
  }

  function one() {
    const speed = state.network.steps < (2 * STEPS) / 3 ? 0.005 : 0.0015;
    state.losses.push(train(state.network, root(), state.data, state.rate, speed));
    return state.network.steps < STEPS;
  }

  function reset() {
    begin();
    draw();
  }

  const trained = training("train", STEPS, {
    steps: () => state.network.steps,
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
  const singles = toggle("bandSingles", (checked) => {
    state.singles = checked;
    fit.redraw();
  });

  begin();
  onSeed(reset);
  onLanguage(draw);
  return card(
    "band",
    controls(
      rate.root,
      singles.root,
      h("div", { class: "buttons" }, trained.button, button("restart", reset)),
      trained.progress,
    ),
    fit.root,
    legend(
      ["orange", t("span", "legendData"), "point"],
      ["muted dotted", t("span", "legendTruth"), "line"],
      ["blue", t("span", "legendMean"), "line"],
      ["blue", t("span", "legendBand"), "area"],
      ["ink dashed", t("span", "legendOff"), "line"],
    ),
    losses.root,
    note,
    line.root,
  );
}
