/** Experts over tokens: who was visited when, and what it counted. */

import { choice } from "../draw/dom.js";
import { heatmap } from "../draw/heatmap.js";
import { legend, swatch } from "../draw/legend.js";
import { exact, visible } from "../draw/number.js";
import { scale } from "../draw/scale.js";
import { figure } from "../panel.js";

let shown = "weights"; // what the reader looked at last

/** @type {import("../panel.js").View} */
export const expertsTokens = {
  id: "experts",
  title: "Experts × tokens",
  explain: "Each column is a token, each row an expert of this layer. A cell is lit where the token visited the expert; the colour is the weight its answer had.",
  docs: "docs/moe.md, Many tokens",
  needs: "trace",
  over: "router.expert_ids",
  async draw({ trace, store, layer, width, app }) {
    const [ids, weights] = await trace.arrays(["router.expert_ids", "router.expert_weights"], layer);
    const scores = trace.has("router.scores", layer) ? await trace.array("router.scores", layer) : null;
    const [T, A] = ids.shape;
    const E = trace.config.moe.num_experts;
    const isScores = shown === "scores" && scores !== null;
    const weight = new Float32Array(E * T).fill(NaN);
    for (let t = 0; t < T; t++) for (let a = 0; a < A; a++) weight[ids.at(t, a) * T + t] = weights.at(t, a);
    const most = isScores ? Math.max(scores.entry.greatest, 1e-9) : Math.max(...weights.data.subarray(0, 1), weights.entry.greatest);
    const colour = scale("viridis", [0, most]);
    const value = isScores ? (/** @type {number} */ e, /** @type {number} */ t) => scores.at(t, e) : (/** @type {number} */ e, /** @type {number} */ t) => weight[e * T + t];
    const map = heatmap({
      rows: E, columns: T, value, scale: colour, width: width - 60, height: 440, leastRow: 3,
      label: `${isScores ? "scores" : "weights"} of ${E} experts over ${T} tokens`, rowTitle: "expert", columnTitle: "token →",
      lines: (e, t) => [`Expert ${e}, token ${t} “${visible(trace.tokens[t].text)}”`,
        ["weight", Number.isNaN(weight[e * T + t]) ? "0: not chosen" : exact(weight[e * T + t])],
        ...(scores ? [/** @type {[string, string]} */ (["score", exact(scores.at(t, e))])] : [])],
      pick: (e, t) => store.set({ token: t, expert: e }),
      hover: (_, t) => store.set({ preview: t }),
      leave: () => store.set({ preview: null }),
    });
    map.markRow(store.get().expert);
    const stop = store.subscribe((state, changed) => changed.has("expert") && map.markRow(state.expert));
    return {
      element: figure(isScores ? "Score of every expert" : "Weight of the chosen experts",
        [choice("show", [["weights", "weights of the chosen"], ["scores", "scores of all"]], isScores ? "scores" : "weights", (v) => { shown = v; app.panel.draw(); }),
          legend(colour, isScores ? "score" : "weight", isScores ? "0 to 1" : "factor"), !isScores && swatch("swatch-ground", "not chosen")], map.element),
      step: (token) => map.markColumn(token),
      stop,
    };
  },
};
