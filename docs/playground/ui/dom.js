// Elements, and the controls that all cards share.

import { checkWhole, checkRate } from "./checks.js";
import { onLanguage, say } from "./language.js";

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const h = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

export const s = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** Sets an element's text, in which `backticks` mark code. */
export function write(element, text) {
  const parts = text.split("`");
  element.replaceChildren(
    ...parts.map((part, i) => (i % 2 ? h("code", { translate: "no" }, part) : part)),
  );
}

/** An element with a text that follows the language. */
export function t(tag, name, attributes = {}) {
  const element = h(tag, attributes);
  onLanguage(() => write(element, say(name)));
  return element;
}

export function labelled(element, name) {
  onLanguage(() => element.setAttribute("aria-label", say(name)));
  return element;
}

const status = h("p", { role: "status", class: "unseen" });

/** Tells those who listen to the page: what came of an action, when it has ended. */
export function announce(text) {
  if (!status.isConnected) document.body.append(status);
  write(status, text);
}

export function button(name, action, attributes = {}) {
  return t("button", name, { type: "button", onclick: action, ...attributes });
}

export function toggle(name, onchange, checked = false) {
  const input = h("input", { type: "checkbox", role: "switch", checked });
  input.addEventListener("change", () => onchange(input.checked));
  return { root: h("label", { class: "toggle" }, input, t("span", name)), input };
}

let count = 0;

/** A text field that keeps its last good value, and says what is wrong with a bad one. */
function field(name, value, check, onvalue, attributes = {}) {
  const id = `field-${(count += 1)}`;
  const error = h("p", { class: "error", id: `${id}-error`, role: "alert" });
  const input = h("input", {
    id,
    type: "text",
    autocomplete: "off",
    spellcheck: "false",
    "aria-describedby": `${id}-error`,
    value,
    ...attributes,
  });
  const validate = () => {
    const result = check(input.value);
    input.setAttribute("aria-invalid", result.error ? "true" : "false");
    const text = result.error ? say(...result.error) : "";
    if (error.textContent !== text) error.textContent = text;
    return result;
  };
  input.addEventListener("input", () => {
    const result = validate();
    if (!result.error) onvalue(result.value);
  });
  onLanguage(validate);
  const show = (text) => {
    input.value = text;
    validate();
  };
  return { label: t("label", name, { for: id }), input, error, show };
}

/** A rate: a slider, and a field for any other number. */
export function rateControl({ name = "rate", value, low = 0, high = 1, onvalue }) {
  const slider = labelled(
    h("input", { type: "range", min: low, max: high, step: 0.01, value }),
    name === "rate" ? "rateSlider" : `${name}Slider`,
  );
  const text = field(
    name,
    value,
    (typed) => checkRate(typed, low, high),
    (rate) => {
      slider.value = rate;
      onvalue(rate);
    },
    { inputmode: "decimal", class: "short" },
  );
  slider.addEventListener("input", () => {
    text.show(slider.value);
    onvalue(Number(slider.value));
  });
  const root = h("div", { class: "control rate" }, text.label, slider, text.input, text.error);
  const show = (rate) => {
    slider.value = rate;
    text.show(String(rate));
  };
  return { root, show };
}

/** A whole number from 0 on, below `limit`, which is a BigInt. */
export function wholeControl({ name, value, limit, onvalue }) {
  const text = field(name, value, (typed) => checkWhole(name, typed, limit), onvalue, {
    inputmode: "numeric",
  });
  return {
    root: h("div", { class: "control" }, text.label, text.input, text.error),
    show: text.show,
  };
}

export function textControl({ name, value, check, onvalue }) {
  const text = field(name, value, check, onvalue);
  return {
    root: h("div", { class: "control" }, text.label, text.input, text.error),
    show: text.show,
  };
}

export function choice(name, options, value, onchange) {
  const id = `choice-${(count += 1)}`;
  const inputs = options.map((option) => {
    const input = h("input", { type: "radio", name: id, value: option, checked: option === value });
    input.addEventListener("change", () => onchange(option));
    return h("label", { class: "option" }, input, t("span", `${name}-${option}`));
  });
  return h("fieldset", { class: "choice" }, t("legend", name), ...inputs);
}

/** A line of Python to copy, which `show` sets. */
export function pythonLine() {
  const code = h("code", { class: "python", translate: "no" });
  const copy = button(
    "copy",
    async () => {
      const copied = await copyText(code);
      write(copy, say(copied ? "copied" : "selected"));
      announce(say(copied ? "copied" : "selected"));
      setTimeout(() => write(copy, say("copy")), 2000);
    },
    { class: "copy" },
  );
  return { root: h("div", { class: "line" }, code, copy), show: (text) => writePython(code, text) };
}

/** Sets a line of Python, which may be broken after a bracket. */
export function writePython(code, text) {
  const parts = text.split(/(?<=\()/);
  code.replaceChildren(...parts.flatMap((part, i) => (i ? [h("wbr", {}), part] : [part])));
}

async function copyText(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element); // the reader's own keys copy it then
    return false;
  }
}

export function card(id, ...children) {
  return h(
    "section",
    { class: "card", id, "aria-labelledby": `${id}-title` },
    t("h2", `${id}Title`, { id: `${id}-title` }),
    t("p", `${id}Try`, { class: "try" }),
    ...children,
  );
}

export function controls(...children) {
  return h("div", { class: "controls" }, ...children);
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");
