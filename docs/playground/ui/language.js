// Texts in the reader's language. Each text is a string, or a function of what it mentions.

import { EN } from "../text/en.js";
import { ZH } from "../text/zh.js";

const TEXTS = { en: EN, "zh-Hans": ZH };
const STORED = "jdropout-playground-language";
const listeners = [];
let language = chosen();

/** The language of the address (#en, #zh), of the last visit, or of the browser. */
function chosen() {
  const asked = /[#&?](?:lang=)?(en|zh)\b/.exec(location.search + location.hash)?.[1];
  const wanted = asked ?? stored() ?? navigator.language;
  return wanted.startsWith("zh") ? "zh-Hans" : "en";
}

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // not allowed here: the browser's language will do
  }
}

export function say(name, ...details) {
  const text = TEXTS[language][name];
  return typeof text === "function" ? text(...details) : text;
}

export function currentLanguage() {
  return language;
}

export function setLanguage(next) {
  language = next;
  try {
    localStorage.setItem(STORED, next);
  } catch {
    // it lasts as long as the page
  }
  listeners.forEach((listener) => listener());
}

/** Calls a function now, and whenever the language changes. */
export function onLanguage(listener) {
  listeners.push(listener);
  listener();
}
