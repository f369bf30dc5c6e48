// The thinned networks that masks sample, side by side.

import { siteKey } from "../laws/keys.js";
import { keepMask } from "../laws/mask.js";
import {
  announce,
  button,
  card,
  controls,
  h,
  pythonLine,
  rateControl,
  s,
  t,
  write,
} from "../ui/dom.js";
import { legend } from "../ui/charts.js";
import { onLanguage, say } from "../ui/language.js";
import { pythonKey, pythonMask } from "../ui/python.js";
import { currentSeed, onSeed, root } from "../ui/seed.js";

const HIDDEN = 5;
const SHOWN = 8;
const SITES = ["hidden1", "hidden2"];
const LAYERS = [2, HIDDEN, HIDDEN, 1];

export function stripCard() {
  const state = { rate: 0.4, first: 0, seen: new Set() };
  const list = h("ol", { class: "strip" });
  const note = h("p", { class: "note" });
  const line = pythonLine();

  const masksAt = (step) =>
    SITES.map((site) => [...keepMask(siteKey(root(), { step, site }), state.rate, [HIDDEN])]);

  function draw() {
    const items = Array.from({ length: SHOWN }, (_, i) => {
      const masks = masksAt(state.first + i);
      const text = masks.map((mask) => mask.join("")).join(" ");
      state.seen.add(text);
      const title = say("stripStep", state.first + i);
      return h(
        "li",
        {},
        network(masks, say("stripNetwork", text)),
        h("span", {}, title),
        h("code", { translate: "no" }, text),
      );
    });
    list.replaceChildren(...items);
    write(note, say("stripSeen", state.first + SHOWN, state.seen.size, 2 ** (2 * HIDDEN)));
    line.show(pythonMask(pythonKey(currentSeed(), state.first, SITES[0]), state.rate, [HIDDEN]));
  }

  function restart() {
    state.first = 0;
    state.seen.clear();
    draw();
  }

  const rate = rateControl({
    value: state.rate,
    onvalue: (value) => {
      state.rate = value;
      restart();
    },
  });
  const next = button(
    "stripNext",
    () => {
      state.first += SHOWN;
      draw();
      announce(note.textContent);
    },
    { class: "primary" },
  );

  onSeed(restart);
  onLanguage(draw);
  return card(
    "strip",
    controls(rate.root, h("div", { class: "buttons" }, next, button("restart", restart))),
    list,
    legend(["blue", t("span", "kept"), "point"], ["hollow", t("span", "stripDropped"), "point"]),
    note,
    line.root,
  );
}

function network(masks, describe) {
  const place = (layer, unit) => [12 + layer * 32, 12 + ((unit + 0.5) / LAYERS[layer]) * 96];
  const alive = (layer, unit) =>
    layer === 0 || layer === LAYERS.length - 1 || masks[layer - 1][unit];
  const edges = [];
  const units = [];
  LAYERS.forEach((count, layer) => {
    for (let unit = 0; unit < count; unit++) {
      const [x, y] = place(layer, unit);
      const kept = alive(layer, unit);
      units.push(
        s("circle", {
          class: kept ? (layer % 3 ? "blue" : "ink-fill") : "hollow",
          cx: x,
          cy: y,
          r: 6,
        }),
      );
      if (layer === LAYERS.length - 1) continue;
      for (let next = 0; next < LAYERS[layer + 1]; next++) {
        const [x2, y2] = place(layer + 1, next);
        const live = kept && alive(layer + 1, next);
        if (live) edges.push(s("line", { class: "edge", x1: x, y1: y, x2, y2 }));
      }
    }
  });
  return s(
    "svg",
    { role: "img", viewBox: "0 0 120 120", "aria-label": describe },
    ...edges,
    ...units,
  );
}
