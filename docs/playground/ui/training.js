// The button and the progress of a card that trains.

import { announce, button, h, t, write } from "./dom.js";
import { say } from "./language.js";
import { run } from "./runner.js";

/**
 * A training of `last` steps that `button` starts, pauses and repeats. The card gives the functions:
 * `steps` that are done, `one` more, `begin` again, and `draw`, which calls `show`.
 */
export function training(name, last, { steps, one, begin, draw, note }) {
  let stop = null;
  const progress = h("progress", { max: last, value: 0 });
  const step = h("span", {});

  function pause() {
    const running = stop;
    stop = null;
    running?.();
  }

  const start = button(
    name,
    () => {
      if (stop) return pause();
      if (steps() >= last) begin();
      stop = run(one, draw, () => {
        stop = null;
        draw();
        announce(note.textContent);
      });
      draw();
    },
    { class: "primary" },
  );

  function show() {
    progress.value = steps();
    write(step, say("stepOf", steps(), last));
    write(start, say(stop ? "pause" : steps() >= last ? "trainAgain" : name));
  }

  return {
    button: start,
    progress: h("label", { class: "progress" }, progress, step),
    running: () => stop !== null,
    pause,
    show,
  };
}
