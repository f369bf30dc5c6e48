// The rate as a function of the step: early and late dropout.

import { gridFrom, makeData, meanSquaredError, newNetwork, train, truth } from "../experiment.js";
import { constant, curriculum, early, late } from "../laws/schedules.js";
import { chart, legend } from "../ui/charts.js";
import {
  button,
  card,
  controls,
  h,
  labelled,
  pythonLine,
  rateControl,
  t,
  write,
} from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { onSeed, root } from "../ui/seed.js";
import { training } from "../ui/training.js";

const STEPS = 800;
const EVERY = 10;
const GRID = gridFrom(-1, 1, 81);
const CURVE = { x: GRID, y: GRID.map(truth) };
const SCHEDULES = {
  none: { make: () => constant(0), style: "muted" },
  constant: { make: constant, style: "ink dashed" },
  early: { make: early, style: "orange dash-dot" },
  late: { make: late, style: "blue" },
  curriculum: { make: (rate) => curriculum(rate, 10 / STEPS), style: "green dotted" },
};
const NAMES = Object.keys(SCHEDULES);

export function schedulesCard() {
  const state = { rate: 0.3, cutoff: 400 };
  const note = h("p", { class: "note" });
  const body = h("tbody", {});
  const line = pythonLine();

  const schedule = (name) => SCHEDULES[name].make(state.rate, state.cutoff);

  function begin() {
    trained.pause();
    state.data = makeData(root(), 20, { noise: 0.25 });
    state.networks = NAMES.map(() => newNetwork(root()));
    state.errors = NAMES.map(() => []);
  }

  const steps = () => state.networks[0].steps;

  const rates = chart(190, (plot) => {
    const top = Math.max(0.1, Math.ceil(state.rate * 11) / 10);
    plot.axes({
      ...stepAxis(plot),
      y: [0, top],
      yTicks:
        top > 0.5
          ? [0, 0.25, 0.5, 0.75, 1].filter((y) => y <= top)
          : [0, 0.1, 0.2, 0.3, 0.4, 0.5].filter((y) => y <= top),
      yLabel: say("rateY"),
    });
    const xs = Array.from({ length: STEPS + 1 }, (_, i) => i);
    for (const name of NAMES) plot.line(xs, xs.map(schedule(name)), SCHEDULES[name].style);
    if (steps() > 0) plot.mark(steps(), "muted thin");
    plot.describe(say("schedulesRates", state.rate, state.cutoff, STEPS));
  });

  const errors = chart(240, (plot) => {
    plot.axes({
      ...stepAxis(plot),
      y: [-2.2, 0.2],
      yTicks: [-2, -1.5, -1, -0.5, 0],
      yLabel: say("errorY"),
    });
    NAMES.forEach((name, i) => {
      const logs = state.errors[i].map((error) => Math.log10(error));
      if (logs.length > 1)
        plot.line(
          logs.map((_, k) => k * EVERY),
          logs,
          SCHEDULES[name].style,
        );
    });
    const last = NAMES.map(
      (name, i) => `${say(`schedule-${name}`)} ${state.errors[i].at(-1)?.toFixed(3) ?? ""}`,
    );
    plot.describe(steps() ? say("schedulesErrors", steps(), last.join(", ")) : say("lossEmpty"));
  });

  function draw() {
    rates.redraw();
    errors.redraw();
    write(cutoffText, say("cutoffAt", state.cutoff));
    line.show(
      ["early", "late"]
        .map((name) => `jdropout.schedules.${name}(${state.rate}, ${state.cutoff})`)
        .join(", "),
    );
    const value = (number) => (steps() ? number.toFixed(3) : "–");
    body.replaceChildren(
      ...NAMES.map((name, i) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, say(`schedule-${name}`)),
          h("td", {}, schedule(name)(Math.min(steps(), STEPS - 1)).toFixed(2)),
          h("td", {}, value(meanSquaredError(state.networks[i], state.data))),
          h("td", {}, value(meanSquaredError(state.networks[i], CURVE))),
        ),
      ),
    );
    trained.show();
    if (steps() >= STEPS) {
      const order = NAMES.map((name, i) => [meanSquaredError(state.networks[i], CURVE), name]).sort(
        (a, b) => a[0] - b[0],
      );
      write(note, say("schedulesNote", say(`schedule-${order[0][1]}`), order[0][0].toFixed(3)));
    } else {
      write(note, say("schedulesBefore"));
    }
  }

  function one() {
    const at = steps();
    NAMES.forEach((name, i) => {
      if (at % EVERY === 0) state.errors[i].push(meanSquaredError(state.networks[i], CURVE));
      train(state.networks[i], root(), state.data, schedule(name)(at), 0.005, { traced: true });
    });
    return steps() < STEPS;
  }

  function reset() {
    begin();
    draw();
  }

  const trained = training("schedulesTrain", STEPS, { steps, one, begin, draw, note });
  const rate = rateControl({
    value: state.rate,
    high: 0.9,
    onvalue: (value) => {
      state.rate = value;
      reset();
    },
  });
  const cutoff = labelled(
    h("input", { type: "range", min: 50, max: STEPS - 50, step: 50, value: state.cutoff }),
    "cutoff",
  );
  cutoff.addEventListener("input", () => {
    state.cutoff = Number(cutoff.value);
    reset();
  });
  const cutoffText = h("span", {});

  begin();
  onSeed(reset);
  onLanguage(draw);
  return card(
    "schedules",
    controls(
      rate.root,
      h("div", { class: "control" }, cutoffText, cutoff),
      h("div", { class: "buttons" }, trained.button, button("restart", reset)),
      trained.progress,
    ),
    legend(...NAMES.map((name) => [SCHEDULES[name].style, t("span", `schedule-${name}`), "line"])),
    rates.root,
    errors.root,
    h(
      "table",
      {},
      t("caption", "schedulesTable"),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          t("th", "schedule", { scope: "col" }),
          t("th", "rateNow", { scope: "col" }),
          t("th", "errorTrain", { scope: "col" }),
          t("th", "errorTest", { scope: "col" }),
        ),
      ),
      body,
    ),
    note,
    line.root,
  );
}

function stepAxis(plot) {
  const xTicks =
    plot.width < 420 ? [0, 200, 400, 600, 800] : [0, 100, 200, 300, 400, 500, 600, 700, 800];
  return { x: [0, STEPS], xTicks, xLabel: say("stepX") };
}
