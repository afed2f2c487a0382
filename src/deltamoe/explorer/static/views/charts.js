/** The charts of training: which numbers of a record each shows, and how two runs share its axes. */

import { h } from "../draw/dom.js";
import { lineChart, lineColour } from "../draw/line.js";
import { count, exact, percent, short } from "../draw/number.js";
import { legend } from "../draw/legend.js";
import { extent, scale } from "../draw/scale.js";
import { explain } from "../draw/tooltip.js";
import { evenness, layersOf, numberOr, shares, smoothed } from "../training.js";

/** @typedef {import("../training.js").Run} Run */
/** @typedef {import("../training.js").Step} Step */
/** @typedef {{name: string, of: (record: Step, layer: number) => number, isSmooth?: boolean, isDots?: boolean, className?: string}} Line */
/**
 * @typedef {Object} Quantity
 * @property {string} id @property {string} title @property {string} unit @property {string} words
 * @property {Line[]} lines @property {string} [field] by layer: where the layers stand in a record
 * @property {"log"} [kind] @property {(value: number) => string} [format]
 * @property {(run: Run) => [string, number] | null} [level] a line across, with its name
 */

const median = (/** @type {number[]} */ values) => (values.length ? values.toSorted((a, b) => a - b)[values.length >> 1] : NaN);
const overLoad = (/** @type {(each: number[]) => number} */ of) => (/** @type {Step} */ { load }) => {
  const each = Object.values(load ?? {}).flatMap(shares);
  return each.length ? of(each) : NaN;
};
const ofLayer = (/** @type {string} */ field, /** @type {(value: any) => number} */ of = numberOr) => (/** @type {Step} */ record, /** @type {number} */ layer) => of(record[field]?.[layer]);

/** @type {Quantity[]} */
export const QUANTITIES = [
  { id: "loss", title: "Loss", unit: "nats a token", words: "Of the training tokens before each update, and of held-out text whenever it was measured.",
    lines: [{ name: "training", of: ({ loss }) => numberOr(loss), isSmooth: true }, { name: "validation", of: (record) => numberOr(record.validation_loss), isDots: true }] },
  { id: "bits", title: "Validation", unit: "bits a byte", words: "Of held-out text; does not depend on the tokenizer, so other models may stand beside it.",
    lines: [{ name: "validation", of: (record) => numberOr(record.validation_bits_per_byte), isDots: true }] },
  { id: "rate", title: "Speed", unit: "tokens/s", words: "Tokens of a step over its seconds.", format: short, lines: [{ name: "tokens/s", of: (record) => numberOr(record.tokens_per_s), isSmooth: true }] },
  { id: "lr", title: "Learning rate", unit: "of this step", words: "AdamW's, and Muon's for the matrices it updates.",
    lines: [{ name: "lr", of: ({ lr }) => numberOr(lr) }, { name: "muon_lr", of: (record) => numberOr(record.muon_lr), className: "is-dotted" }] },
  { id: "gradient", title: "Gradient norm", unit: "global L2 norm, before clipping", words: "The line across is where it is clipped.", kind: "log",
    lines: [{ name: "gradient norm", of: (record) => numberOr(record.grad_norm), isSmooth: true }], level: ({ config }) => (config?.optimizer?.clip_norm ? ["clipped at", config.optimizer.clip_norm] : null) },
  { id: "max_vio", title: "MaxVio", unit: "above the fair share", words: "How far the busiest expert of a layer is above the mean; 0 is perfect balance.", field: "max_vio", lines: [{ name: "", of: ofLayer("max_vio"), isSmooth: true }] },
  { id: "utilisation", title: "Utilisation", unit: "fair shares", words: "Tokens of an expert over the fair share, over all layers: the busiest, the median and the idlest expert. 1 is fair, 0 is dead.",
    lines: [{ name: "busiest", of: overLoad((each) => Math.max(...each)), isSmooth: true }, { name: "median", of: overLoad(median), isSmooth: true, className: "is-dotted" }, { name: "idlest", of: overLoad((each) => Math.min(...each)), isSmooth: true, className: "is-dashed" }],
    level: ({ records }) => (records.some(({ load }) => load) ? ["fair share", 1] : null) },
  { id: "evenness", title: "Entropy of the load", unit: "share of ln E", words: "The entropy of a layer's load over that of a perfectly fair one: 1 is even, 0 is one expert for everything.", field: "load", lines: [{ name: "", of: ofLayer("load", evenness), isSmooth: true }] },
  { id: "dead", title: "Dead experts", unit: "experts", words: "Experts of a layer that no token of the step chose.", field: "dead_experts", format: (v) => (Number.isInteger(v) ? count(v) : exact(v)), lines: [{ name: "", of: ofLayer("dead_experts") }] },
  { id: "half_life", title: "Half-life of KDA's memory", unit: "tokens", words: "Median over heads and channels, at decay logits of zero: after so many tokens half of what was written is left.", kind: "log", field: "half_life",
    lines: [{ name: "", of: ofLayer("half_life", (life) => numberOr(life?.median)) }] },
  { id: "memory_norm", title: "Memory", unit: "mean Frobenius norm of a head", words: "Of KDA's memories at the ends of the step's sequences.", field: "memory_norm", lines: [{ name: "", of: ofLayer("memory_norm"), isSmooth: true }] },
  { id: "balance", title: "Balance loss", unit: "nats a token", words: "The weighted sum of the balance losses.", lines: [{ name: "balance loss", of: (record) => record.balance_loss || NaN, isSmooth: true }] },
  { id: "dropped", title: "Dropped", unit: "assignments", words: "Turned away because an expert was full.", lines: [{ name: "dropped", of: (record) => record.num_dropped || NaN }] },
  { id: "machine", title: "Share of the machine", unit: "share of its matmul", words: "The model's FLOPs over what a square matrix product reached on the machine when the run started.", format: percent,
    lines: [{ name: "share", of: (record) => numberOr(record.matmul_fraction), isSmooth: true }] },
];

const MOST_NAMES = 6;
const MARGIN = 0.05;
const isKnown = (/** @type {number[]} */ values) => values.some((v) => Number.isFinite(v));

/**
 * The lines of one quantity. A run's colour is its own where there is one line for the whole model;
 * by layer the colour is the layer's, and the second run's lines are dashed.
 * @param {Quantity} quantity @param {Run[]} runs @param {"step" | "tokens"} axis @param {number} weight
 */
function seriesOf({ lines, field }, runs, axis, weight) {
  const layers = field ? layersOf(runs, field) : [0];
  return runs.flatMap((run, r) => {
    const steps = run.records.map((record) => record.step);
    const x = run.records.map((record) => numberOr(record[axis]));
    return layers.flatMap((layer, l) => lines.flatMap((line) => {
      const raw = run.records.map((record) => line.of(record, layer));
      if (!isKnown(raw)) return [];
      const colour = field ? lineColour(l, layers.length) : `var(--run-${r})`;
      const name = (runs.length > 1 ? `${run.name}: ` : "") + (field ? `layer ${layer}` : line.name);
      const className = line.isDots ? "is-dots" : `${field && r ? "is-dashed" : ""} ${line.className ?? ""}`;
      if (line.isDots) {
        const measured = x.map((_, i) => i).filter((i) => Number.isFinite(raw[i]));
        return [{ line, name, x: measured.map((i) => x[i]), y: measured.map((i) => raw[i]), colour, className }];
      }
      if (!line.isSmooth || !weight) return [{ line, name, x, y: raw, colour, className }];
      const mean = { line, name: `${name}, smoothed`, x, y: smoothed(steps, raw, weight), colour, className };
      return field ? [mean] : [{ line, name, x, y: raw, colour, className: "is-faint" }, mean];
    }));
  });
}

/**
 * One chart; null where no run has a number for it.
 * @param {Quantity} quantity @param {Run[]} runs
 * @param {{axis: "step" | "tokens", weight: number, width: number, xDomain: [number, number], flags: any[], hover: (x: number | null) => void}} o
 */
export function chartOf(quantity, runs, { axis, weight, width, xDomain, flags, hover }) {
  /** @type {any[]} */
  const series = seriesOf(quantity, runs, axis, weight);
  if (!series.length) return null;
  const levels = runs.map((run) => quantity.level?.(run)).filter((level) => level);
  for (const [name, y] of new Map(/** @type {[string, number][]} */ (levels))) series.push({ isLevel: true, name, x: xDomain, y: [y, y], colour: "var(--ink-faint)", className: "is-dashed" });
  const chart = lineChart(series, {
    width, height: 190, xTitle: axis, yTitle: quantity.unit, kind: quantity.kind, yFormat: quantity.format, xFormat: axis === "tokens" ? short : count, xDomain, yDomain: quantity.kind === "log" ? undefined : room(series), flags, hover, hasNames: false,
  });
  const layers = quantity.field ? layersOf(runs, quantity.field) : [];
  return {
    element: h("section", { class: "figure chart-figure", dataset: { chart: quantity.id } },
      h("div", { class: "figure-head" }, explain(h("h3", { tabindex: 0 }, quantity.title), () => [quantity.title, quantity.words, ["unit", quantity.unit]]), names(quantity, series, layers)), chart.element),
    point: chart.point,
  };
}

/** A little more than what the lines cover; never below 0 for what cannot be. @param {any[]} series @returns {[number, number]} */
function room(series) {
  const [low, high] = series.map((one) => extent(one.y)).reduce(([a, b], [c, d]) => [Math.min(a, c), Math.max(b, d)]);
  const size = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const margin = MARGIN * (high - low > 1e-6 * size ? high - low : size); // a mean of equal numbers differs in its last digits
  return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

/** What the lines are: layers by colour, or lines by their strokes; nothing where there is one. @param {Quantity} quantity @param {any[]} series @param {number[]} layers */
function names(quantity, series, layers) {
  if (layers.length > MOST_NAMES) return legend(scale("viridis", [layers[0], /** @type {number} */ (layers.at(-1))]), "layer", "");
  const key = (/** @type {string} */ colour, /** @type {string} */ name, className = "") => h("span", {}, h("i", { class: className, style: { "border-color": colour } }), name);
  const drawn = quantity.lines.filter((line) => series.some((one) => one.line === line));
  const levels = series.filter((one) => one.isLevel);
  return h("div", { class: "keys-of" },
    layers.length ? layers.map((layer, l) => key(lineColour(l, layers.length), `layer ${layer}`)) : drawn.length > 1 && drawn.map((line) => key("var(--ink-soft)", line.name, line.isDots ? "is-dots" : line.className)),
    levels.map((level) => key(level.colour, `${level.name} ${exact(level.y[0])}`, "is-dashed")));
}
