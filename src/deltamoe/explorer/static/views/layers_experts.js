/** Layers over experts: where the load went in this text, against the fair share. */

import { standingBars } from "../draw/bars.js";
import { heatmap } from "../draw/heatmap.js";
import { legend, swatch } from "../draw/legend.js";
import { count, exact, percent } from "../draw/number.js";
import { scale } from "../draw/scale.js";
import { facts, figure } from "../panel.js";

/** Entropy in nats of counts. @param {ArrayLike<number>} counts */
export function entropy(counts) {
  const total = Array.from(counts).reduce((a, b) => a + b, 0);
  return -Array.from(counts).reduce((sum, n) => (n > 0 ? sum + (n / total) * Math.log(n / total) : sum), 0);
}

/** @type {import("../panel.js").View} */
export const layersExperts = {
  id: "load",
  title: "Layers × experts",
  explain: "How many tokens of this text visited each expert. The fair share is what each would get if all were equally busy; an expert nobody visited is dormant in this text, which does not make it dead.",
  docs: "docs/moe.md, Keeping them busy",
  needs: "trace",
  over: "experts.counts",
  depends: ["expert"],
  async draw({ trace, store, layer, width }) {
    const counts = await trace.array("experts.counts");
    const layers = counts.entry.layers;
    const [L, E] = counts.shape;
    const fair = (trace.numTokens * trace.config.moe.experts_per_token) / E;
    const colour = scale("viridis", [0, Math.max(counts.entry.greatest / fair, 1)]);
    const map = heatmap({
      rows: L, columns: E, value: (r, e) => counts.at(r, e) / fair, scale: colour, width: width - 60, height: 260, leastRow: 8, mostRow: 26, least: 3, most: 40,
      label: `load of ${E} experts in ${L} layers`, rowLabel: (r) => String(layers[r]), rowTitle: "layer", columnTitle: "expert →",
      lines: (r, e) => [`Layer ${layers[r]}, expert ${e}`, ["tokens", count(counts.at(r, e))], ["of the fair share", percent(counts.at(r, e) / fair)]],
      pick: (r, e) => store.set({ layer: layers[r], expert: e }),
    });
    const mine = counts.row(layers.indexOf(layer));
    const most = Math.max(...mine);
    map.markRow(layers.indexOf(layer));
    map.markColumn(store.get().expert);
    const evenness = entropy(mine) / Math.log(E);
    return {
      element: [
        figure("Load, every layer", legend(colour, "load", "times the fair share"), map.element),
        figure(`Load of layer ${layer}`, [swatch("swatch-line", `fair share, ${exact(fair)} tokens`), swatch("swatch-lit", "chosen expert")],
          standingBars(mine, {
            width, height: 190, unit: "tokens", axis: "expert", line: { value: fair, text: "" },
            className: (e) => (e === store.get().expert ? "is-lit" : mine[e] === 0 ? "is-none" : ""), pick: (e) => store.set({ expert: e }),
            lines: (e) => [`Expert ${e}`, ["tokens", count(mine[e])], ["of the fair share", percent(mine[e] / fair)]],
          })),
        facts([["dormant in this text", `${mine.filter((n) => n === 0).length} of ${E}`], ["MaxVio", exact(most / fair - 1)], ["entropy of the load", `${exact(entropy(mine))} nats`],
          ["of an even load", percent(evenness)], ["tokens × choices", `${count(mine.reduce((a, b) => a + b, 0))}`]]),
      ],
    };
  },
};
