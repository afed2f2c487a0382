/** Sparse activation: how the router scores every expert for one token, and which few answer. */

import { standingBars } from "../draw/bars.js";
import { h, show } from "../draw/dom.js";
import { swatch } from "../draw/legend.js";
import { exact, visible } from "../draw/number.js";
import { figure } from "../panel.js";

const CLOSED = 65535;

/** @type {import("../panel.js").View} */
export const sparse = {
  id: "sparse",
  title: "Sparse activation",
  explain: "The router scores every expert for the token; the balance bias is added to choose and never to weigh. The best few answer, and their answers are summed by weight.",
  docs: "docs/moe.md, One token",
  needs: "trace",
  over: "router.expert_ids",
  depends: ["expert"],
  async draw({ trace, store, layer, width }) {
    const moe = trace.config.moe;
    const [ids, weights, norms, shared, bias] = await trace.arrays(["router.expert_ids", "router.expert_weights", "experts.norms", "experts.shared_norm", "router.balance_bias"], layer);
    const hasScores = trace.has("router.scores", layer);
    const [scores, ranks] = hasScores ? await trace.arrays(["router.scores", "router.ranks"], layer) : [];
    const most = hasScores && moe.scoring !== "sigmoid" ? Math.max(...[scores.entry.greatest]) : 1;
    const chart = h("div", {});
    const table = h("div", {});
    const element = [
      figure(`${moe.scoring === "sigmoid" ? "Scores: each expert on its own (sigmoid)" : "Scores: the experts compete (softmax)"}`,
        [swatch("swatch-lit", `chosen, ${moe.experts_per_token} of ${moe.num_experts}`), swatch("swatch-ground", "not chosen"), swatch("swatch-mark", "score with bias: this decides")], chart),
      figure("Who answers, and how much it counts", null, table),
    ];
    return {
      element,
      step(token) {
        const chosen = Array.from(ids.row(token));
        const weight = Array.from(weights.row(token));
        if (hasScores) {
          const row = scores.row(token);
          const chosenBy = Array.from(row, (score, e) => score + bias.data[e]);
          show(chart, standingBars(row, {
            width, height: 220, unit: "score", axis: "expert", most: Math.max(most, ...chosenBy) * 1.02, marks: chosenBy,
            className: (e) => (chosen.includes(e) ? "is-lit" : ""),
            pick: (e) => store.set({ expert: e }),
            lines: (e) => [`Expert ${e}`, ["score", exact(row[e])], ["balance bias", exact(bias.data[e])], ["score with bias", exact(row[e] + bias.data[e])],
              ["rank", ranks.at(token, e) === CLOSED ? "its group was closed" : `${ranks.at(token, e) + 1} of ${row.length}`],
              ["weight", chosen.includes(e) ? exact(weight[chosen.indexOf(e)]) : "0: not chosen"]],
          }));
        } else show(chart, h("p", { class: "note" }, trace.reason("router.scores", layer)));
        const cell = (/** @type {any} */ value) => h("td", {}, value);
        const runnerUp = hasScores ? ranks.row(token).findIndex((rank) => rank === chosen.length) : -1;
        const line = (/** @type {number} */ e, /** @type {number} */ place) => h("tr", { class: place < chosen.length ? (e === store.get().expert ? "is-lit" : "") : "note", dataset: { expert: e } },
          cell(place < chosen.length ? `expert ${e}` : `expert ${e}, next in line`), cell(place + 1),
          cell(hasScores ? exact(scores.at(token, e)) : "–"), cell(exact(bias.data[e])),
          cell(place < chosen.length ? exact(weight[place]) : "0"),
          cell(place < chosen.length ? exact(norms.at(token, place)) : "–"),
          cell(place < chosen.length ? exact(weight[place] * norms.at(token, place)) : "–"));
        const sum = weight.reduce((a, b) => a + b, 0);
        show(table, h("table", {},
          h("thead", {}, h("tr", {}, ...["", "rank", "score", "bias", "weight", "|answer|", "weight × |answer|"].map((name) => h("th", {}, name)))),
          h("tbody", {}, ...chosen.map(line), runnerUp >= 0 && line(runnerUp, chosen.length),
            moe.num_shared_experts > 0 && h("tr", {}, cell("shared expert"), cell("always"), cell("–"), cell("–"), cell("1"), cell(exact(shared.data[token])), cell(exact(shared.data[token]))),
            h("tr", { class: "is-sum" }, cell("sum of the weights"), cell(""), cell(""), cell(""), cell(exact(sum)), cell(""), cell(moe.renormalize ? `routed_scale = ${exact(moe.routed_scale)}` : "not renormalised")))),
        h("p", { class: "note" }, `Token ${token}, “${visible(trace.tokens[token].text)}”, layer ${layer}. |answer| is the L2 norm of what an expert gives back.`));
      },
    };
  },
};
