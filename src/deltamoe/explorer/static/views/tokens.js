/**
 * The token strip drives the page: hover shows a token, click pins it. Only the tokens in sight are in
 * the document, so a long text scrolls like a short one.
 */

import { button, choice, h, show } from "../draw/dom.js";
import { legend, swatch } from "../draw/legend.js";
import { count, exact, visible } from "../draw/number.js";
import { ink } from "../draw/scale.js";
import { explain, hideTooltip, showTooltip } from "../draw/tooltip.js";
import { METRICS, metricOf } from "../metrics.js";

const FONT = "13px ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const PADDING = 14;
const LEAST = 22;
const SPARE = 300;

/** Numbers the recorder found in two ways. @param {import("../trace.js").Trace} trace */
function checks(trace) {
  const all = trace.summary.checks ?? [];
  const held = all.filter((/** @type {any} */ check) => check.holds);
  return explain(h("span", { class: held.length === all.length ? "checks" : "checks is-broken", tabindex: 0 }, `${held.length} of ${all.length} checks hold`), () => [
    "Found in two ways while recording, largest difference",
    ...Object.entries(Object.groupBy(all, (/** @type {any} */ check) => check.name)).map(([name, some]) => /** @type {[string, string]} */ (
      [name, exact(Math.max(.../** @type {any[]} */ (some).map((check) => check.difference ?? Infinity)))])),
  ]);
}

/** What was not recorded, and why. @param {import("../trace.js").Trace} trace */
const leftOut = (trace) => trace.summary.left_out?.length > 0 && explain(h("span", { class: "checks is-broken", tabindex: 0 }, "some layers are not recorded in full"), () => [
  ...trace.summary.left_out.map((/** @type {any} */ one) => /** @type {[string, string]} */ ([`layers ${one.layers.join(", ")}`, `${one.arrays.join(", ")}: ${one.reason}`]))]);

/** From a branch to the text it left. @param {import("../trace.js").Trace} trace @param {((id: string, token: number) => void) | null} goTo */
function wayBack(trace, goTo) {
  const { trace: id, token } = trace.summary.source.branched_from ?? {};
  return goTo && typeof id === "string" && Number.isInteger(token) && button(`↩ before the branch at token ${token}`, () => goTo(id, token), { class: "quiet" });
}

/**
 * @param {HTMLElement} root @param {import("../trace.js").Trace} trace @param {import("../store.js").Store} store
 * @param {((id: string, token: number) => void) | null} goTo shows another trace that is kept; null where none is
 */
export function showTokens(root, trace, store, goTo) {
  const pen = /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
  pen.font = FONT;
  const texts = trace.tokens.map((/** @type {any} */ token) => visible(token.text).slice(0, 40));
  const widths = texts.map((/** @type {string} */ text) => Math.max(LEAST, Math.ceil(pen.measureText(text).width) + PADDING));
  const lefts = [0];
  for (const width of widths) lefts.push(lefts[lefts.length - 1] + width + 2);

  const line = h("div", { class: "token-line", style: { width: `${lefts[texts.length]}px` } });
  const scroller = h("div", { class: "token-scroller", tabindex: 0, "aria-label": "Tokens; arrow keys step" }, line);
  const words = h("div", { class: "token-words" });
  /** @type {import("../metrics.js").Metric | null} */
  let metric = null;
  /** @type {Map<number, HTMLElement>} */
  let chips = new Map();

  /** @param {number} i */
  function chip(i) {
    const colour = metric ? metric.scale.rgb(metric.values[i]) : null;
    const element = h("button", {
      type: "button", tabindex: -1, class: `token${trace.tokens[i].is_prompt ? "" : " is-written"}${trace.tokens[i].is_special ? " is-special" : ""}`,
      dataset: { index: i }, "aria-label": `token ${i}: ${texts[i]}`,
      style: { left: `${lefts[i]}px`, width: `${widths[i]}px`, ...(colour ? { background: `rgb(${colour.join(", ")})`, color: ink(colour) } : {}) },
    }, texts[i]);
    if (i === store.get().token) element.classList.add("is-pinned");
    return element;
  }

  /** @param {boolean} isFresh */
  function draw(isFresh) {
    if (isFresh) {
      line.replaceChildren();
      chips = new Map();
    }
    const from = scroller.scrollLeft - SPARE;
    const to = scroller.scrollLeft + scroller.clientWidth + SPARE;
    for (const [i, element] of chips) {
      if (lefts[i + 1] < from || lefts[i] > to) {
        element.remove();
        chips.delete(i);
      }
    }
    let low = 0;
    let high = texts.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lefts[middle + 1] < from) low = middle + 1;
      else high = middle;
    }
    for (let i = low; i < texts.length && lefts[i] <= to; i++) {
      if (chips.has(i)) continue;
      const element = chip(i);
      chips.set(i, element);
      line.append(element);
    }
  }

  function pin() {
    const { token } = store.get();
    for (const [i, element] of chips) element.classList.toggle("is-pinned", i === token);
    if (lefts[token] < scroller.scrollLeft + 20 || lefts[token + 1] > scroller.scrollLeft + scroller.clientWidth - 20) {
      scroller.scrollLeft = lefts[token] - scroller.clientWidth / 2;
    }
  }

  async function colour() {
    const { metric: id, layer } = store.get();
    try {
      const found = await metricOf(trace, id, layer);
      if (store.get().metric !== id) return;
      metric = found;
    } catch (error) {
      show(words, h("span", { class: "checks is-broken", role: "alert" }, /** @type {Error} */ (error).message), button("Try again", colour));
      return;
    }
    show(words,
      choice("colour by", METRICS, id, (value) => store.set({ metric: value })),
      metric ? legend(metric.scale, metric.name, metric.unit, metric.format) : h("span", { class: "legend" }, "This model has no such layer."),
      swatch("swatch-prompt", "read"), swatch("swatch-written", "written by the model"),
      h("span", { class: "token-count" }, wayBack(trace, goTo), checks(trace), leftOut(trace), `${count(texts.length)} tokens`));
    draw(true);
  }

  const over = (/** @type {any} */ event) => {
    const index = event.target.closest?.(".token")?.dataset.index;
    return index === undefined ? null : Number(index);
  };
  line.addEventListener("pointermove", (/** @type {any} */ event) => {
    const i = over(event);
    if (i === null) return;
    const token = trace.tokens[i];
    showTooltip(event, [visible(token.text), ["token", `${i} of ${texts.length}`], ["id", String(token.id)], ["", token.is_prompt ? "read" : "written by the model"],
      ...(metric ? [/** @type {[string, string]} */ ([metric.name, `${metric.format(metric.values[i])}${metric.format === exact ? ` ${metric.unit}` : ""}`])] : [])]);
    store.set({ preview: i });
  });
  line.addEventListener("pointerleave", () => {
    hideTooltip();
    store.set({ preview: null });
  });
  line.addEventListener("click", (event) => {
    const i = over(event);
    if (i !== null) store.set({ token: i, preview: null });
  });
  let wanted = 0;
  scroller.addEventListener("scroll", () => {
    cancelAnimationFrame(wanted);
    wanted = requestAnimationFrame(() => draw(false));
  });
  scroller.addEventListener("wheel", (event) => {
    if (Math.abs(event.deltaY) <= Math.abs(event.deltaX)) return;
    const before = scroller.scrollLeft;
    scroller.scrollLeft += event.deltaY;
    if (scroller.scrollLeft !== before) event.preventDefault();
  }, { passive: false });

  show(root, scroller, words);
  colour().then(pin);
  const watcher = new ResizeObserver(() => draw(false));
  watcher.observe(scroller);
  const stop = store.subscribe((_, changed) => {
    if (changed.has("metric") || changed.has("layer")) colour();
    if (changed.has("token")) pin();
  });
  const recolour = () => draw(true);
  addEventListener("themechange", recolour);
  return () => {
    stop();
    watcher.disconnect();
    removeEventListener("themechange", recolour);
  };
}
