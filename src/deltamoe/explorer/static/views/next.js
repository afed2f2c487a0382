/** The next token: what could have come, what did, and what the layers below would have said. */

import { lyingBars } from "../draw/bars.js";
import { h, show } from "../draw/dom.js";
import { legend } from "../draw/legend.js";
import { exact, probability, visible } from "../draw/number.js";
import { ink, scale } from "../draw/scale.js";
import { explain } from "../draw/tooltip.js";
import { facts, figure } from "../panel.js";

/** @type {import("../panel.js").View} */
export const next = {
  id: "next",
  title: "Next token",
  explain: "The model's probabilities for what follows the chosen token, at temperature 1 and before any sampling rule. Click another candidate and the text goes on from there. The logit lens asks the head after every layer what it would answer if that layer were the last.",
  docs: "docs/generation.md",
  needs: "trace",
  async draw({ trace, store, app }) {
    const [ids, probabilities, entropy, surprise, ranks] = await trace.arrays(["next.ids", "next.probabilities", "next.entropy", "tokens.surprise", "tokens.ranks"]);
    const hasLens = trace.has("lens.ids");
    const [lensIds, lensProbabilities] = hasLens ? await trace.arrays(["lens.ids", "lens.probabilities"]) : [];
    const colour = scale("cividis", [0, hasLens ? lensProbabilities.entry.greatest : 1]);
    const bars = h("div", {});
    const lens = h("div", {});
    const canBranch = app.canBranch();
    return {
      element: [bars, lens],
      step(token) {
        const came = trace.tokens[token + 1];
        const candidates = Array.from(ids.row(token));
        const chance = probabilities.row(token);
        const sum = chance.reduce((a, b) => a + b, 0);
        const rows = candidates.map((id, i) => {
          const text = visible(trace.text(id));
          const isNext = came?.id === id;
          return {
            label: text, value: chance[i], text: probability(chance[i]), isLit: isNext, mark: isNext ? (came.is_prompt ? "read" : "drawn") : "",
            title: canBranch ? `Branch from token ${token} with ${text}` : undefined,
            lines: /** @type {import("../draw/tooltip.js").Lines} */ ([text, ["probability", exact(chance[i])], ["id", String(id)], ["rank", String(i + 1)], ...(canBranch ? ["click: go on from here with it"] : [])]),
            pick: canBranch ? () => app.branch(token, id) : undefined,
          };
        });
        const isFar = came && !candidates.includes(came.id);
        show(bars,
          figure(`After token ${token} “${visible(trace.tokens[token].text)}”`, h("span", { class: "note" }, canBranch ? "click one to branch" : "the bars are to the scale of the likeliest"),
            lyingBars(rows, chance[0]),
            isFar && h("p", { class: "note" }, `What came, “${visible(came.text)}”, stands at place ${ranks.at(token + 1) + 1}: probability ${probability(Math.exp(-surprise.at(token + 1)))}.`)),
          facts([["entropy", `${exact(entropy.at(token))} nats`], ["surprise of what came", came ? `${exact(surprise.at(token + 1))} nats` : "–"], ["its rank", came ? String(ranks.at(token + 1) + 1) : "–"], [`all but these ${candidates.length}`, probability(Math.max(0, 1 - sum))]]));
        if (!hasLens) {
          show(lens, figure("Logit lens", null, h("p", { class: "note" }, trace.reason("lens.ids"))));
          return;
        }
        const layers = lensIds.entry.layers;
        const cell = (/** @type {number} */ r, /** @type {number} */ c) => {
          const id = lensIds.at(r, token, c);
          const p = lensProbabilities.at(r, token, c);
          const rgb = colour.rgb(p);
          return explain(h("td", { class: "cell", style: { background: `rgb(${rgb.join(", ")})`, color: ink(rgb) } }, visible(trace.text(id))), () => [`Layer ${layers[r]}: ${visible(trace.text(id))}`, ["probability", exact(p)], ["id", String(id)]]);
        };
        const C = lensIds.shape[2];
        show(lens, figure("Logit lens", legend(colour, "probability", "of 1"),
          h("table", { class: "lens" }, h("thead", {}, h("tr", {}, h("th", {}, "after layer"), ...Array.from({ length: C }, (_, c) => h("th", { style: { "text-align": "left" } }, `${c + 1}.`)))),
            h("tbody", {}, ...layers.map((/** @type {number} */ layer, /** @type {number} */ r) => h("tr", { class: layer === store.get().layer ? "is-lit" : "" }, h("td", {}, `${layer} ${trace.layers[layer].mixer.toUpperCase()}`), ...Array.from({ length: C }, (_, c) => cell(r, c))))))));
      },
    };
  },
};
