/** Inside MLA: the latent each token leaves behind, the heads that look back, the answer. */

import { attentionRow } from "../derive.js";
import { arrow, box, diagram, label } from "../draw/diagram.js";
import { stripOf } from "./inside_kda.js";
import { bytes, count, exact, visible } from "../draw/number.js";

const [WIDTH, HEIGHT] = [500, 560];

/** @param {import("./block.js").Inside} inside */
export async function mlaDiagram({ trace, store, layer, token, head }) {
  const mla = trace.config.mla;
  const [latent, before, added, between] = await trace.arrays(["mla.latent_norm", "residual.before", "residual.mixer", "residual.between"], layer);
  const isWhole = trace.has("mla.query", layer);
  const [query, key] = isWhole ? await trace.arrays(["mla.query", "mla.key"], layer) : [];
  const weights = query && key ? attentionRow(query, key, head, token) : null;
  const absent = trace.reason("mla.query", layer);
  const text = visible(trace.tokens[token].text);
  const [L, P] = [mla.latent_dim, mla.rope_dim];
  const looked = weights ? Array.from(weights, (weight, at) => ({ weight, at })).toSorted((a, b) => b.weight - a.weight).slice(0, 3) : [];
  const each = trace.summary.model.cache_bytes_per_token / Math.max(1, trace.layers.filter((one) => one.mixer === "mla").length);
  const sub = mla.has_rope ? "P channels turned by position" : "no positions";
  return diagram(WIDTH, HEIGHT, `MLA of layer ${layer}, head ${head}, token ${token}`,
    label(250, 14, `the mixer adds, norm ${exact(added.data[token])}; the stream then ${exact(between.data[token])}`, "middle"),
    arrow([[250, 28], [250, 20]]),
    box({ x: 130, y: 28, width: 240, height: 40, title: "o_proj, all heads", name: "tensor mixer output", strip: await stripOf(trace, "mixer.output", layer, token), lines: ["Linear", "all heads' answers, side by side, back to the width of the stream"] }),
    arrow([[250, 88], [250, 68]]),
    box({ x: 110, y: 88, width: 280, height: 42, title: "weighted mean of the values", sub: looked.length ? looked.map(({ weight, at }) => `${weight.toPrecision(2)} “${visible(trace.tokens[at].text).slice(0, 8)}”`).join("  ") : "", kind: "mla", lines: [`Head ${head} looks most at`, ...looked.map(({ weight, at }) => /** @type {[string, string]} */ ([`token ${at} “${visible(trace.tokens[at].text)}”`, exact(weight)]))] }),
    arrow([[250, 152], [250, 130]]),
    box({ x: 40, y: 152, width: 420, height: 56, title: `attention of head ${head}: softmax over ${token + 1} tokens`, kind: "mla", name: "attention", pick: () => store.set({ view: "attention", layer }),
      strip: weights ? { values: weights, name: "attention weight, by token looked at", height: 18 } : undefined, lines: ["attention", absent] }),
    arrow([[110, 240], [110, 208]]), arrow([[330, 240], [330, 208]]), arrow([[440, 306], [440, 208]]), label(434, 226, "values", "end"),
    box({ x: 20, y: 240, width: 180, height: 46, title: "query", kind: "mla", name: "tensor query", strip: query && { values: query.row(token, head), name: "query: latent part, then shared channels", height: 14 }, lines: ["query", absent] }),
    box({ x: 240, y: 240, width: 160, height: 46, title: "key", kind: "mla", name: "tensor key", strip: key && { values: key.row(token, head), name: "key: latent part, then shared channels", height: 14 }, lines: ["key", absent] }),
    arrow([[320, 306], [320, 286]]),
    box({ x: 240, y: 306, width: 240, height: 24, title: "latent_up: keys and values of every head", lines: ["Linear", "each head's key and value out of the latent; made again whenever they are needed"] }),
    arrow([[360, 352], [360, 330]]),
    box({ x: 240, y: 352, width: 240, height: 54, title: `latent of token ${token}`, sub: `cache: ${count(token + 1)} × (${L} + ${P}), ${bytes(each * (token + 1))}`, kind: "mla", name: "latent cache", strip: await stripOf(trace, "mla.latent", layer, token), pick: () => store.set({ view: "state" }),
      lines: ["The cache of this layer grows with every token", ["numbers a token", String(L + P)], ["bytes a token", count(each)], ["norm of this token's latent", exact(latent.data[token])]] }),
    arrow([[360, 426], [360, 406]]),
    box({ x: 240, y: 426, width: 240, height: 24, title: `latent_proj to ${L} + ${P}, RMSNorm`, lines: ["Linear, then RMSNorm", `${L} channels of the latent; ${P} key channels that all heads share, ${sub}`] }),
    box({ x: 40, y: 426, width: 140, height: 24, title: mla.query_rank ? "q_down, norm, q_up" : "q_proj", lines: ["Linear", `the queries of all ${mla.num_heads} heads`] }),
    arrow([[110, 426], [110, 286]]),
    arrow([[250, 500], [250, 470], [110, 470], [110, 450]]), arrow([[250, 470], [360, 470], [360, 450]]),
    box({ x: 120, y: 500, width: 260, height: 40, title: `token ${token}: “${text.slice(0, 18)}”`, sub: `the normed stream; its norm before: ${exact(before.data[token])}`, name: "token" }));
}
