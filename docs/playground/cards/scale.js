// 100 units of 1 through weights of 1: 100, then about 60, then 100 again.

import { siteKey } from "../laws/keys.js";
import { keepMask, maskHex, scaleOf, threshold } from "../laws/mask.js";
import { cells, chart, legend } from "../ui/charts.js";
import {
  announce,
  button,
  card,
  controls,
  pythonLine,
  rateControl,
  t,
  toggle,
  write,
  h,
} from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { pythonKey, pythonMask } from "../ui/python.js";
import { run } from "../ui/runner.js";
import { currentSeed, onSeed, root } from "../ui/seed.js";

const UNITS = 100;
const MASKS = 1000;
const CALM = 450; // ms from mask to mask: what changes faster flickers
const SITE = "hidden";

export function scaleCard() {
  const state = {
    rate: 0.4,
    step: 0,
    off: false,
    counts: new Map(),
    masks: 0,
    stop: null,
    shown: 0,
  };
  const units = cells(10, 10);
  const sums = h("dl", { class: "sums" });
  const line = pythonLine();
  const bits = h("p", { class: "bits" });
  const total = h("p", { class: "note" });

  const maskAt = (step) => keepMask(siteKey(root(), { step, site: SITE }), state.rate, [10, 10]);
  const keptOf = (mask) => mask.reduce((sum, kept) => sum + kept, 0);
  const scale = () => scaleOf(threshold(state.rate));

  const histogram = chart(250, (plot) => {
    const most = Math.max(10, ...state.counts.values());
    const top = most * 1.1;
    plot.axes({
      x: [0, 200],
      y: [0, top],
      xTicks:
        plot.width < 420
          ? [0, 50, 100, 150, 200]
          : [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200],
      yTicks: ticksUpTo(top),
      xLabel: say("scaleX"),
      yLabel: say("scaleY"),
    });
    for (const [kept, number] of state.counts) {
      plot.bar((kept - 0.4) * scale(), (kept + 0.4) * scale(), number, "blue");
      plot.bar(kept - 0.4, kept + 0.4, number, "orange");
    }
    plot.mark(100, "ink dashed");
    plot.describe(state.masks ? say("scaleHistogram", state.masks, ...means()) : say("scaleEmpty"));
  });

  function means() {
    let sum = 0;
    for (const [kept, number] of state.counts) sum += kept * number;
    const mean = sum / state.masks;
    return [mean.toFixed(1), (mean * scale()).toFixed(1)];
  }

  /** Draws all of it after a change; while masks are counted, a mask only now and then. */
  function draw() {
    const now = performance.now();
    if (!state.stop || now - state.shown > CALM) {
      state.shown = now;
      drawMask();
    }
    const limit = threshold(state.rate);
    const facts = [limit.threshold, 2 ** (16 * limit.digits), scale()];
    write(
      total,
      state.masks
        ? say("scaleMeans", state.masks, ...means(), ...facts)
        : say("scaleLaw", ...facts),
    );
    histogram.redraw();
  }

  function drawMask() {
    const mask = state.off ? new Uint8Array(UNITS).fill(1) : maskAt(state.step);
    const kept = keptOf(mask);
    const factor = state.off ? 1 : scale();
    // The area of a cell is its value, as far as there is room.
    units.show(say("scaleUnits", kept, factor.toFixed(3)), (i) =>
      mask[i]
        ? { style: "blue", side: Math.min(0.96, 0.66 * Math.sqrt(factor)) }
        : { style: "dropped", side: 0.24 },
    );
    const rows = state.off
      ? [["scaleOff", UNITS, "ink"]]
      : [
          ["scaleOff", UNITS, "ink"],
          ["scaleUnscaled", kept, "orange"],
          ["scaleScaled", kept * factor, "blue"],
        ];
    sums.replaceChildren(
      ...rows.flatMap(([name, value, style]) => sumRow(say(name), value, style)),
    );
    const key = pythonKey(currentSeed(), state.step, SITE);
    line.show(
      state.off
        ? `jdropout.dropout(None, jnp.ones((10, 10)), ${state.rate}, deterministic=True)`
        : pythonMask(key, state.rate, [10, 10]),
    );
    write(bits, state.off ? say("scaleNoBits") : say("bits", maskHex(mask)));
  }

  function count() {
    state.step += 1;
    const kept = keptOf(maskAt(state.step));
    state.counts.set(kept, (state.counts.get(kept) ?? 0) + 1);
    state.masks += 1;
    return state.masks < MASKS;
  }

  function pause() {
    const { stop } = state;
    state.stop = null;
    stop?.();
    onoff();
  }

  function clear() {
    pause();
    Object.assign(state, { step: 0, masks: 0 });
    state.counts.clear();
    draw();
  }

  const next = button("scaleNext", () => {
    pause();
    count();
    draw();
    const kept = keptOf(maskAt(state.step));
    announce(say("scaleDrawn", kept, (kept * scale()).toFixed(1)));
  });
  const start = button(
    "scaleRun",
    () => {
      if (state.stop) return pause();
      if (state.masks >= MASKS) clear();
      state.stop = run(
        count,
        draw,
        () => {
          state.stop = null;
          onoff();
          draw();
          announce(say("scaleHistogram", state.masks, ...means()));
        },
        4,
      );
      onoff();
    },
    { class: "primary" },
  );
  const onoff = () => {
    write(start, say(state.stop ? "pause" : "scaleRun"));
    next.disabled = start.disabled = state.off;
  };
  const off = toggle("deterministic", (checked) => {
    pause();
    state.off = checked;
    onoff();
    draw();
    announce(
      checked
        ? say("scaleNoBits")
        : say(
            "scaleDrawn",
            keptOf(maskAt(state.step)),
            (keptOf(maskAt(state.step)) * scale()).toFixed(1),
          ),
    );
  });
  const rate = rateControl({
    value: state.rate,
    onvalue: (value) => {
      state.rate = value;
      clear();
    },
  });

  onSeed(clear);
  onLanguage(() => {
    onoff();
    draw();
  });
  return card(
    "scale",
    controls(
      rate.root,
      off.root,
      h("div", { class: "buttons" }, start, next, button("clear", clear)),
    ),
    h(
      "div",
      { class: "pair" },
      h(
        "div",
        { class: "narrow" },
        units.root,
        legend(["blue", t("span", "kept")], ["dropped", t("span", "dropped"), "small"]),
      ),
      h(
        "div",
        {},
        sums,
        histogram.root,
        legend(
          ["orange", t("span", "scaleUnscaled")],
          ["blue", t("span", "scaleScaled")],
          ["ink dashed", t("span", "scaleOff"), "line"],
        ),
      ),
    ),
    total,
    line.root,
    bits,
  );
}

function sumRow(name, value, style) {
  const bar = h("span", { class: `bar ${style}`, "aria-hidden": "true" });
  bar.style.width = `${Math.min(100, value / 2)}%`;
  const shown = Number.isInteger(value) ? String(value) : value.toFixed(1);
  return [h("dt", {}, name), h("dd", {}, h("span", { class: "track" }, bar), h("b", {}, shown))];
}

function ticksUpTo(top) {
  const step = [5, 10, 20, 50, 100, 200, 500].find((size) => top / size <= 5) ?? 1000;
  return Array.from({ length: Math.floor(top / step) + 1 }, (_, i) => i * step);
}
