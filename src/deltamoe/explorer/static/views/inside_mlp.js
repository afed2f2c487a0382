/** Inside a dense channel: the same wide MLP for every token. */

import { arrow, box, diagram, label, node } from "../draw/diagram.js";
import { count, exact, visible } from "../draw/number.js";

/** @param {import("./block.js").Inside} inside */
export async function mlpDiagram({ trace, layer, token }) {
  const [between, added, after] = await trace.arrays(["residual.between", "residual.channel", "residual.after"], layer);
  const { dim, mlp_dim: wide } = trace.config;
  const text = visible(trace.tokens[token].text);
  return diagram(500, 420, `Dense channel of layer ${layer}, token ${token}`,
    label(250, 16, `the channel adds, norm ${exact(added.data[token])}; the stream then ${exact(after.data[token])}`, "middle"),
    arrow([[250, 50], [250, 24]]),
    box({ x: 150, y: 50, width: 200, height: 40, title: "w_down", sub: `${count(wide)} to ${count(dim)}`, kind: "mlp" }),
    arrow([[250, 119], [250, 90]]),
    node(250, 130, "×", ["Channel by channel", "silu(w_gate x) times w_up x"]),
    arrow([[130, 200], [130, 130], [239, 130]]), arrow([[370, 260], [370, 130], [261, 130]]),
    box({ x: 80, y: 200, width: 100, height: 24, title: "SiLU", kind: "mlp" }),
    arrow([[130, 260], [130, 224]]),
    box({ x: 50, y: 260, width: 160, height: 40, title: "w_gate", sub: `${count(dim)} to ${count(wide)}`, kind: "mlp" }),
    box({ x: 290, y: 260, width: 160, height: 40, title: "w_up", sub: `${count(dim)} to ${count(wide)}`, kind: "mlp" }),
    arrow([[250, 360], [250, 330], [130, 330], [130, 300]]), arrow([[250, 330], [370, 330], [370, 300]]),
    box({ x: 120, y: 360, width: 260, height: 40, title: `token ${token}: “${text.slice(0, 18)}”`, sub: `the normed stream; its norm before: ${exact(between.data[token])}`, name: "token" }));
}
