// One key at two rates: the masks are nested.

import { siteKey } from "../laws/keys.js";
import { keepMask, maskHex } from "../laws/mask.js";
import { cells, legend } from "../ui/charts.js";
import { card, controls, h, pythonLine, rateControl, t, write } from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { pythonKey, pythonMask } from "../ui/python.js";
import { currentSeed, onSeed, root } from "../ui/seed.js";

const SHAPE = [12, 20];
const SITE = "nested";

export function nestedCard() {
  const state = { rates: [0.3, 0.6] };
  const picture = cells(...SHAPE);
  const note = h("p", { class: "note" });
  const lines = [pythonLine(), pythonLine()];
  const bits = [h("p", { class: "bits" }), h("p", { class: "bits" })];

  function draw() {
    const key = siteKey(root(), { step: 0, site: SITE });
    const [low, high] = [...state.rates].sort((a, b) => a - b);
    const masks = [low, high].map((rate) => keepMask(key, rate, SHAPE));
    const number = (test) =>
      masks[0].reduce((sum, kept, i) => sum + (test(kept, masks[1][i]) ? 1 : 0), 0);
    const facts = [
      number((a, b) => a && b),
      number((a, b) => a && !b),
      number((a, b) => !a && !b),
      number((a, b) => !a && b),
    ];
    picture.show(say("nestedPicture", low, high, ...facts), (i) => {
      if (masks[1][i]) return { style: "blue" };
      return masks[0][i] ? { style: "orange", side: 0.6 } : { style: "dropped", side: 0.24 };
    });
    write(note, say("nestedNote", low, high, ...facts));
    state.rates.forEach((rate, i) => {
      lines[i].show(pythonMask(pythonKey(currentSeed(), 0, SITE), rate, SHAPE));
      write(bits[i], say("bits", maskHex(keepMask(key, rate, SHAPE))));
    });
  }

  const both = ["rateA", "rateB"].map((name, i) =>
    rateControl({
      name,
      value: state.rates[i],
      onvalue: (value) => {
        state.rates[i] = value;
        draw();
      },
    }),
  );

  onSeed(draw);
  onLanguage(draw);
  return card(
    "nested",
    controls(both[0].root, both[1].root),
    h(
      "div",
      { class: "pair nested" },
      picture.root,
      h(
        "div",
        {},
        legend(
          ["blue", t("span", "nestedBoth")],
          ["orange", t("span", "nestedOne")],
          ["dropped", t("span", "nestedNone"), "small"],
        ),
        note,
      ),
    ),
    lines[0].root,
    bits[0],
    lines[1].root,
    bits[1],
  );
}
