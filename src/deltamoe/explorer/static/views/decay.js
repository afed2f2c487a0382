/** Decay as half-life, and beta: how fast each head forgets and how strongly it writes. */

import { halfLife } from "../derive.js";
import { choice } from "../draw/dom.js";
import { heatmap } from "../draw/heatmap.js";
import { legend } from "../draw/legend.js";
import { lineChart } from "../draw/line.js";
import { exact, tokens, visible } from "../draw/number.js";
import { extent, scale } from "../draw/scale.js";
import { figure } from "../panel.js";

const SUMMARIES = /** @type {[string, string][]} */ ([["kda.decay_mean", "mean of the channels"], ["kda.decay_p10", "a tenth forgets faster"], ["kda.decay_p90", "a tenth forgets more slowly"]]);
let summary = SUMMARIES[0][0]; // what the reader looked at last

/** @type {import("../panel.js").View} */
export const decay = {
  id: "decay",
  title: "Decay and beta",
  explain: "Decay is what each key channel of a head's memory retains from one token to the next, shown as its half-life: at this token's rate, half is forgotten in so many tokens. Beta is how far the memory's answer is moved to the token's value.",
  docs: "docs/kda.md, One token",
  needs: "trace",
  over: "kda.beta",
  hasHeads: true,
  async draw({ trace, store, layer, head, width, app }) {
    const [decays, beta] = await trace.arrays([summary, "kda.beta"], layer);
    const [T, heads] = decays.shape;
    const lives = Float32Array.from(decays.data, halfLife);
    const colour = scale("cividis", extent(lives), "log");
    const common = { columns: T, width: width - 60, columnTitle: "token →", hover: (/** @type {number} */ _, /** @type {number} */ t) => store.set({ preview: t }), leave: () => store.set({ preview: null }) };
    const name = (/** @type {number} */ t) => `token ${t} “${visible(trace.tokens[t].text)}”`;
    const map = heatmap({
      ...common, rows: heads, value: (r, t) => lives[t * heads + r], scale: colour, height: 130, leastRow: 8, rowTitle: "head", label: `half-life of ${heads} heads over ${T} tokens`,
      lines: (r, t) => [`Head ${r}, ${name(t)}`, ["half-life", tokens(lives[t * heads + r])], ["log_decay", `${exact(decays.at(t, r))} nats a token`], ["retained", exact(Math.exp(decays.at(t, r)))]],
      pick: (r, t) => store.set({ token: t, head: r }),
    });
    map.markRow(head);
    const write = heatmap({
      ...common, rows: heads, value: (r, t) => beta.at(t, r), scale: scale("viridis", [0, trace.config.kda.max_beta]), height: 130, leastRow: 8, rowTitle: "head", label: `beta of ${heads} heads over ${T} tokens`,
      lines: (r, t) => [`Head ${r}, ${name(t)}`, ["beta", exact(beta.at(t, r))]], pick: (r, t) => store.set({ token: t, head: r }),
    });
    write.markRow(head);
    const maps = [map, write];
    const parts = [
      figure("Half-life of every head", [choice("show", SUMMARIES, summary, (v) => { summary = v; app.panel.draw(); }), legend(colour, "half-life", "tokens")], map.element),
      figure("Beta: how strongly each head writes", legend(scale("viridis", [0, trace.config.kda.max_beta]), "beta", "fraction of the correction"), write.element),
    ];
    if (trace.has("kda.log_decay", layer)) {
      const all = await trace.array("kda.log_decay", layer);
      const K = all.shape[2];
      const one = Float32Array.from({ length: T * K }, (_, i) => halfLife(all.at(Math.floor(i / K), head, i % K)));
      const fine = scale("cividis", extent(one), "log");
      const order = Array.from({ length: K }, (_, k) => k).toSorted((a, b) => mean(all, head, b) - mean(all, head, a));
      const channels = heatmap({
        ...common, rows: K, value: (r, t) => one[t * K + order[r]], scale: fine, height: 190, leastRow: 1, rowLabel: (r) => String(order[r]), rowTitle: "key channel, slowest first", label: `half-life of ${K} channels of head ${head}`,
        lines: (r, t) => [`Channel ${order[r]} of head ${head}, ${name(t)}`, ["half-life", tokens(one[t * K + order[r]])], ["log_decay", `${exact(all.at(t, head, order[r]))} nats a token`]],
        pick: (_, t) => store.set({ token: t }),
      });
      maps.push(channels);
      parts.push(figure(`Half-life of every channel of head ${head}`, legend(fine, "half-life", "tokens"), channels.element));
    } else parts.push(figure(`Channels of head ${head}`, null, trace.reason("kda.log_decay", layer)));
    const lines = lineChart(Array.from({ length: heads }, (_, r) => ({ name: `head ${r}`, y: beta.column(r), className: r === head ? "is-lit" : "is-faint" })), {
      width, height: 150, xTitle: "token", yTitle: "beta", yDomain: [0, trace.config.kda.max_beta], pick: (t) => store.set({ token: t }), hasNames: heads <= 8,
    });
    parts.push(figure("Beta over the tokens", null, lines.element));
    return {
      element: parts,
      step(token) {
        for (const one of maps) one.markColumn(token);
        lines.mark(token);
      },
    };
  },
};

/** Mean log-decay of a channel over the tokens. @param {import("../trace.js").Numbers} all @param {number} head @param {number} channel */
function mean(all, head, channel) {
  let sum = 0;
  for (let t = 0; t < all.shape[0]; t++) sum += all.at(t, head, channel);
  return sum / all.shape[0];
}
