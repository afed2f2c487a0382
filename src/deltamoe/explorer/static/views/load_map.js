/** The load of every expert of a layer over the steps of a run, as a map. */

import { choice } from "../draw/dom.js";
import { heatmap } from "../draw/heatmap.js";
import { legend } from "../draw/legend.js";
import { count, exact } from "../draw/number.js";
import { scale } from "../draw/scale.js";
import { figure } from "../panel.js";
import { layersOf, shares } from "../training.js";

const NAMES_WIDTH = 60;

/**
 * @param {import("../training.js").Run} run @param {{layer: number | null}} chosen @param {number} width
 * @param {(layer: number) => void} pick
 */
export function showLoad(run, chosen, width, pick) {
  const layers = layersOf([run], "load");
  if (!layers.length) return null;
  const layer = layers.includes(/** @type {number} */ (chosen.layer)) ? /** @type {number} */ (chosen.layer) : layers[layers.length - 1];
  const all = run.records.filter((record) => record.load?.[layer]);
  const every = Math.ceil(all.length / Math.max(1, width - NAMES_WIDTH));
  const records = all.filter((_, i) => i % every === 0);
  const each = records.map((record) => shares(record.load[layer]));
  const colour = scale("cividis", [0, 3]);
  const map = heatmap({
    rows: each[0].length, columns: records.length, value: (expert, i) => each[i][expert], scale: colour, width: width - NAMES_WIDTH, height: 220, least: 1, most: 12, mostRow: 14, columnLabel: (i) => count(records[i].step), origin: Math.round(records[0].step / every),
    label: `Load of the experts of layer ${layer} over the steps of ${run.name}`, rowTitle: "expert", columnTitle: `step →${every > 1 ? `, every ${every}th record` : ""}`,
    lines: (expert, i) => [`Step ${count(records[i].step)}, expert ${expert}`, ["fair shares", exact(each[i][expert])], ["tokens", count(records[i].load[layer][expert])]],
  });
  return figure(`Load of the experts, ${run.name}`, [legend(colour, "load", "fair shares, 3 and above alike"), choice("layer", layers.map((one) => [one, String(one)]), layer, (value) => pick(Number(value)))], map.element);
}
