/** Inside KDA: projections, short convolution, normalised keys, decay and beta, the memory, the output gate. */

import { halfLife, norm, walk } from "../derive.js";
import { arrow, box, diagram, label } from "../draw/diagram.js";
import { s } from "../draw/dom.js";
import { exact, tokens } from "../draw/number.js";
import { strip } from "../draw/strip.js";
import { headsOf } from "../panel.js";
import { rowsOf, tensorBoxes, tokenBox } from "./tensors.js";

const [WIDTH, HEIGHT] = [500, 600];
const MIDDLE = 232;
const MOST_CELLS = 32; // of a memory's side in the drawing
const [FOOT, FIRST, SECOND, LAST] = [526, 464, 412, 342]; // rows: where the columns begin, and the tops of their boxes

/** The mean of each block of cells, so that a side has at most MOST_CELLS. @param {Float32Array} matrix @param {number} K @param {number} V */
export function pooled(matrix, K, V) {
  const by = Math.ceil(Math.max(K, V) / MOST_CELLS);
  const [rows, columns] = [Math.ceil(K / by), Math.ceil(V / by)];
  const sums = new Float32Array(rows * columns);
  const counts = new Uint16Array(rows * columns);
  for (let k = 0; k < K; k++) {
    for (let v = 0; v < V; v++) {
      const at = Math.floor(k / by) * columns + Math.floor(v / by);
      sums[at] += matrix[k * V + v];
      counts[at] += 1;
    }
  }
  return { values: sums.map((sum, i) => sum / counts[i]), rows, by };
}

const WORDS = {
  "Linear": "a matrix without bias", "2 × Linear": "down to a bottleneck and up again",
  "conv, SiLU": "a causal convolution over the last tokens, each channel alone; then x · sigmoid(x)", SiLU: "x · sigmoid(x)",
  "L2 norm": "to length 1; q carries 1/√K as well", softplus: "log_decay = −exp(A_log) · softplus(logits + dt_bias)",
  bounded: "log_decay = lower bound · sigmoid(exp(A_log) · (logits + dt_bias))", sigmoid: "a fraction: 1 / (1 + exp(−x))", swish: "x · sigmoid(x)",
};

/** @param {import("./block.js").Inside} inside */
export async function kdaDiagram({ trace, store, layer, token, head }) {
  const kda = trace.config.kda;
  const shared = Math.floor((head * kda.num_heads) / headsOf(trace.config, "kda"));
  const [mean, before, added, between] = await trace.arrays(["kda.decay_mean", "residual.before", "residual.mixer", "residual.between"], layer);
  const row = await rowsOf(trace, layer, {
    "mixer.input": [token], "mixer.output": [token], "kda.beta_logits": [token], "kda.beta": [token],
    ...Object.fromEntries(["query", "key"].flatMap((one) => ["_projected", "_convolved", ""].map((stage) => [`kda.${one}${stage}`, [token, shared]]))),
    ...Object.fromEntries(["value_projected", "value", "decay_logits", "output_gate_logits", "output_gate", "answer_normed"].map((one) => [`kda.${one}`, [token, head]])),
  });
  const isWhole = ["kda.query", "kda.key", "kda.value", "kda.log_decay"].every((name) => trace.has(name, layer));
  const steps = isWhole ? await walk(trace, layer, head) : null;
  const found = steps?.token(token);
  const tensor = tensorBoxes(trace, layer);
  const open = (/** @type {string} */ view) => () => store.set({ view, layer });
  const [normed, gate] = [row["kda.answer_normed"], row["kda.output_gate"]];
  const conv = kda.conv_size > 0 ? "conv, SiLU" : "SiLU";
  const small = found && steps ? pooled(found.after, steps.K, steps.V) : null;

  /**
   * A column from the normed stream up to a tensor: boxes from below, the last is what the memory is given.
   * @param {number} x @param {number} width @param {string} title @param {[keyof typeof WORDS, string, Float32Array | undefined][]} stages what is done, and what comes of it
   * @param {Partial<Parameters<typeof tensor>[0]>} [more] of the last
   */
  const column = (x, width, title, stages, more = {}) => {
    const centre = x + width / 2;
    const ys = [FIRST, SECOND].slice(0, stages.length - 1);
    const [does, array, values] = stages[stages.length - 1];
    return [
      arrow([[centre, FOOT], [centre, FIRST + 38]]),
      ...stages.slice(0, -1).map(([stage, from, rows], i) => tensor({ x, y: ys[i], width, height: 38, title: stage, values: rows, array: from, words: [WORDS[stage]], name: `tensor ${title} ${stage}`, label: `${title}: ${stage}`, strip: more.strip && { axis: more.strip.axis } })),
      ...ys.map((y, i) => arrow([[centre, y], [centre, i + 1 < ys.length ? ys[i + 1] + 38 : LAST + 54]])),
      tensor({ x, y: LAST, width, height: 54, title, sub: does, kind: "kda", values, array, words: [WORDS[does]], name: `tensor ${title}`, label: title, ...more }),
    ];
  };
  const inner = (/** @type {number} */ y, /** @type {string} */ title, /** @type {Float32Array | undefined} */ values) => tensor({ x: 190, y, width: 196, height: 40, title, values, array: "kda.key", name: title });
  const wide = 68;
  const at = [8, 84, 160, 236, 312];
  const each = (/** @type {string} */ one) => /** @type {[keyof typeof WORDS, string, Float32Array | undefined][]} */ ([
    ["Linear", `kda.${one}_projected`, row[`kda.${one}_projected`]], [conv, `kda.${one}_convolved`, row[`kda.${one}_convolved`]], ["L2 norm", `kda.${one}`, row[`kda.${one}`]]]);

  return diagram(WIDTH, HEIGHT, `KDA of layer ${layer}, head ${head}, token ${token}`,
    label(MIDDLE + 10, 14, `the mixer adds, norm ${exact(added.data[token])}; the stream then ${exact(between.data[token])}`, "middle"),
    arrow([[MIDDLE, 26], [MIDDLE, 18]]),
    tensor({ x: MIDDLE - 110, y: 26, width: 220, height: 40, title: "o_proj, all heads", name: "tensor mixer output", values: row["mixer.output"], array: "mixer.output", words: ["all heads' answers, side by side, back to the width of the stream"] }),
    kda.output_gate !== "none" && [
      arrow([[MIDDLE, 78], [MIDDLE, 66]]),
      tensor({ x: MIDDLE - 80, y: 78, width: 160, height: 36, title: "× output gate", name: "tensor gated", values: gate && normed?.map((value, i) => value * gate[i]), array: "kda.answer_normed", words: ["the gate opens or closes every channel of the answer"] }),
      column(412, 82, "output gate", [["2 × Linear", "kda.output_gate_logits", row["kda.output_gate_logits"]], [kda.output_gate, "kda.output_gate", gate]]),
      arrow([[453, LAST], [453, 96], [MIDDLE + 80, 96]]),
    ],
    arrow([[MIDDLE, 126], [MIDDLE, kda.output_gate === "none" ? 66 : 114]]),
    tensor({ x: MIDDLE - 80, y: 126, width: 160, height: 36, title: "RMSNorm, a head", name: "tensor RMSNorm", values: normed, array: "kda.answer_normed", words: ["each head's answer to length √V, times a weight"] }),
    arrow([[288, 182], [288, 172], [MIDDLE, 172], [MIDDLE, 162]]),
    s("rect", { class: "frame", x: 4, y: 168, width: 392, height: 160, rx: 8 }),
    label(12, 184, `memory, ${kda.key_dim} × ${kda.value_dim}${found ? `, norm ${norm(found.after).toPrecision(3)}` : ""}`),
    small && found
      ? s("g", { class: "box can-pick", on: { click: open("memory") }, "data-name": "memory" }, strip(small.values, {
        x: 14, y: 192, width: 128, height: 128, rows: small.rows, kind: "root", name: small.by > 1 ? `memory, each cell the mean of ${small.by} × ${small.by}` : "memory", axis: "value channel", rowAxis: "key channel" }))
      : box({ x: 14, y: 192, width: 128, height: 128, title: "not recorded", lines: ["memory", trace.reason("kda.key", layer)] }),
    inner(182, "read: o = Mᵀq", found?.answer), inner(231, "write: delta = beta (v − r)", found?.delta), inner(280, "recall: r = Mᵀk", found?.recalled),
    arrow([[146, 300], [188, 300]]), arrow([[288, 280], [288, 271]]), arrow([[188, 251], [146, 251]]), arrow([[146, 202], [188, 202]]),
    column(at[0], wide, "q", each("query")),
    column(at[1], wide, "k", each("key")),
    column(at[2], wide, "v", [["Linear", "kda.value_projected", row["kda.value_projected"]], [conv, "kda.value", row["kda.value"]]]),
    column(at[3], wide, "decay", [["2 × Linear", "kda.decay_logits", row["kda.decay_logits"]], [kda.decay === "bounded" ? "bounded" : "softplus", "kda.log_decay", steps?.logDecay(token).map(Math.exp)]], {
      pick: open("decay"), words: [`mean half-life of head ${head}: ${tokens(halfLife(mean.at(token, head)))}`], strip: { domain: [0, 1], format: (value) => `${exact(value)} retained` } }),
    column(at[4], wide, "beta", [["Linear", "kda.beta_logits", row["kda.beta_logits"]], ["sigmoid", "kda.beta", row["kda.beta"]]], {
      pick: open("decay"), words: [`beta of head ${head}: ${exact(row["kda.beta"]?.[head] ?? NaN)}`], strip: { axis: "head", domain: [0, kda.max_beta] } }),
    ...at.map((x) => arrow([[x + wide / 2, LAST], [x + wide / 2, 328]])),
    s("path", { class: "arrow", d: `M${at[0] + wide / 2} ${FOOT}H${kda.output_gate === "none" ? at[4] + wide / 2 : 453}` }),
    arrow([[MIDDLE, 540], [MIDDLE, FOOT]], { hasHead: false }),
    tokenBox(tensor, trace, token, { x: MIDDLE - 130, y: 540, width: 260, array: "mixer.input", values: row["mixer.input"], norm: before.data[token] }));
}
