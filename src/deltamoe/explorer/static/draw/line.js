/** Lines over an axis, with a mark for the chosen place and the exact numbers under the pointer. */

import { h, s } from "./dom.js";
import { exact } from "./number.js";
import { extent, isDark, logTicks, scale, ticks } from "./scale.js";
import { hideTooltip, showTooltip } from "./tooltip.js";

/** @typedef {{name: string, x?: ArrayLike<number>, y: ArrayLike<number>, className?: string, colour?: string}} Series x, in order, defaults to 0, 1, 2 … */

/** So many pixels from the pointer's place a number still counts as being there. */
const NEAR = 5;
const MOST_LINES = 18;
const FLAG = "l7 3.5l-7 3.5z";
const FLAG_NAME = 180; // pixels there are for the text beside one

/** One colour for each of a few lines, in an order that survives grey. @param {number} index @param {number} of */
export const lineColour = (index, of) => scale("viridis", [0, 1]).at((isDark() ? 0.3 : 0.06) + (of < 2 ? 0.3 : (0.68 * index) / (of - 1)));

/**
 * @param {Series[]} series
 * @param {Object} o
 * @param {number} o.width @param {number} o.height
 * @param {string} o.xTitle @param {string} o.yTitle
 * @param {[number, number]} [o.xDomain] @param {[number, number]} [o.yDomain] @param {"linear" | "log"} [o.kind]
 * @param {(value: number) => string} [o.xFormat] @param {(value: number) => string} [o.yFormat]
 * @param {{x: number, text: string, className?: string, shape?: string}[]} [o.flags] events on the axis; the shape is a path from its upper left corner, 7 pixels high
 * @param {(x: number) => void} [o.pick] @param {(x: number | null) => void} [o.hover] the place under the pointer, null when it leaves
 * @param {boolean} [o.hasFlagNames] the flags' texts beside them; default false
 * @param {boolean} [o.hasNames] names beside the chart; default true
 */
export function lineChart(series, o) {
  const { width, height, kind = "linear", xFormat = exact, yFormat = exact } = o;
  const [left, right, top, bottom] = [54, 10, 20, 34];
  const [x0, x1] = o.xDomain ?? extent(series.flatMap(({ x, y }) => (x ? [x[0], x[x.length - 1]] : [0, y.length - 1])));
  let [y0, y1] = o.yDomain ?? series.map((one) => extent(kind === "log" ? Array.from(one.y).filter((v) => v > 0) : one.y)).reduce(([a, b], [c, d]) => [Math.min(a, c), Math.max(b, d)], [Infinity, -Infinity]);
  if (y0 === y1) [y0, y1] = kind === "log" ? [y0 / 2, y1 * 2] : [y0 - 0.5, y1 + 0.5];
  const moved = kind === "log" ? Math.log10 : (/** @type {number} */ v) => v;
  const px = (/** @type {number} */ x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (/** @type {number} */ y) => top + (1 - (moved(y) - moved(y0)) / (moved(y1) - moved(y0))) * (height - top - bottom);
  const yTicks = kind === "log" ? logTicks(y0, y1) : ticks(y0, y1, height < 180 ? 4 : 6);
  const path = (/** @type {Series} */ { x, y, className }) => {
    const isDots = className?.includes("is-dots");
    let d = "";
    let isDown = false;
    for (let i = 0; i < y.length; i++) {
      if (!Number.isFinite(y[i]) || (kind === "log" && y[i] <= 0)) { isDown = false; continue; }
      d += `${isDown ? "L" : "M"}${px(x ? x[i] : i).toFixed(1)} ${py(Math.min(y1, Math.max(y0, y[i]))).toFixed(1)}${isDots ? "h0" : ""}`;
      isDown = !isDots;
    }
    return d;
  };
  const colour = (/** @type {number} */ i) => series[i].colour ?? lineColour(i, series.length);
  const isClose = (/** @type {number} */ i) => i > 0 && Math.abs(px(/** @type {any[]} */ (o.flags)[i].x) - px(/** @type {any[]} */ (o.flags)[i - 1].x)) < FLAG_NAME;
  const mark = s("line", { class: "chart-mark", y1: top, y2: height - bottom, visibility: "hidden" });
  const cursor = s("line", { class: "chart-cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const chart = s("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${o.yTitle} over ${o.xTitle}` },
    ...yTicks.map((t) => s("g", { class: "tick" }, s("line", { x1: left, x2: width - right, y1: py(t), y2: py(t) }),
      s("text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, yFormat(t)))),
    ...ticks(x0, x1, Math.max(3, Math.floor(width / 90))).map((t) => s("text", { class: "tick-text", x: px(t), y: height - bottom + 15, "text-anchor": "middle" }, xFormat(t))),
    s("text", { class: "axis-title", x: 4, y: 11 }, o.yTitle),
    s("text", { class: "axis-title", x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, o.xTitle),
    ...(o.flags ?? []).map((flag, i) => s("g", { class: `flag ${flag.className ?? ""}` },
      s("line", { x1: px(flag.x), x2: px(flag.x), y1: top - 4, y2: height - bottom }), s("title", {}, flag.text), s("path", { d: `M${px(flag.x)} ${top - 6}${flag.shape ?? FLAG}` }),
      o.hasFlagNames && s("text", { x: px(flag.x) + 11, y: top + 1 + (isClose(i) ? 13 : 0) }, flag.text))),
    ...series.map((one, i) => s("path", { d: path(one), class: `line ${one.className ?? ""}`, stroke: colour(i) })),
    mark, cursor);
  const xOf = (/** @type {Series} */ { x }, /** @type {number} */ i) => (x ? x[i] : i);
  const nearest = (/** @type {Series} */ one, /** @type {number} */ at) => {
    let [low, high] = [0, one.y.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xOf(one, middle) < at) low = middle + 1;
      else high = middle;
    }
    return low > 0 && at - xOf(one, low - 1) < xOf(one, low) - at ? low - 1 : low;
  };
  const under = (/** @type {MouseEvent} */ event) => {
    const bounds = chart.getBoundingClientRect();
    const share = (event.clientX - bounds.left - left) / (width - left - right);
    return x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
  };
  const isNear = (/** @type {number} */ a, /** @type {number} */ b) => Math.abs(px(a) - px(b)) <= NEAR;
  /** @param {number | null} x */
  function point(x) {
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x === null) return;
    cursor.setAttribute("x1", String(px(x)));
    cursor.setAttribute("x2", String(px(x)));
  }
  /** What is known at a place: of every line the number there, and the events. @param {number} at @returns {import("./tooltip.js").Lines} */
  function linesAt(at) {
    const numbers = series.filter((one) => one.y.length).map((one) => {
      const i = nearest(one, at);
      const x = xOf(one, i);
      if (x !== at && !isNear(x, at)) return null;
      return /** @type {[string, string]} */ ([x === at ? one.name : `${one.name} at ${xFormat(x)}`, yFormat(one.y[i])]);
    }).filter((line) => line !== null);
    const events = (o.flags ?? []).filter((flag) => isNear(flag.x, at)).map((flag) => `⚑ ${flag.text}`);
    return [`${o.xTitle} ${xFormat(at)}`, ...numbers.slice(0, MOST_LINES), ...(numbers.length > MOST_LINES ? [`and ${numbers.length - MOST_LINES} more lines`] : []), ...events];
  }
  chart.addEventListener("pointermove", (/** @type {any} */ event) => {
    const wanted = under(event);
    const places = series.filter((one) => one.y.length).map((one) => xOf(one, nearest(one, wanted)));
    if (!places.length) return;
    const at = places.reduce((best, x) => (Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best));
    point(at);
    o.hover?.(at);
    showTooltip(event, linesAt(at));
  });
  chart.addEventListener("pointerleave", () => {
    point(null);
    o.hover?.(null);
    hideTooltip();
  });
  chart.addEventListener("click", (/** @type {any} */ event) => o.pick?.(Math.round(under(event))));
  const names = series.length > 1 && o.hasNames !== false && h("div", { class: "names" }, ...series.map((one, i) => h("span", { class: one.className ?? "" },
    h("i", { style: { background: colour(i) } }), one.name)));
  return {
    element: h("div", { class: "line-chart" }, names, chart),
    /** Show the pointer's line at a place, as when it is over another chart. */
    point,
    /** Mark a place on the axis. @param {number | null} x */
    mark(x) {
      mark.setAttribute("visibility", x === null ? "hidden" : "visible");
      if (x === null) return;
      mark.setAttribute("x1", String(px(x)));
      mark.setAttribute("x2", String(px(x)));
    },
  };
}
