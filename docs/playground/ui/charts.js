// Drawings: charts with axes, and cells of masks. They are as wide as their place, so that texts
// keep their size on a narrow screen.

import { h, s } from "./dom.js";

const MARGIN = { top: 14, right: 22, bottom: 44, left: 54 };

/** A place for a chart. `draw` is called with the chart's tools whenever it has to be drawn. */
export function chart(height, draw) {
  const root = h("div", { class: "chart" });
  const svg = s("svg", { role: "img", height });
  root.append(svg);
  let width = 0;
  const redraw = () => {
    if (width > 0) draw(tools(svg, width, height));
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now === width) return;
    width = now;
    redraw();
  }).observe(root);
  return { root, redraw };
}

function tools(svg, width, height) {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.replaceChildren();
  const inner = {
    width: width - MARGIN.left - MARGIN.right,
    height: height - MARGIN.top - MARGIN.bottom,
  };
  const id = `clip-${(clips += 1)}`;
  const plane = s("g", { "clip-path": `url(#${id})` });
  let at;
  return {
    width,
    describe: (text) => svg.setAttribute("aria-label", text),
    /** Axes over [low, high], with ticks and labels; everything else is drawn inside. */
    axes({ x, y, xTicks, yTicks, xLabel, yLabel }) {
      const place = (value, [low, high]) => (value - low) / (high - low);
      at = {
        x: (value) => MARGIN.left + inner.width * place(value, x),
        y: (value) => MARGIN.top + inner.height * (1 - place(value, y)),
      };
      const frame = { x: MARGIN.left, y: MARGIN.top, width: inner.width, height: inner.height };
      svg.append(s("clipPath", { id }, s("rect", frame)));
      const bottom = MARGIN.top + inner.height;
      for (const tick of xTicks) {
        const left = at.x(tick);
        svg.append(
          s("line", { class: "grid", x1: left, x2: left, y1: MARGIN.top, y2: bottom }),
          s(
            "text",
            { class: "tick", x: left, y: bottom + 16, "text-anchor": "middle" },
            String(tick),
          ),
        );
      }
      for (const tick of yTicks) {
        const top = at.y(tick);
        svg.append(
          s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: top, y2: top }),
          s(
            "text",
            { class: "tick", x: MARGIN.left - 7, y: top + 4, "text-anchor": "end" },
            String(tick),
          ),
        );
      }
      const middle = MARGIN.top + inner.height / 2;
      svg.append(
        s("line", {
          class: "axis",
          x1: MARGIN.left,
          x2: width - MARGIN.right,
          y1: bottom,
          y2: bottom,
        }),
        s(
          "text",
          {
            class: "axis-label",
            x: MARGIN.left + inner.width / 2,
            y: height - 6,
            "text-anchor": "middle",
          },
          xLabel,
        ),
        s(
          "text",
          {
            class: "axis-label",
            x: 13,
            y: middle,
            "text-anchor": "middle",
            transform: `rotate(-90 13 ${middle})`,
          },
          yLabel,
        ),
        plane,
      );
    },
    line(xs, ys, style) {
      const path = Array.from(
        xs,
        (x, i) => `${i ? "L" : "M"}${at.x(x).toFixed(1)} ${at.y(ys[i]).toFixed(1)}`,
      );
      plane.append(s("path", { class: `stroke ${style}`, d: path.join("") }));
    },
    band(xs, lows, highs, style) {
      const point = (x, y) => `${at.x(x).toFixed(1)} ${at.y(y).toFixed(1)}`;
      const there = Array.from(xs, (x, i) => point(x, highs[i]));
      const back = Array.from(xs, (x, i) => point(x, lows[i])).reverse();
      plane.append(s("path", { class: `area ${style}`, d: `M${[...there, ...back].join("L")}Z` }));
    },
    points(xs, ys, style) {
      xs.forEach((x, i) =>
        plane.append(s("circle", { class: style, cx: at.x(x), cy: at.y(ys[i]), r: 3.5 })),
      );
    },
    bar(left, right, value, style) {
      const [a, b] = [at.x(left), at.x(right)];
      const top = at.y(value);
      plane.append(
        s("rect", {
          class: style,
          x: a,
          y: top,
          width: Math.max(0.5, b - a),
          height: at.y(0) - top,
        }),
      );
    },
    mark(x, style) {
      const ends = { x1: at.x(x), x2: at.x(x), y1: MARGIN.top, y2: MARGIN.top + inner.height };
      plane.append(s("line", { class: `stroke ${style}`, ...ends }));
    },
  };
}

let clips = 0;

/**
 * A table of cells, `wide` times as wide as high. `show` gets a style for every cell, and its side as a part of the pitch, and a
 * description of the whole.
 */
export function cells(rows, columns, tileRows = 1, tileColumns = 1, { wide = 1, gap = 0.6 } = {}) {
  const width = wide * tileColumns * columns + gap * (tileColumns - 1);
  const height = tileRows * rows + gap * (tileRows - 1);
  const svg = s("svg", { role: "img", class: "cells", viewBox: `0 0 ${width} ${height}` });
  const all = [];
  for (let down = 0; down < tileRows; down++) {
    for (let across = 0; across < tileColumns; across++) {
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) {
          const x = across * (wide * columns + gap) + wide * (column + 0.5);
          const y = down * (rows + gap) + row + 0.5;
          const rect = s("rect", {});
          all.push({ rect, x, y });
          svg.append(rect);
        }
      }
    }
  }
  const show = (describe, look) => {
    svg.setAttribute("aria-label", describe);
    all.forEach((cell, i) => {
      const { style, side = 0.86, fill = null } = look(i);
      const looks = `${style} ${side} ${fill}`;
      if (cell.looks === looks) return; // most stay as they are while a slider moves
      cell.looks = looks;
      const { rect, x, y } = cell;
      rect.setAttribute("class", style);
      const breadth = side + wide - 1;
      rect.setAttribute("x", (x - breadth / 2).toFixed(3));
      rect.setAttribute("y", (y - side / 2).toFixed(3));
      rect.setAttribute("width", breadth.toFixed(3));
      rect.setAttribute("height", side.toFixed(3));
      rect.setAttribute("rx", (side * 0.16).toFixed(3));
      if (fill) rect.style.fill = fill;
      else rect.style.removeProperty("fill");
    });
  };
  return { root: svg, show, all };
}

/** A legend: pairs of a style and a text's element. */
export function legend(...entries) {
  return h(
    "ul",
    { class: "legend" },
    ...entries.map(([style, text, kind = "rect"]) => h("li", {}, swatch(style, kind), text)),
  );
}

function swatch(style, kind) {
  const shape = {
    rect: () => s("rect", { class: style, x: 3, y: 3, width: 12, height: 12, rx: 2 }),
    small: () => s("rect", { class: style, x: 6, y: 6, width: 6, height: 6, rx: 1 }),
    line: () => s("path", { class: `stroke ${style}`, d: "M0 9H24" }),
    point: () => s("circle", { class: style, cx: 9, cy: 9, r: 4 }),
    area: () => s("rect", { class: `area ${style}`, x: 0, y: 3, width: 24, height: 12 }),
  }[kind];
  const width = kind === "line" || kind === "area" ? 24 : 18;
  return s("svg", { "aria-hidden": "true", width, height: 18 }, shape());
}
