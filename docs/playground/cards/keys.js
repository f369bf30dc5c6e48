// Keys from the seed, the step and the site.

import { atSite, siteKey, stepKey } from "../laws/keys.js";
import { keepMask, maskHex } from "../laws/mask.js";
import { cells, legend } from "../ui/charts.js";
import { checkSite } from "../ui/checks.js";
import {
  announce,
  button,
  card,
  controls,
  h,
  pythonLine,
  rateControl,
  t,
  textControl,
  wholeControl,
  write,
} from "../ui/dom.js";
import { onLanguage, say } from "../ui/language.js";
import { pythonKey, pythonMask } from "../ui/python.js";
import { currentSeed, onSeed, root } from "../ui/seed.js";

const SHAPE = [10, 10];

const hex = (words) => words.map((word) => word.toString(16).padStart(8, "0")).join(" ");

export function keysCard() {
  const state = { rate: 0.4, step: 3n, microbatch: 0n, site: ["decoder", 3, "mlp"] };
  const body = h("tbody", {});
  const note = h("p", { class: "note" });
  const line = pythonLine();
  const bits = h("p", { class: "bits" });
  const pictures = [cells(...SHAPE), cells(...SHAPE)];
  const captions = [h("figcaption", {}), h("figcaption", {})];

  const maskAt = (step) => {
    const key = siteKey(root(), { step, site: state.site, microbatch: Number(state.microbatch) });
    return keepMask(key, state.rate, SHAPE);
  };

  function draw() {
    const microbatch = Number(state.microbatch);
    const inStep = stepKey(root(), { step: state.step, microbatch });
    const levels = [
      [say("keysRoot", currentSeed()), root()],
      [say("keysStep", state.step, microbatch), inStep],
      ...state.site.map((part, i) => [
        say("keysPart", part),
        atSite(inStep, state.site.slice(0, i + 1)),
      ]),
    ];
    body.replaceChildren(
      ...levels.map(([name, words]) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, name),
          h("td", {}, h("code", { translate: "no" }, hex(words))),
        ),
      ),
    );
    const masks = [maskAt(state.step), maskAt(state.step + 1n)];
    const same = masks[0].reduce((sum, kept, i) => sum + (kept === masks[1][i] ? 1 : 0), 0);
    pictures.forEach((picture, index) => {
      const step = state.step + BigInt(index);
      const kept = masks[index].reduce((sum, each) => sum + each, 0);
      picture.show(say("keysPicture", step, kept), (i) =>
        masks[index][i] ? { style: "blue" } : { style: "dropped", side: 0.24 },
      );
      write(captions[index], say("keysCaption", step));
    });
    const expected = 100 * (state.rate ** 2 + (1 - state.rate) ** 2);
    write(note, say("keysNote", same, expected.toFixed(0)));
    line.show(
      pythonMask(
        pythonKey(currentSeed(), state.step, state.site, state.microbatch),
        state.rate,
        SHAPE,
      ),
    );
    write(bits, say("bits", maskHex(masks[0])));
  }

  const set = (name) => (value) => {
    state[name] = value;
    draw();
  };
  const step = wholeControl({
    name: "step",
    value: "3",
    limit: 2n ** 63n - 1n,
    onvalue: set("step"),
  });
  const microbatch = wholeControl({
    name: "microbatch",
    value: "0",
    limit: 2n ** 32n,
    onvalue: set("microbatch"),
  });
  const site = textControl({
    name: "site",
    value: "decoder/3/mlp",
    check: checkSite,
    onvalue: set("site"),
  });
  const rate = rateControl({ value: state.rate, onvalue: set("rate") });
  const next = button(
    "keysNext",
    () => {
      if (state.step < 2n ** 63n - 2n) state.step += 1n;
      step.show(String(state.step));
      draw();
      announce(note.textContent);
    },
    { class: "primary" },
  );

  onSeed(draw);
  onLanguage(draw);
  return card(
    "keys",
    controls(
      step.root,
      microbatch.root,
      site.root,
      rate.root,
      h("div", { class: "buttons" }, next),
    ),
    h(
      "div",
      { class: "pair" },
      h(
        "div",
        {},
        h(
          "table",
          { class: "words" },
          t("caption", "keysTable"),
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              t("th", "keysLevel", { scope: "col" }),
              t("th", "keysWords", { scope: "col" }),
            ),
          ),
          body,
        ),
        note,
      ),
      h(
        "div",
        { class: "two" },
        ...pictures.map((picture, i) => h("figure", {}, picture.root, captions[i])),
      ),
    ),
    legend(["blue", t("span", "kept")], ["dropped", t("span", "dropped"), "small"]),
    line.root,
    bits,
  );
}
