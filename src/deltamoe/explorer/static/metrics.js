/** What can colour the tokens: one number a token, with its scale and its words. */

import { halfLife } from "./derive.js";
import { exact, tokens } from "./draw/number.js";
import { extent, scale } from "./draw/scale.js";

/**
 * @typedef {Object} Metric
 * @property {ArrayLike<number>} values one a token
 * @property {import("./draw/scale.js").Scale} scale
 * @property {string} name @property {string} unit
 * @property {(value: number) => string} format
 */

export const METRICS = /** @type {[string, string][]} */ ([
  ["surprise", "surprise"], ["expert", "dominant expert"], ["entropy", "router entropy"], ["half_life", "mean half-life"], ["change", "memory change"],
]);

/** The layer itself if it has the part, else the nearest that has. @param {import("./trace.js").Trace} trace @param {string} array @param {number} layer */
export function nearestLayer(trace, array, layer) {
  const layers = trace.entries.get(array)?.layers ?? [];
  return layers.toSorted((/** @type {number} */ a, /** @type {number} */ b) => Math.abs(a - layer) - Math.abs(b - layer))[0];
}

/** Mean over the last axis. @param {import("./trace.js").Numbers} numbers @param {(v: number) => number} [of] */
export function means(numbers, of = (v) => v) {
  return Float32Array.from({ length: numbers.shape[0] }, (_, i) => {
    const row = numbers.row(i);
    let sum = 0;
    for (const value of row) sum += of(value);
    return sum / row.length;
  });
}

/**
 * @param {import("./trace.js").Trace} trace @param {string} id @param {number} layer
 * @returns {Promise<Metric | null>} null where no layer has it
 */
export async function metricOf(trace, id, layer) {
  const at = (/** @type {string} */ array) => nearestLayer(trace, array, layer);
  if (id === "expert") {
    const where = at("router.expert_ids");
    if (where === undefined) return null;
    const values = (await trace.array("router.expert_ids", where)).column(0);
    return { values, scale: scale("viridis", [0, Math.max(1, trace.config.moe.num_experts - 1)]), name: `first expert, layer ${where}`, unit: "expert", format: (v) => `expert ${v}` };
  }
  if (id === "entropy") {
    const where = at("router.entropy");
    if (where === undefined) return null;
    const values = (await trace.array("router.entropy", where)).data;
    return { values, scale: scale("cividis", extent(values)), name: `router entropy, layer ${where}`, unit: "nats", format: exact };
  }
  if (id === "half_life") {
    const where = at("kda.half_life");
    if (where === undefined) return null;
    const decay = means(await trace.array("kda.decay_mean", where));
    const values = decay.map(halfLife);
    return { values, scale: scale("cividis", extent(values), "log"), name: `mean half-life, layer ${where}`, unit: "tokens", format: tokens };
  }
  if (id === "change") {
    const where = at("kda.change_norm");
    if (where === undefined) return null;
    const values = means(await trace.array("kda.change_norm", where));
    return { values, scale: scale("cividis", [0, extent(values)[1]]), name: `memory change, layer ${where}`, unit: "Frobenius norm", format: exact };
  }
  const values = (await trace.array("tokens.surprise")).data;
  return { values, scale: scale("cividis", [0, extent(values)[1]]), name: "surprise", unit: "nats", format: exact };
}
