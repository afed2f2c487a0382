/** Inside KDA: projections, short convolution, normalised keys, decay and beta, the memory, the output gate. */

import { norm, walk } from "../derive.js";
import { arrow, box, diagram, label, node } from "../draw/diagram.js";
import { s } from "../draw/dom.js";
import { exact, tokens, visible } from "../draw/number.js";
import { strip } from "../draw/strip.js";
import { halfLife } from "./decay.js";

const [WIDTH, HEIGHT] = [500, 556];
const MIDDLE = 232;
const MOST_CELLS = 32; // of a memory's side in the drawing

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

/** One token's vector of an array, for a box; undefined where it was not recorded. @param {import("../trace.js").Trace} trace @param {string} name @param {number} layer @param {number} token */
export async function stripOf(trace, name, layer, token) {
  return trace.has(name, layer) ? { values: (await trace.array(name, layer)).row(token), name, height: 12 } : undefined;
}

/** @param {import("./block.js").Inside} inside */
export async function kdaDiagram({ trace, store, layer, token, head }) {
  const kda = trace.config.kda;
  const [beta, mean, before, added, between] = await trace.arrays(["kda.beta", "kda.decay_mean", "residual.before", "residual.mixer", "residual.between"], layer);
  const isWhole = trace.has("kda.key", layer) && trace.has("kda.log_decay", layer);
  const opened = trace.has("kda.output_gate", layer) ? await trace.array("kda.output_gate", layer) : null;
  const steps = isWhole ? await walk(trace, layer, head) : null;
  const found = steps?.token(token);
  const text = visible(trace.tokens[token].text);
  const absent = trace.reason("kda.key", layer);
  const open = (/** @type {string} */ view) => () => store.set({ view, layer });

  /** A column from the normed stream up to a tensor. @param {number} x @param {number} width @param {string[]} stages from below */
  const column = (x, width, stages, title, values, lines, view, format = exact) => {
    const centre = x + width / 2;
    const ys = [452, 416, 380];
    return [
      ...stages.map((stage, i) => box({ x, y: ys[i], width, height: 22, title: stage, lines: [stage, ...STAGES[/** @type {"Linear"} */ (stage)] ?? []] })),
      arrow([[centre, 486], [centre, 474]]),
      ...stages.slice(1).map((_, i) => arrow([[centre, ys[i]], [centre, ys[i + 1] + 22]])),
      arrow([[centre, ys[stages.length - 1]], [centre, 370]]),
      box({ x, y: 326, width, height: 44, title, kind: "kda", strip: values ? { values, name: title, height: 14, format } : undefined, lines: lines ?? [title, absent], pick: view && open(view), name: `tensor ${title}` }),
    ];
  };
  const wide = 68;
  const at = [8, 84, 160, 236, 312];
  const retained = steps ? steps.logDecay(token).map(Math.exp) : null;
  const hasConv = kda.conv_size > 0;
  const conv = hasConv ? ["Linear", "conv, SiLU"] : ["Linear", "SiLU"];
  const small = found && steps ? pooled(found.after, steps.K, steps.V) : null;
  const row = (/** @type {number} */ y, /** @type {string} */ title, /** @type {Float32Array | undefined} */ values) => box({
    x: 190, y, width: 196, height: 40, title, strip: values && { values, name: title, height: 12 }, lines: [title, absent], name: title });

  return diagram(WIDTH, HEIGHT, `KDA of layer ${layer}, head ${head}, token ${token}`,
    label(MIDDLE + 10, 14, `the mixer adds, norm ${exact(added.data[token])}; the stream then ${exact(between.data[token])}`, "middle"),
    arrow([[MIDDLE, 26], [MIDDLE, 18]]),
    box({ x: MIDDLE - 110, y: 26, width: 220, height: 40, title: "o_proj, all heads", name: "tensor mixer output", strip: await stripOf(trace, "mixer.output", layer, token), lines: ["Linear", "all heads' answers, side by side, back to the width of the stream"] }),
    arrow([[MIDDLE, 80], [MIDDLE, 66]]),
    node(MIDDLE, 91, "×", ["Output gate", "opens or closes every channel of the answer"]),
    arrow([[MIDDLE, 116], [MIDDLE, 102]]),
    box({ x: MIDDLE - 60, y: 116, width: 120, height: 22, title: "RMSNorm, a head", lines: ["RMSNorm", "each head's answer to length √V, times a weight"] }),
    arrow([[288, 160], [288, 150], [MIDDLE, 150], [MIDDLE, 138]]),
    s("rect", { class: "frame", x: 4, y: 152, width: 392, height: 160, rx: 8 }),
    label(12, 168, `memory, ${kda.key_dim} × ${kda.value_dim}${found ? `, norm ${norm(found.after).toPrecision(3)}` : ""}`),
    small && found
      ? s("g", { class: "box can-pick", on: { click: open("memory") }, "data-name": "memory" }, strip(small.values, {
        x: 14, y: 176, width: 128, height: 128, rows: small.rows, kind: "root", name: small.by > 1 ? `memory, each cell the mean of ${small.by} × ${small.by}` : "memory" }))
      : box({ x: 14, y: 176, width: 128, height: 128, title: "not recorded", lines: [absent] }),
    row(160, "read: o = Mᵀq", found?.answer), row(212, "write: delta = beta (v − r)", found?.delta), row(264, "recall: r = Mᵀk", found?.recalled),
    arrow([[146, 284], [188, 284]]), arrow([[288, 264], [288, 253]]), arrow([[188, 232], [146, 232]]), arrow([[146, 184], [188, 184]]),
    column(at[0], wide, [...conv, "L2 norm"], "q", steps?.query(token), null, undefined),
    column(at[1], wide, [...conv, "L2 norm"], "k", steps?.key(token), null, undefined),
    column(at[2], wide, conv, "v", steps?.value(token), null, undefined),
    column(at[3], wide, ["2 × Linear", kda.decay === "bounded" ? "bounded" : "softplus"], "decay", retained ?? undefined, [`Mean half-life of head ${head}`, ["tokens", tokens(halfLife(mean.at(token, head)))]], "decay", (value) => `${exact(value)} retained`),
    column(at[4], wide, ["Linear", "sigmoid"], "beta", beta.row(token), [`beta of head ${head}`, ["", exact(beta.at(token, head))]], "decay"),
    ...[0, 1, 2, 3, 4].map((i) => arrow([[at[i] + wide / 2, 326], [at[i] + wide / 2, 312]])),
    kda.output_gate !== "none" && [
      ...["2 × Linear", kda.output_gate].map((stage, i) => box({ x: 412, y: [452, 416][i], width: 82, height: 22, title: stage, lines: [stage, ...STAGES[/** @type {"Linear"} */ (stage)] ?? []] })),
      arrow([[453, 486], [453, 474]]), arrow([[453, 452], [453, 438]]), arrow([[453, 416], [453, 370]]),
      box({ x: 412, y: 326, width: 82, height: 44, title: "output gate", kind: "kda", name: "tensor output gate", strip: opened ? { values: opened.row(token, head), name: "output gate", height: 14 } : undefined, lines: ["output gate", trace.reason("kda.output_gate", layer)] }),
      arrow([[453, 326], [453, 91], [MIDDLE + 11, 91]]),
    ],
    s("path", { class: "arrow", d: `M${at[0] + wide / 2} 486H453` }),
    arrow([[MIDDLE, 510], [MIDDLE, 486]], { hasHead: false }),
    box({ x: MIDDLE - 130, y: 510, width: 260, height: 40, title: `token ${token}: “${text.slice(0, 18)}”`, sub: `the normed stream; its norm before: ${exact(before.data[token])}`, name: "token" }));

}

const STAGES = {
  Linear: ["a matrix without bias"],
  "2 × Linear": ["down to a bottleneck and up again"],
  "conv, SiLU": ["a causal convolution over the last tokens, each channel alone; then SiLU"],
  SiLU: ["x · sigmoid(x)"],
  "L2 norm": ["to length 1; q carries 1/√K as well"],
  softplus: ["log_decay = −exp(A_log) · softplus(logits + dt_bias)"],
  bounded: ["log_decay = lower bound · sigmoid(exp(A_log) · (logits + dt_bias))"],
  sigmoid: ["to a fraction between 0 and 1"],
  swish: ["x · sigmoid(x)"],
};
