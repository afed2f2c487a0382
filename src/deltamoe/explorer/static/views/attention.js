/** MLA attention: where each head looks back to. */

import { attentionRow } from "../derive.js";
import { h, show } from "../draw/dom.js";
import { heatmap } from "../draw/heatmap.js";
import { legend } from "../draw/legend.js";
import { lineChart } from "../draw/line.js";
import { exact, visible } from "../draw/number.js";
import { scale } from "../draw/scale.js";
import { figure } from "../panel.js";

const LEAST = 1e-4; // what the log scale shows as nothing
const MOST_MAP = 1024; // tokens of the whole map of one head

/** @type {import("../panel.js").View} */
export const attention = {
  id: "attention",
  title: "Attention",
  explain: "An MLA head weighs every token up to the present one and takes the mean of their values by these weights, which sum to 1. No positions are added: order comes from KDA's decay and convolution.",
  docs: "docs/mla.md, What a token leaves behind",
  needs: "trace",
  over: "mla.query",
  hasHeads: true,
  async draw({ trace, store, layer, head, width }) {
    const [query, key] = await trace.arrays(["mla.query", "mla.key"], layer);
    const [T, heads] = query.shape;
    const colour = scale("viridis", [LEAST, 1], "log");
    const side = legend(colour, "attention weight", `probability; below ${LEAST} as ${LEAST}`);
    const name = (/** @type {number} */ t) => `token ${t} “${visible(trace.tokens[t].text)}”`;
    const place = h("div", {});
    const parts = [place];
    /** @type {ReturnType<typeof heatmap> | null} */
    let whole = null;
    if (T <= MOST_MAP) {
      const map = new Float32Array(T * T).fill(NaN);
      for (let t = 0; t < T; t++) map.set(attentionRow(query, key, head, t), t * T);
      const cell = Math.max(1, Math.min(10, Math.floor(Math.min(width - 60, 520) / T)));
      whole = heatmap({
        rows: T, columns: T, value: (r, c) => map[r * T + c], scale: colour, width: width - 60, least: cell, most: cell, leastRow: cell, mostRow: cell,
        label: `attention of head ${head}`, rowTitle: "token that looks", columnTitle: "token looked at →",
        lines: (r, c) => [`${name(r)} looks at`, [name(c), c > r ? "not yet there" : exact(map[r * T + c])]],
        pick: (r) => store.set({ token: r }), hover: (r) => store.set({ preview: r }), leave: () => store.set({ preview: null }),
      });
      parts.push(figure(`Head ${head}, every token`, side, whole.element));
    } else parts.push(figure(`Head ${head}, every token`, null, h("p", { class: "note" }, `This trace has ${T} tokens; the whole map is drawn up to ${MOST_MAP}. The rows above show any token.`)));
    return {
      element: parts,
      step(token) {
        const rows = Array.from({ length: heads }, (_, one) => attentionRow(query, key, one, token));
        const map = heatmap({
          rows: heads, columns: T, value: (r, c) => (c <= token ? rows[r][c] : NaN), scale: colour, width: width - 60, height: 120, leastRow: 8,
          label: `attention of ${heads} heads at token ${token}`, rowTitle: "head", columnTitle: "token looked at →",
          lines: (r, c) => [`Head ${r}: ${name(token)} looks at`, [name(c), c > token ? "not yet there" : exact(rows[r][c])]],
          pick: (r, c) => store.set({ head: r, token: c }),
        });
        const line = lineChart([{ name: `head ${head}`, y: rows[head], className: "is-lit" }], { width, height: 130, xTitle: "token looked at", yTitle: "weight", yDomain: [0, Math.max(...rows[head])], pick: (t) => store.set({ token: t }) });
        show(place, figure(`Every head at ${name(token)}`, legend(colour, "attention weight", "probability"), map.element), figure(`Head ${head} at this token`, null, line.element));
        map.markColumn(token);
        map.markRow(head);
        whole?.markRow(token);
      },
    };
  },
};
