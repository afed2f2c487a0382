/** Inside MoE: the token, the router, the few experts that are lit, the weighted sum, the shared expert. */

import { arrow, box, diagram, label, node } from "../draw/diagram.js";
import { s } from "../draw/dom.js";
import { stripOf } from "./inside_kda.js";
import { exact, visible } from "../draw/number.js";

const [WIDTH, HEIGHT] = [500, 540];
const LEFT = 14;
const ACROSS = 372; // of the experts
const MIDDLE = LEFT + ACROSS / 2;
const SHARED = 446;

/** Columns that make the experts' grid at most eight rows high. @param {number} experts */
const columnsOf = (experts) => [8, 16, 32, 64].find((columns) => experts <= columns * (columns > 16 ? 8 : columns > 8 ? 4 : 1)) ?? 64;

/** @param {import("./block.js").Inside} inside */
export async function moeDiagram({ trace, store, layer, token, expert }) {
  const moe = trace.config.moe;
  const names = ["router.expert_ids", "router.expert_weights", "experts.norms", "experts.shared_norm", "router.balance_bias", "residual.between", "residual.channel", "residual.after"];
  const [ids, weights, norms, shared, bias, between, added, after] = await trace.arrays(names, layer);
  const scores = trace.has("router.scores", layer) ? (await trace.array("router.scores", layer)).row(token) : null;
  const given = await stripOf(trace, "channel.output", layer, token);
  const chosen = Array.from(ids.row(token));
  const weight = Array.from(weights.row(token));
  const E = moe.num_experts;
  const columns = Math.min(E, columnsOf(E));
  const rows = Math.ceil(E / columns);
  const cell = ACROSS / columns;
  const high = rows === 1 ? 54 : Math.min(26, 150 / rows);
  const bottom = 352; // of the grid
  const top = bottom - rows * high;
  const at = (/** @type {number} */ e) => ({ x: LEFT + (e % columns) * cell, y: top + Math.floor(e / columns) * high });
  const centre = (/** @type {number} */ e) => at(e).x + cell / 2;
  const sumY = 144;
  const addY = 96;
  const text = visible(trace.tokens[token].text);

  const experts = Array.from({ length: E }, (_, e) => {
    const place = chosen.indexOf(e);
    const { x, y } = at(e);
    return box({
      x: x + 1, y: y + 1, width: cell - 2, height: high - 2, title: cell >= 15 ? String(e) : "", kind: `moe${e === expert ? " is-expert" : ""}`, isLit: place >= 0, name: `expert ${e}`,
      pick: () => store.set({ expert: e, view: "sparse" }),
      lines: [`Expert ${e}`, ...(scores ? [/** @type {[string, string]} */ (["score", exact(scores[e])])] : []), ["balance bias", exact(bias.data[e])],
        ["weight", place >= 0 ? exact(weight[place]) : "0: not chosen"], ...(place >= 0 ? [/** @type {[string, string]} */ (["norm of its answer", exact(norms.at(token, place))])] : [])],
    });
  });
  const total = weight.reduce((a, b) => a + b, 0);
  return diagram(WIDTH, HEIGHT, `Layer ${layer}, token ${token}: experts ${chosen.join(", ")} of ${E} answer`,
    label(MIDDLE, 14, `the channel adds, norm ${exact(added.data[token])}; the stream then ${exact(after.data[token])}`, "middle"),
    arrow([[MIDDLE, 28], [MIDDLE, 18]]),
    box({ x: MIDDLE - 110, y: 28, width: 220, height: given ? 40 : 24, title: "the channel's output", name: "tensor channel output", strip: given, lines: ["The channel's output", trace.reason("channel.output", layer)] }),
    arrow([[MIDDLE, addY - 11], [MIDDLE, given ? 68 : 52]]),
    arrow([[MIDDLE, sumY - 15], [MIDDLE, addY + 11]]),
    moe.num_shared_experts > 0 && [
      arrow([[MIDDLE, 470], [SHARED, 470], [SHARED, bottom]], { isLit: true }),
      arrow([[SHARED, top], [SHARED, addY], [MIDDLE + 11, addY]], { isLit: true }),
      box({ x: SHARED - 44, y: top + 1, width: 88, height: bottom - top - 2, title: "shared", sub: "expert", kind: "moe", isLit: true, lines: ["The shared expert: every token visits it", ["weight", "1"], ["norm of its answer", exact(shared.data[token])]] }),
      label(SHARED + 6, top - 8, "× 1", "start"),
    ],
    ...chosen.toReversed().map((e) => arrow([[MIDDLE, 392], [centre(e), bottom + 18], [centre(e), at(e).y + high]], { isLit: true, hasHead: rows === 1 })),
    ...chosen.map((e, i) => arrow([[centre(e), at(e).y], [centre(e), top - 22], [MIDDLE, sumY + 15]], { isLit: true, hasHead: false, width: 1 + 3 * Math.min(1, weight[i]) })),
    ...experts,
    ...(rows === 1 ? chosen.map((e, i) => label(centre(e) + 4, top - 10, `× ${weight[i].toPrecision(2)}`)) : []),
    ...(rows > 1 ? [0, 1].map((line) => label(MIDDLE - 22, sumY - 2 + 13 * line, chosen.slice(4 * line, 4 * line + 4).join(", "), "end")) : []),
    node(MIDDLE, sumY, "Σ", ["Weighted sum", ...chosen.map((e, i) => /** @type {[string, string]} */ ([`expert ${e}`, `× ${exact(weight[i])}`])), ["sum of the weights", exact(total)]], 15),
    label(MIDDLE + 22, sumY - 6, "weighted sum"), label(MIDDLE + 22, sumY + 8, `weights sum to ${exact(total)}`),
    node(MIDDLE, addY, "+", ["The shared expert's answer is added", ["norm", exact(shared.data[token])]]),
    box({
      x: LEFT, y: 392, width: ACROSS, height: scores ? 52 : 30, title: `router: top ${moe.experts_per_token} of ${E}, ${moe.scoring === "sigmoid" ? "sigmoid" : "softmax"} scores`, name: "router",
      strip: scores ? { values: scores, name: "router scores", unit: "", domain: moe.scoring === "sigmoid" ? [0, 1] : undefined, height: 14 } : undefined,
      lines: ["The router", ["scores", trace.reason("router.scores", layer)]],
    }),
    arrow([[MIDDLE, 490], [MIDDLE, 444]], { isLit: true }),
    s("circle", { cx: MIDDLE, cy: 470, r: 2.5, class: "arrow-head is-lit" }),
    box({ x: MIDDLE - 120, y: 490, width: 240, height: 40, title: `token ${token}: “${text.slice(0, 18)}”`, sub: `the normed stream; its norm before: ${exact(between.data[token])}`, name: "token" }));
}
