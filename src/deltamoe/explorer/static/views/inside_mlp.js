/** Inside a dense channel: the same wide MLP for every token. */

import { silu } from "../derive.js";
import { arrow, diagram, label } from "../draw/diagram.js";
import { count, exact } from "../draw/number.js";
import { rowsOf, tensorBoxes, tokenBox } from "./tensors.js";

/** @param {import("./block.js").Inside} inside */
export async function mlpDiagram({ trace, layer, token }) {
  const [between, added, after] = await trace.arrays(["residual.between", "residual.channel", "residual.after"], layer);
  const row = await rowsOf(trace, layer, { "channel.input": [token], "mlp.gate": [token], "mlp.up": [token], "channel.output": [token] });
  const [gate, up] = [row["mlp.gate"], row["mlp.up"]];
  const opened = gate?.map(silu);
  const { dim, mlp_dim: wide } = trace.config;
  const tensor = tensorBoxes(trace, layer);
  const widened = `${count(dim)} to ${count(wide)}`;
  return diagram(500, 446, `Dense channel of layer ${layer}, token ${token}`,
    label(250, 16, `the channel adds, norm ${exact(added.data[token])}; the stream then ${exact(after.data[token])}`, "middle"),
    arrow([[250, 36], [250, 24]]),
    tensor({ x: 120, y: 36, width: 260, height: 54, title: "w_down", sub: `${count(wide)} to ${count(dim)}`, kind: "mlp", values: row["channel.output"], array: "channel.output", name: "tensor channel output" }),
    arrow([[250, 114], [250, 90]]),
    tensor({ x: 120, y: 114, width: 260, height: 42, title: "×, channel by channel", kind: "mlp", values: up && opened?.map((v, i) => v * up[i]), array: "mlp.up", words: ["silu(w_gate x) times w_up x"], name: "tensor product" }),
    arrow([[130, 190], [130, 156]]), arrow([[370, 266], [370, 156]]),
    tensor({ x: 50, y: 190, width: 160, height: 42, title: "SiLU", kind: "mlp", values: opened, array: "mlp.gate", words: ["x · sigmoid(x)"], name: "tensor silu" }),
    arrow([[130, 266], [130, 232]]),
    tensor({ x: 50, y: 266, width: 160, height: 54, title: "w_gate", sub: widened, kind: "mlp", values: gate, array: "mlp.gate", name: "tensor gate" }),
    tensor({ x: 290, y: 266, width: 160, height: 54, title: "w_up", sub: widened, kind: "mlp", values: up, array: "mlp.up", name: "tensor up" }),
    arrow([[250, 384], [250, 352], [130, 352], [130, 320]]), arrow([[250, 352], [370, 352], [370, 320]]),
    tokenBox(tensor, trace, token, { x: 120, y: 384, width: 260, array: "channel.input", values: row["channel.input"], norm: between.data[token] }));
}
