/** Inside MLA: the latent each token leaves behind, the heads that look back, the answer. */

import { attentionRow } from "../derive.js";
import { arrow, diagram, label } from "../draw/diagram.js";
import { bytes, count, exact, visible } from "../draw/number.js";
import { rowsOf, tensorBoxes, tokenBox } from "./tensors.js";

const [WIDTH, HEIGHT] = [500, 566];

/** @param {import("./block.js").Inside} inside */
export async function mlaDiagram({ trace, store, layer, token, head }) {
  const mla = trace.config.mla;
  const [before, added, between] = await trace.arrays(["residual.before", "residual.mixer", "residual.between"], layer);
  const isWhole = trace.has("mla.query", layer) && trace.has("mla.key", layer);
  const [query, key] = isWhole ? await trace.arrays(["mla.query", "mla.key"], layer) : [];
  const row = await rowsOf(trace, layer, {
    "mixer.input": [token], "mla.query_latent": [token], "mla.latent_projected": [token], "mla.latent": [token], "mla.value": [token, head], "mla.answer": [token, head], "mixer.output": [token],
  });
  const weights = query && key ? attentionRow(query, key, head, token) : null;
  const looked = weights ? Array.from(weights, (weight, at) => ({ weight, at })).toSorted((a, b) => b.weight - a.weight).slice(0, 3) : [];
  const [L, P] = [mla.latent_dim, mla.rope_dim];
  const each = trace.summary.model.cache_bytes_per_token / Math.max(1, trace.layers.filter((one) => one.mixer === "mla").length);
  const tensor = tensorBoxes(trace, layer);
  const turned = mla.has_rope ? "turned by position" : "without positions";
  const isNarrow = mla.query_rank !== null && mla.query_rank !== undefined;
  return diagram(WIDTH, HEIGHT, `MLA of layer ${layer}, head ${head}, token ${token}`,
    label(250, 14, `the mixer adds, norm ${exact(added.data[token])}; the stream then ${exact(between.data[token])}`, "middle"),
    arrow([[250, 28], [250, 20]]),
    tensor({ x: 110, y: 28, width: 280, height: 42, title: "o_proj, all heads", name: "tensor mixer output", values: row["mixer.output"], array: "mixer.output", words: ["all heads' answers, side by side, back to the width of the stream"] }),
    arrow([[250, 90], [250, 70]]),
    tensor({ x: 80, y: 90, width: 340, height: 56, title: "weighted mean of the values", sub: looked.map(({ weight, at }) => `${weight.toFixed(2)} “${visible(trace.tokens[at].text).slice(0, 8)}”`).join("   "), kind: "mla",
      name: "tensor answer", values: row["mla.answer"], array: "mla.answer", words: [`head ${head} looks most at`, ...looked.map(({ weight, at }) => `token ${at} “${visible(trace.tokens[at].text)}”: ${exact(weight)}`)] }),
    arrow([[250, 168], [250, 146]]),
    tensor({ x: 20, y: 168, width: 400, height: 44, title: `attention of head ${head}: softmax over ${count(token + 1)} tokens`, kind: "mla", name: "attention", pick: () => store.set({ view: "attention", layer }),
      values: weights, array: "mla.query", label: "attention weight", strip: { axis: "token", kind: "root" } }),
    arrow([[95, 240], [95, 212]]), arrow([[260, 240], [260, 212]]), arrow([[450, 240], [450, 118], [420, 118]]),
    tensor({ x: 20, y: 240, width: 150, height: 56, title: "query", sub: isNarrow ? `q_up, ${turned}` : `q_proj, ${turned}`, kind: "mla", name: "tensor query", values: query?.row(token, head), array: "mla.query", label: "query: latent part, then shared channels" }),
    tensor({ x: 190, y: 240, width: 140, height: 56, title: "key", sub: `latent_up, ${P} shared`, kind: "mla", name: "tensor key", values: key?.row(token, head), array: "mla.key", label: "key: latent part, then shared channels", words: [`made again from the latent whenever it is needed; ${P} channels are the same for all heads, ${turned}`] }),
    tensor({ x: 350, y: 240, width: 130, height: 56, title: "value", sub: "latent_up", kind: "mla", name: "tensor value", values: row["mla.value"], array: "mla.value", words: ["made again from the latent whenever it is needed"] }),
    arrow([[260, 330], [260, 296]]), arrow([[415, 330], [415, 296]]),
    tensor({ x: 190, y: 330, width: 290, height: 56, title: `latent of token ${token}: RMSNorm`, sub: `the cache: ${count(token + 1)} × (${L} + ${P}), ${bytes(each * (token + 1))}`, kind: "mla", name: "tensor latent", values: row["mla.latent"], array: "mla.latent", pick: () => store.set({ view: "state" }),
      label: "latent", words: [`this layer's cache grows by ${count(each)} bytes a token: ${L} channels of the latent, ${P} key channels that all heads share`] }),
    arrow([[335, 412], [335, 386]]),
    tensor({ x: 190, y: 412, width: 290, height: 42, title: `latent_proj, to ${L} + ${P}`, name: "tensor latent_proj", values: row["mla.latent_projected"], array: "mla.latent_projected", label: "latent before its norm" }),
    isNarrow
      ? [arrow([[95, 412], [95, 296]]), tensor({ x: 20, y: 412, width: 150, height: 42, title: "q_down, RMSNorm", name: "tensor query latent", values: row["mla.query_latent"], array: "mla.query_latent" })]
      : arrow([[95, 480], [95, 296]]),
    arrow([[250, 506], [250, 480], [335, 480], [335, 454]]), arrow(isNarrow ? [[250, 480], [95, 480], [95, 454]] : [[250, 480], [95, 480]], { hasHead: isNarrow }),
    tokenBox(tensor, trace, token, { x: 110, y: 506, width: 280, array: "mixer.input", values: row["mixer.input"], norm: before.data[token] }));
}
