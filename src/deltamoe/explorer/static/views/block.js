/** The chosen block, opened: its mixer or its channel drawn as in the paper, with the chosen token's own numbers. */

import { button, choice, h, show } from "../draw/dom.js";
import { hideTooltip } from "../draw/tooltip.js";
import { visible } from "../draw/number.js";
import { headsOf } from "../panel.js";
import { kdaDiagram } from "./inside_kda.js";
import { mlaDiagram } from "./inside_mla.js";
import { mlpDiagram } from "./inside_mlp.js";
import { moeDiagram } from "./inside_moe.js";

/** @typedef {{trace: import("../trace.js").Trace, store: import("../store.js").Store, layer: number, token: number, head: number, expert: number}} Inside */

const DIAGRAMS = { kda: kdaDiagram, mla: mlaDiagram, moe: moeDiagram, mlp: mlpDiagram };
const NAMES = { kda: "KDA, the mixer", mla: "MLA, the mixer", moe: "MoE, the channel", mlp: "MLP, the channel" };

/** @param {HTMLElement} root @param {import("../trace.js").Trace} trace @param {import("../store.js").Store} store */
export function showBlock(root, trace, store) {
  let turn = 0;
  const head = h("div", { class: "section-head" });
  const place = h("div", { class: "block-place" });
  show(root, head, place);

  async function draw() {
    const mine = ++turn;
    const state = store.get();
    const layer = Math.min(state.layer, trace.layers.length - 1);
    const kind = trace.layers[layer][state.part || "channel"];
    const heads = state.part === "mixer" ? headsOf(trace.config, kind) : 0;
    const token = Math.min(store.shown(), trace.numTokens - 1);
    try {
      const drawing = await DIAGRAMS[kind]({ trace, store, layer, token, head: Math.min(state.head, Math.max(0, heads - 1)), expert: state.expert });
      if (mine !== turn) return;
      hideTooltip();
      show(head, h("h2", {}, `Layer ${layer}: ${NAMES[kind]}`), h("div", { class: "right" },
        heads > 0 && choice("head", Array.from({ length: heads }, (_, i) => /** @type {[number, string]} */ ([i, String(i)])), Math.min(state.head, heads - 1), (value) => store.set({ head: Number(value) })),
        button(state.part === "mixer" ? "to its channel" : "to its mixer", () => store.set({ part: state.part === "mixer" ? "channel" : "mixer" }), { title: "key m" })));
      show(place, drawing);
      place.dataset.token = String(token);
      place.setAttribute("aria-label", `Token ${token}: ${visible(trace.tokens[token].text)}`);
    } catch (error) {
      if (mine === turn) show(place, h("div", { class: "broken", role: "alert" }, h("span", {}, /** @type {Error} */ (error).message), button("Try again", draw)));
    }
  }

  draw();
  addEventListener("themechange", draw);
  const stop = store.subscribe((_, changed) => {
    if (["token", "preview", "layer", "part", "head", "expert"].some((key) => changed.has(key))) draw();
  });
  return () => {
    stop();
    removeEventListener("themechange", draw);
    turn++;
  };
}
