// Runs many short steps without blocking the page.

import { calm } from "./dom.js";

const BUDGET = 12; // ms of a frame of 16

/**
 * Calls `step` until it returns false, and `draw` after every frame, or, for those who want little
 * motion, at the end. Returns a function that stops it.
 */
export function run(step, draw, ended, mostPerFrame = Infinity) {
  let stopped = false;
  const frame = () => {
    if (stopped) return;
    const end = performance.now() + (calm.matches ? 50 : BUDGET);
    let more = true;
    for (let i = 0; more && performance.now() < end && (calm.matches || i < mostPerFrame); i++) {
      more = step();
    }
    if (!calm.matches || !more) draw();
    if (more) next(frame);
    else ended();
  };
  next(frame);
  return () => {
    stopped = true;
    draw();
  };
}

function next(frame) {
  // No frames come while a page is hidden; a training need not wait for them.
  if (calm.matches || document.hidden) setTimeout(frame, 0);
  else requestAnimationFrame(frame);
}
