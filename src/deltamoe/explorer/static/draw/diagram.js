/** The pieces of a diagram: boxes, arrows, nodes. Knows nothing of models. */

import { s } from "./dom.js";
import { strip } from "./strip.js";
import { explain } from "./tooltip.js";

const HEAD = 5;

/**
 * @typedef {Object} Box
 * @property {number} x @property {number} y @property {number} width @property {number} height
 * @property {string} title @property {string} [sub] a second, smaller line
 * @property {string} [kind] a class @property {boolean} [isLit]
 * @property {import("./tooltip.js").Lines} [lines] @property {() => void} [pick] @property {string} [name] for tests and the keyboard
 * @property {Omit<Parameters<typeof strip>[1], "x" | "y" | "width" | "height"> & {values: ArrayLike<number>, height?: number}} [strip]
 */

/** @param {Box} b */
export function box({ x, y, width, height, title, sub, kind = "", isLit, lines, pick, name, strip: shown }) {
  const high = shown ? shown.height ?? 12 : 0;
  const textHeight = height - (shown ? high + 6 : 0);
  const middle = y + textHeight / 2 + 4 - (sub ? 6.5 : 0);
  const body = s("rect", { class: "body", x, y, width, height, rx: Math.min(6, height / 4) });
  const group = s("g", {
    class: `box ${kind}${isLit ? " is-lit" : ""}${pick ? " can-pick" : ""}`, "data-name": name ?? title, on: pick ? { click: pick } : {},
    ...(pick ? { tabindex: 0, role: "button", "aria-label": title } : {}),
  },
  body,
  s("text", { class: "title", x: x + width / 2, y: middle, "text-anchor": "middle" }, title),
  sub && s("text", { class: "sub", x: x + width / 2, y: middle + 14, "text-anchor": "middle" }, sub),
  shown && strip(shown.values, { ...shown, x: x + 6, y: y + height - high - 5, width: width - 12, height: high }));
  if (pick) group.addEventListener("keydown", (/** @type {any} */ event) => event.key === "Enter" && pick());
  if (lines) explain(body, () => lines);
  return group;
}

/**
 * A path with a head at its end, drawn through corners.
 * @param {[number, number][]} points @param {{isLit?: boolean, width?: number, hasHead?: boolean}} [options]
 */
export function arrow(points, { isLit = false, width, hasHead = true } = {}) {
  const [x, y] = points[points.length - 1];
  const [fromX, fromY] = points[points.length - 2];
  const angle = Math.atan2(y - fromY, x - fromX);
  const wing = (/** @type {number} */ turn) => `${(x - HEAD * 1.5 * Math.cos(angle + turn)).toFixed(1)},${(y - HEAD * 1.5 * Math.sin(angle + turn)).toFixed(1)}`;
  const className = isLit ? " is-lit" : "";
  return s("g", {},
    s("path", { class: `arrow${className}`, d: points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join(""), "stroke-width": width }),
    hasHead && s("path", { class: `arrow-head${className}`, d: `M${x} ${y}L${wing(0.45)}L${wing(-0.45)}Z` }));
}

/** A round node with a sign. @param {number} x @param {number} y @param {string} sign @param {import("./tooltip.js").Lines} lines */
export function node(x, y, sign, lines, radius = 11) {
  return explain(s("g", { class: "node" }, s("circle", { cx: x, cy: y, r: radius }), s("text", { x, y: y + 4.5 }, sign)), () => lines);
}

/** Small words beside an arrow. @param {number} x @param {number} y @param {string} text @param {string} [anchor] */
export const label = (x, y, text, anchor = "start") => s("text", { class: "label", x, y, "text-anchor": anchor }, text);

/** The drawing itself. @param {number} width @param {number} height @param {string} name @param {...any} parts */
export const diagram = (width, height, name, ...parts) => s("svg", { class: "diagram", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name }, ...parts);
