// The page: a header, the cards, and what is exact.

import { bandCard } from "./cards/band.js";
import { galleryCard } from "./cards/gallery.js";
import { keysCard } from "./cards/keys.js";
import { mistakesCard } from "./cards/mistakes.js";
import { nestedCard } from "./cards/nested.js";
import { scaleCard } from "./cards/scale.js";
import { schedulesCard } from "./cards/schedules.js";
import { stripCard } from "./cards/strip.js";
import { h, labelled, pythonLine, t, wholeControl } from "./ui/dom.js";
import { currentLanguage, onLanguage, say, setLanguage } from "./ui/language.js";
import { currentSeed, setSeed } from "./ui/seed.js";

const CARDS = {
  scale: scaleCard,
  strip: stripCard,
  band: bandCard,
  mistakes: mistakesCard,
  schedules: schedulesCard,
  nested: nestedCard,
  keys: keysCard,
  gallery: galleryCard,
};

function languageButtons() {
  const buttons = [
    ["en", "English"],
    ["zh-Hans", "中文"],
  ].map(([language, name]) =>
    h(
      "button",
      {
        type: "button",
        lang: language,
        "data-language": language,
        onclick: () => setLanguage(language),
      },
      name,
    ),
  );
  onLanguage(() => {
    document.documentElement.lang = currentLanguage();
    document.title = say("title");
    for (const each of buttons)
      each.setAttribute("aria-pressed", String(each.dataset.language === currentLanguage()));
  });
  return labelled(h("div", { class: "languages", role: "group" }, ...buttons), "language");
}

function header() {
  const seed = wholeControl({
    name: "seed",
    value: String(currentSeed()),
    limit: 2n ** 32n,
    onvalue: setSeed,
  });
  const imports = pythonLine();
  imports.show("import jax, jax.numpy as jnp, jdropout, jdropout.schedules");
  return h(
    "header",
    {},
    h("div", { class: "top" }, t("h1", "title"), languageButtons()),
    t("p", "lead", { class: "lead" }),
    h(
      "div",
      { class: "pair" },
      h("div", {}, seed.root, t("p", "seedNote", { class: "note" })),
      h("div", {}, t("p", "importsNote", { class: "note" }), imports.root),
    ),
    labelled(
      h(
        "nav",
        {},
        h(
          "ol",
          {},
          ...Object.keys(CARDS).map((id) => h("li", {}, t("a", `${id}Title`, { href: `#${id}` }))),
        ),
      ),
      "contents",
    ),
  );
}

function footer() {
  return h(
    "footer",
    {},
    t("h2", "exactTitle"),
    h(
      "div",
      { class: "pair" },
      h("div", {}, t("h3", "exactYes"), t("p", "exactYesText")),
      h("div", {}, t("h3", "exactNo"), t("p", "exactNoText")),
    ),
    home ? t("a", "home", { href: home }) : null,
  );
}

const { home } = document.body.dataset; // of the documentation, where there is one beside the page
const skip = t("a", "skip", { class: "skip", href: "#main" });
const main = h(
  "main",
  { id: "main", tabindex: "-1" },
  ...Object.values(CARDS).map((make) => make()),
);
document.body.replaceChildren(skip, header(), main, footer());
