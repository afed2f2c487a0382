/** Bars: lying for named candidates, standing for many counts. Each has its exact number on hover. */

import { h, s } from "./dom.js";
import { exact } from "./number.js";
import { ticks } from "./scale.js";
import { explain } from "./tooltip.js";

/**
 * Lying bars, one a row, as buttons if they can be picked.
 * @param {{label: string, value: number, text: string, lines: import("./tooltip.js").Lines, isLit?: boolean, mark?: string, pick?: () => void, title?: string}[]} rows
 * @param {number} most the value of a full bar
 */
export function lyingBars(rows, most) {
  return h("div", { class: "bars" }, ...rows.map((row) => explain(
    h(row.pick ? "button" : "div", { class: `bar${row.isLit ? " is-lit" : ""}`, on: row.pick ? { click: row.pick } : {}, type: row.pick ? "button" : null, "aria-label": row.title },
      h("span", { class: "bar-label" }, row.label),
      h("span", { class: "bar-track" }, h("span", { class: "bar-fill", style: { width: `${(100 * Math.max(0, row.value)) / (most || 1)}%` } })),
      h("span", { class: "bar-value" }, row.text),
      h("span", { class: "bar-mark" }, row.mark ?? "")),
    () => row.lines)));
}

/**
 * Standing bars over an index, with a line such as the fair share.
 * @param {ArrayLike<number>} values
 * @param {Object} o
 * @param {number} o.width @param {number} o.height @param {string} o.unit
 * @param {(index: number) => import("./tooltip.js").Lines} o.lines
 * @param {(index: number) => string} [o.className]
 * @param {{value: number, text: string}} [o.line] @param {number} [o.most] @param {(index: number) => void} [o.pick]
 * @param {string} [o.axis] @param {ArrayLike<number>} [o.marks] a second number for each bar, drawn as a line across it
 */
export function standingBars(values, { width, height, unit, lines, className, line, most, pick, axis = "", marks }) {
  const left = 44;
  const bottom = 34;
  const top = 14;
  const high = most ?? Math.max(line?.value ?? 0, ...Array.from(values), 1e-12) * 1.06;
  const across = (width - left - 8) / Math.max(1, values.length);
  const low = Math.min(0, ...Array.from(marks ?? []));
  const y = (/** @type {number} */ value) => top + ((height - top - bottom) * (high - value)) / (high - low);
  const every = [1, 2, 5, 10, 20, 50].find((step) => step * across >= 26) ?? 100;
  return s("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}` },
    ...ticks(low, high, 4).filter((t) => t <= high).map((t) => s("g", { class: "tick" },
      s("line", { x1: left, x2: width - 8, y1: y(t), y2: y(t) }),
      s("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, exact(t)))),
    s("text", { x: 4, y: 10, class: "axis-title" }, unit),
    ...Array.from(values, (value, i) => explain(s("rect", {
      x: left + i * across + Math.min(1, across * 0.1), y: y(value), width: Math.max(0.6, across - Math.min(2, across * 0.2)), height: Math.max(0, y(0) - y(value)),
      class: `column ${className?.(i) ?? ""}`, "data-index": i, on: pick ? { click: () => pick(i) } : {},
    }), () => lines(i))),
    ...Array.from(marks ?? [], (value, i) => s("line", { class: "column-mark", x1: left + i * across, x2: left + (i + 1) * across - 1, y1: y(value), y2: y(value) })),
    ...Array.from(values, (_, i) => i % every === 0 && s("text", { x: left + (i + 0.5) * across, y: height - bottom + 14, "text-anchor": "middle", class: "tick-text" }, i)),
    s("text", { x: left + (width - left) / 2, y: height - 4, "text-anchor": "middle", class: "axis-title" }, axis),
    line && s("g", { class: "fair-line" },
      s("line", { x1: left, x2: width - 8, y1: y(line.value), y2: y(line.value) }),
      s("text", { x: width - 10, y: y(line.value) - 4, "text-anchor": "end" }, line.text)));
}
