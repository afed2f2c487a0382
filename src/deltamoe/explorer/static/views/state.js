/** State and cache: what a text leaves in memory, and what of the model one token uses. */

import { lyingBars } from "../draw/bars.js";
import { h } from "../draw/dom.js";
import { lineChart } from "../draw/line.js";
import { bytes, count, percent, short } from "../draw/number.js";
import { facts, figure } from "../panel.js";

/** @type {import("../panel.js").View} */
export const state = {
  id: "state",
  title: "State and cache",
  explain: "KDA's state has one size whatever the length of the text; MLA's cache keeps a latent of every token. Of the parameters, a token uses only the experts it visits.",
  docs: "docs/mla.md, What a token leaves behind",
  needs: "trace",
  async draw({ trace, store, width }) {
    const { state_bytes: fixed, cache_bytes_per_token: each, crossover_tokens: crossover, parameters, flops_per_next_token: flops, weight_bytes: weights } = trace.summary.model;
    const now = trace.summary.bytes;
    const longest = Math.max(trace.numTokens, 2 * (crossover ?? 0), 16);
    const [size, unit] = Math.max(fixed, each * longest) >= 2 ** 21 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
    const x = Array.from({ length: 101 }, (_, i) => (longest * i) / 100);
    const chart = lineChart([
      { name: "fixed state of all KDA layers", x, y: x.map(() => fixed / size) },
      { name: "growing cache of all MLA layers", x, y: x.map((t) => (t * each) / size), className: "is-lit", colour: "var(--accent)" },
    ], {
      width, height: 230, xTitle: "tokens read", yTitle: `${unit} of one text`, hasFlagNames: true, xFormat: (v) => count(v), yDomain: [0, Math.max(fixed, each * longest) / size],
      flags: [{ x: trace.numTokens, text: `this trace: ${count(trace.numTokens)} tokens` }, ...(crossover ? [{ x: crossover, text: `cache as large as state: ${count(crossover)} tokens` }] : [])],
    });
    const parts = Object.keys(parameters.by_part).filter((part) => parameters.by_part[part] > 0);
    const most = Math.max(...parts.map((part) => parameters.by_part[part]));
    const layers = now.by_layer.map((/** @type {number} */ size, /** @type {number} */ layer) => ({
      label: `${layer} ${trace.layers[layer].mixer.toUpperCase()}`, value: size, text: bytes(size), isLit: trace.layers[layer].mixer === "mla",
      lines: /** @type {import("../draw/tooltip.js").Lines} */ ([`Layer ${layer}`, ["bytes after the last token", count(size)], ["", trace.layers[layer].mixer === "mla" ? "grows with every token" : "never grows"]]),
      pick: () => store.set({ layer, part: "mixer" }),
    }));
    return {
      element: [
        facts([["fixed state", bytes(fixed)], ["cache a token", bytes(each)], ["cache now", bytes(now.growing)], ["as large as the state at", crossover ? `${count(crossover)} tokens` : "never"], ["weights", bytes(weights)]]),
        figure("Bytes over the length of a text", null, chart.element),
        figure("Parameters, active of total", h("span", { class: "note" }, `${count(parameters.active)} of ${count(parameters.total)} (${percent(parameters.active / parameters.total)}); ${short(flops.active)} of ${short(flops.all_experts)} FLOPs a token`),
          h("div", { class: "bars parts" }, ...parts.map((part) => partBar(part, parameters.active_by_part[part], parameters.by_part[part], most)))),
        figure("Bytes by layer, after the last token", h("span", { class: "note" }, "lit: MLA, grows"), lyingBars(layers, Math.max(...now.by_layer))),
      ],
    };
  },
};

/** A bar within a bar, to the scale of the largest part. @param {string} part @param {number} active @param {number} total @param {number} most */
function partBar(part, active, total, most) {
  return h("div", { class: "bar", title: `${part}: one token uses ${count(active)} of ${count(total)} parameters`, dataset: { part, active, total } },
    h("span", { class: "bar-label" }, part),
    h("span", { class: "bar-track" }, h("span", { class: "bar-whole", style: { width: `${(100 * total) / most}%` } }, h("span", { class: "bar-active", style: { width: `${(100 * active) / total}%` } }))),
    h("span", { class: "bar-value" }, short(total)), h("span", { class: "bar-value" }, percent(active / total)));
}
