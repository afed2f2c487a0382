/** Inside MoE: the token, the router, the few experts that are lit, their answers, the weighted sum, the shared expert. */

import { arrow, box, diagram, label, node } from "../draw/diagram.js";
import { s } from "../draw/dom.js";
import { exact } from "../draw/number.js";
import { rowsOf, tensorBoxes, tokenBox } from "./tensors.js";

const WIDTH = 500;
const LEFT = 14;
const ACROSS = 372; // of the experts
const MIDDLE = LEFT + ACROSS / 2;
const SHARED = 446;
const ADD = 96; // where the shared expert's answer is added
const ANSWERS = 186; // the top of the chosen experts' answers

/** Columns that make the experts' grid at most eight rows high. @param {number} experts */
const columnsOf = (experts) => [8, 16, 32, 64].find((columns) => experts <= columns * (columns > 16 ? 8 : columns > 8 ? 4 : 1)) ?? 64;

/** @param {import("./block.js").Inside} inside */
export async function moeDiagram({ trace, store, layer, token, expert }) {
  const moe = trace.config.moe;
  const names = ["router.expert_ids", "router.expert_weights", "experts.norms", "experts.shared_norm", "router.balance_bias", "residual.between", "residual.channel", "residual.after"];
  const [ids, weights, norms, shared, bias, between, added, after] = await trace.arrays(names, layer);
  const row = await rowsOf(trace, layer, Object.fromEntries(["channel.input", "channel.output", "router.logits", "router.scores", "experts.answers", "experts.routed", "experts.shared"].map((name) => [name, [token]])));
  const scores = row["router.scores"];
  const tensor = tensorBoxes(trace, layer);
  const chosen = Array.from(ids.row(token));
  const weight = Array.from(weights.row(token));
  const E = moe.num_experts;
  const columns = Math.min(E, columnsOf(E));
  const rows = Math.ceil(E / columns);
  const cell = ACROSS / columns;
  const high = rows === 1 ? 54 : Math.min(26, 150 / rows);
  const answersHigh = Math.min(64, Math.max(12, 6 * chosen.length));
  const answersEnd = ANSWERS + 26 + answersHigh;
  const top = answersEnd + 44; // of the grid
  const bottom = top + rows * high;
  const [router, logits, split, foot] = [40, 104, 170, 186].map((below) => bottom + below);
  const at = (/** @type {number} */ e) => ({ x: LEFT + (e % columns) * cell, y: top + Math.floor(e / columns) * high });
  const centre = (/** @type {number} */ e) => at(e).x + cell / 2;

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
  return diagram(WIDTH, foot + 58, `Layer ${layer}, token ${token}: experts ${chosen.join(", ")} of ${E} answer`,
    label(MIDDLE, 14, `the channel adds, norm ${exact(added.data[token])}; the stream then ${exact(after.data[token])}`, "middle"),
    arrow([[MIDDLE, 28], [MIDDLE, 18]]),
    tensor({ x: MIDDLE - 130, y: 28, width: 260, height: 42, title: "the channel's output", name: "tensor channel output", values: row["channel.output"], array: "channel.output" }),
    moe.num_shared_experts > 0
      ? [
        arrow([[MIDDLE, ADD - 11], [MIDDLE, 70]]), arrow([[MIDDLE, 122], [MIDDLE, ADD + 11]]),
        arrow([[MIDDLE, split], [SHARED, split], [SHARED, bottom]], { isLit: true }),
        arrow([[SHARED, top], [SHARED, ADD], [MIDDLE + 11, ADD]], { isLit: true }),
        tensor({ x: SHARED - 44, y: top + 1, width: 88, height: bottom - top - 2, title: "shared", sub: "expert", kind: "moe", isLit: true, name: "tensor shared", label: "the shared expert's answer", values: row["experts.shared"], array: "experts.shared",
          words: ["every token visits it, with weight 1", `norm of its answer: ${exact(shared.data[token])}`] }),
        label(SHARED + 6, top - 8, "× 1"),
        node(MIDDLE, ADD, "+", ["The shared expert's answer is added", ["norm", exact(shared.data[token])]]),
      ]
      : arrow([[MIDDLE, 122], [MIDDLE, 70]]),
    tensor({ x: MIDDLE - 130, y: 122, width: 260, height: 42, title: `Σ weight × answer; weights sum to ${exact(total)}`, kind: "moe", name: "tensor routed", label: "weighted sum", values: row["experts.routed"], array: "experts.routed",
      words: chosen.map((e, i) => `${exact(weight[i])} × expert ${e}`) }),
    arrow([[MIDDLE, ANSWERS], [MIDDLE, 164]], { isLit: true }),
    tensor({ x: MIDDLE - 130, y: ANSWERS, width: 260, height: answersEnd - ANSWERS, title: `answers of ${chosen.length > 4 ? `the ${chosen.length} chosen` : chosen.join(", ")}`, kind: "moe", name: "tensor answers", label: `answers of ${chosen.join(", ")}`, values: row["experts.answers"], array: "experts.answers",
      strip: { rows: chosen.length, height: answersHigh, rowAxis: "choice" }, words: chosen.map((e, i) => `choice ${i}: expert ${e}, norm ${exact(norms.at(token, i))}`) }),
    ...chosen.toReversed().map((e) => arrow([[MIDDLE, router], [centre(e), bottom + 18], [centre(e), at(e).y + high]], { isLit: true, hasHead: rows === 1 })),
    ...chosen.map((e, i) => arrow([[centre(e), at(e).y], [centre(e), top - 20], [MIDDLE + (i - (chosen.length - 1) / 2) * 18, answersEnd]], { isLit: true, hasHead: false, width: 1 + 3 * Math.min(1, weight[i]) })),
    ...experts,
    ...(rows === 1 ? chosen.map((e, i) => label(centre(e) + 5, top - 6, `× ${weight[i].toFixed(2)}`)) : []),
    tensor({ x: LEFT, y: router, width: ACROSS, height: 44, title: `router: top ${moe.experts_per_token} of ${E} by ${moe.scoring === "sigmoid" ? "sigmoid" : "softmax"} score and bias`, name: "router", label: "router scores", values: scores, array: "router.scores", strip: { axis: "expert", domain: moe.scoring === "sigmoid" ? [0, 1] : undefined } }),
    arrow([[MIDDLE, logits], [MIDDLE, router + 44]], { isLit: true }),
    tensor({ x: LEFT, y: logits, width: ACROSS, height: 44, title: "Linear: one logit for every expert", name: "tensor logits", label: "router logits", values: row["router.logits"], array: "router.logits", strip: { axis: "expert" } }),
    arrow([[MIDDLE, foot], [MIDDLE, logits + 44]], { isLit: true }),
    s("circle", { cx: MIDDLE, cy: split, r: 2.5, class: "arrow-head is-lit" }),
    tokenBox(tensor, trace, token, { x: MIDDLE - 130, y: foot, width: 260, array: "channel.input", values: row["channel.input"], norm: between.data[token] }));
}
