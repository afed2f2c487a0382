/**
 * A map of rows and columns on a canvas. Only the columns in sight are drawn, so 2,048 tokens scroll
 * as easily as 20; marks lie above the canvas, so a pixel always has the colour of its number.
 */

import { h, show } from "./dom.js";
import { hideTooltip, showTooltip } from "./tooltip.js";

const [ROW_GAP, TICK_GAP] = [12, 34]; // pixels between two numbers beside the rows, under the columns
const TICK_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500];

/**
 * @typedef {Object} HeatmapOptions
 * @property {number} rows
 * @property {number} columns
 * @property {(row: number, column: number) => number} value
 * @property {import("./scale.js").Scale} scale
 * @property {string} label what the map shows, for those who do not see it
 * @property {(row: number, column: number) => import("./tooltip.js").Lines} lines of the tooltip
 * @property {(row: number) => string} [rowLabel]
 * @property {(column: number) => string} [columnLabel] default its number
 * @property {number} [origin] what the first column counts as, so that round places are named; default 0
 * @property {string} [rowTitle] @property {string} [columnTitle]
 * @property {(row: number, column: number) => void} [pick]
 * @property {(row: number, column: number) => void} [hover] @property {() => void} [leave]
 * @property {number} [width] pixels to fill @property {number} [height] pixels to fill
 * @property {number} [least] narrowest column @property {number} [most] widest column
 * @property {number} [leastRow] @property {number} [mostRow]
 */

/** @param {HeatmapOptions} o */
export function heatmap(o) {
  const { rows, columns } = o;
  const across = Math.max(o.least ?? 4, Math.min(o.most ?? 22, Math.floor((o.width ?? 480) / columns)));
  const down = Math.max(o.leastRow ?? 3, Math.min(o.mostRow ?? 20, Math.floor((o.height ?? 320) / rows)));
  const canvas = /** @type {HTMLCanvasElement} */ (h("canvas", { class: "heatmap-canvas", role: "img", "aria-label": o.label }));
  const column = h("div", { class: "heatmap-column", hidden: true });
  const row = h("div", { class: "heatmap-row", hidden: true });
  const ticks = h("div", { class: "heatmap-ticks", "aria-hidden": "true", style: { width: `${columns * across}px` } });
  const step = TICK_STEPS.find((one) => one * across >= TICK_GAP) ?? columns;
  const area = h("div", { class: "heatmap-area", style: { width: `${columns * across}px`, height: `${rows * down}px` } }, canvas, column, row);
  const scroller = h("div", { class: "heatmap-scroller" }, area, ticks);
  const every = TICK_STEPS.find((one) => one * down >= ROW_GAP) ?? rows;
  const names = h("div", { class: "heatmap-names", style: { height: `${rows * down}px` } },
    ...Array.from({ length: Math.ceil(rows / every) }, (_, i) => h("span", {
      style: { top: `${(i * every + 0.5) * down}px` },
    }, o.rowLabel ? o.rowLabel(i * every) : i * every)));
  const element = h("div", { class: "heatmap" },
    o.rowTitle && h("div", { class: "heatmap-row-title" }, o.rowTitle), names,
    h("div", { class: "heatmap-body" }, scroller, o.columnTitle && h("div", { class: "heatmap-column-title" }, o.columnTitle)));

  function draw() {
    const width = Math.min(scroller.clientWidth || o.width || 480, columns * across);
    const ratio = devicePixelRatio || 1;
    const first = Math.max(0, Math.floor(scroller.scrollLeft / across));
    const last = Math.min(columns, first + Math.ceil(width / across) + 1);
    if (last <= first || !rows) return;
    canvas.width = (last - first) * across * ratio;
    canvas.height = rows * down * ratio;
    canvas.style.width = `${(last - first) * across}px`;
    canvas.style.height = `${rows * down}px`;
    canvas.style.left = `${first * across}px`;
    canvas.dataset.first = String(first);
    canvas.dataset.across = String(across);
    canvas.dataset.down = String(down);
    show(ticks, ...Array.from({ length: last - first }, (_, i) => first + i).filter((c) => (c + (o.origin ?? 0)) % step === 0).map((c) => h("span", { style: { left: `${(c + 0.5) * across}px` } }, o.columnLabel ? o.columnLabel(c) : c)));
    const small = new OffscreenCanvas(last - first, rows);
    const cells = new ImageData(last - first, rows);
    let at = 0;
    for (let r = 0; r < rows; r++) {
      for (let c = first; c < last; c++, at += 4) {
        const value = o.value(r, c);
        if (Number.isNaN(value)) continue;
        const [red, green, blue] = o.scale.rgb(value);
        cells.data[at] = red;
        cells.data[at + 1] = green;
        cells.data[at + 2] = blue;
        cells.data[at + 3] = 255;
      }
    }
    /** @type {any} */ (small.getContext("2d")).putImageData(cells, 0, 0);
    const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  }

  /** @param {PointerEvent | MouseEvent} event @returns {[number, number] | null} */
  function place(event) {
    const bounds = area.getBoundingClientRect();
    const c = Math.floor((event.clientX - bounds.left) / across);
    const r = Math.floor((event.clientY - bounds.top) / down);
    return r >= 0 && r < rows && c >= 0 && c < columns ? [r, c] : null;
  }

  let wanted = 0;
  scroller.addEventListener("scroll", () => {
    cancelAnimationFrame(wanted);
    wanted = requestAnimationFrame(draw);
  });
  area.addEventListener("pointermove", (/** @type {any} */ event) => {
    const at = place(event);
    if (!at) return;
    showTooltip(event, o.lines(...at));
    o.hover?.(...at);
  });
  area.addEventListener("pointerleave", () => {
    hideTooltip();
    o.leave?.();
  });
  area.addEventListener("click", (/** @type {any} */ event) => {
    const at = place(event);
    if (at) o.pick?.(...at);
  });
  requestAnimationFrame(draw);

  return {
    element,
    draw,
    /** Frame a column and bring it in sight; null frames none. @param {number | null} index */
    markColumn(index) {
      column.hidden = index === null;
      if (index === null) return;
      column.style.left = `${index * across}px`;
      column.style.width = `${across}px`;
      const left = index * across;
      if (left < scroller.scrollLeft || left + across > scroller.scrollLeft + scroller.clientWidth) {
        scroller.scrollLeft = left - scroller.clientWidth / 2;
      }
    },
    /** Frame a row; null frames none. @param {number | null} index */
    markRow(index) {
      row.hidden = index === null;
      if (index === null) return;
      row.style.top = `${index * down}px`;
      row.style.height = `${down}px`;
    },
  };
}
