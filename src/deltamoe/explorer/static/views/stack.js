/**
 * The stack as the config describes it: tokens enter at the bottom. Equal blocks share one frame with
 * "N ×" beside it, as in the paper's figure; every layer can be had by its number, or all unfolded.
 */

import { h, show } from "../draw/dom.js";
import { count } from "../draw/number.js";
import { explain } from "../draw/tooltip.js";

/** @typedef {{mixer: string, channel: string, layers: number[]}} Run equal blocks that follow one another */
/** @typedef {{times: number, runs: Run[]}} Group runs that repeat; each run's layers are those of all repeats */

const NAMES = { kda: "KDA", mla: "MLA", moe: "MoE", mlp: "MLP" };
const MEANING = {
  kda: "Kimi Delta Attention: a memory of fixed size, corrected by every token and forgetting channel by channel",
  mla: "Multi-head latent attention: looks back at the latent of every token; its cache grows",
  moe: "Sparse experts: the router sends each token to a few of many small MLPs",
  mlp: "A dense channel: every token goes through the same wide MLP",
};

/** Equal neighbours in one run. @param {{mixer: string, channel: string}[]} layers @returns {Run[]} */
export function runsOf(layers) {
  /** @type {Run[]} */
  const runs = [];
  layers.forEach(({ mixer, channel }, layer) => {
    const last = runs.at(-1);
    if (last && last.mixer === mixer && last.channel === channel) last.layers.push(layer);
    else runs.push({ mixer, channel, layers: [layer] });
  });
  return runs;
}

/** Repeated pairs of runs in one group. @param {Run[]} runs @returns {Group[]} */
export function groupsOf(runs) {
  const isSame = (/** @type {Run | undefined} */ a, /** @type {Run | undefined} */ b) =>
    Boolean(a && b && a.mixer === b.mixer && a.channel === b.channel && a.layers.length === b.layers.length);
  /** @type {Group[]} */
  const groups = [];
  for (let i = 0; i < runs.length;) {
    let times = 1;
    while (runs[i].mixer === "kda" && i + 1 < runs.length && isSame(runs[i], runs[i + 2 * times]) && isSame(runs[i + 1], runs[i + 1 + 2 * times])) times++;
    if (times > 1) {
      const merged = [0, 1].map((which) => ({
        ...runs[i + which], layers: Array.from({ length: times }, (_, k) => runs[i + which + 2 * k].layers).flat(),
      }));
      groups.push({ times, runs: merged });
      i += 2 * times;
    } else {
      groups.push({ times: 1, runs: [runs[i]] });
      i += 1;
    }
  }
  return groups;
}

/**
 * @param {HTMLElement} root @param {any} config @param {{mixer: string, channel: string}[]} layers
 * @param {import("../store.js").Store} store @param {(layer: number) => import("../draw/tooltip.js").Lines} numbersOf
 */
export function showStack(root, config, layers, store, numbersOf) {
  let isOpen = layers.length <= 2;
  const drawing = h("div", { class: "stack-drawing" });
  const toggle = h("button", { type: "button", class: "quiet", on: { click: () => { isOpen = !isOpen; draw(); } } });

  /** One block with its two halves. @param {Run} run @param {number} layer @param {number} times */
  function block(run, layer, times) {
    const state = store.get();
    const isChosen = run.layers.includes(state.layer);
    const half = (/** @type {"mixer" | "channel"} */ part, /** @type {string} */ kind) => explain(h("button", {
      type: "button", class: `half is-${kind}${isChosen && state.part === part ? " is-chosen" : ""}`,
      "aria-pressed": isChosen && state.part === part,
      "aria-label": `${NAMES[/** @type {"kda"} */ (kind)]} of layer ${isChosen ? state.layer : layer}`,
      on: { click: () => store.set({ layer: isChosen ? state.layer : layer, part }) },
    }, NAMES[/** @type {"kda"} */ (kind)]), () => [NAMES[/** @type {"kda"} */ (kind)], MEANING[/** @type {"kda"} */ (kind)]]);
    const chips = run.layers.length > 1 && h("div", { class: "layer-chips" }, ...run.layers.map((index) => explain(h("button", {
      type: "button", class: `layer-chip${index === state.layer ? " is-chosen" : ""}`, "aria-label": `Layer ${index}`, on: { click: () => store.set({ layer: index }) },
    }, index), () => numbersOf(index))));
    return h("div", { class: `block${isChosen ? " is-chosen" : ""}` },
      h("div", { class: "block-count" }, run.layers.length > 1 ? [h("b", {}, `${times} ×`)] : h("span", {}, `layer ${layer}`)),
      h("div", { class: "block-frame" },
        h("span", { class: "joint" }, "+"), half("channel", run.channel), h("span", { class: "norm" }, "norm"),
        h("span", { class: "joint" }, "+"), half("mixer", run.mixer), h("span", { class: "norm" }, "norm")),
      chips);
  }

  function draw() {
    const runs = runsOf(layers);
    const groups = isOpen
      ? layers.map((one, layer) => ({ times: 1, runs: [{ ...one, layers: [layer] }] }))
      : groupsOf(runs);
    show(toggle, isOpen ? "fold equal layers" : "every layer");
    toggle.hidden = runs.length === layers.length && !isOpen;
    const schedule = runs.map((run) => `${run.layers.length} × ${NAMES[/** @type {"kda"} */ (run.mixer)]}+${NAMES[/** @type {"moe"} */ (run.channel)]}`).join(", ");
    show(drawing,
      h("div", { class: "end" }, "next token"),
      h("div", { class: "plain" }, `head, ${count(config.vocab_size)} rows`), h("div", { class: "plain is-thin" }, "norm"),
      ...groups.toReversed().map((group) => {
        const inner = group.runs.toReversed().map((run) => block(run, run.layers[0], run.layers.length / group.times));
        return group.times > 1
          ? h("div", { class: "repeat" }, h("div", { class: "repeat-count" }, `${group.times} ×`), h("div", { class: "repeat-frame" }, inner))
          : inner;
      }),
      h("div", { class: "plain" }, `embedding, D = ${count(config.dim)}`), h("div", { class: "end" }, "tokens"));
    drawing.setAttribute("aria-label", `From the bottom: ${schedule}`);
    drawing.querySelector(".half.is-chosen")?.scrollIntoView({ block: "nearest" });
  }

  show(root, h("div", { class: "section-head" }, h("h2", {}, "Stack"), toggle), drawing);
  draw();
  return store.subscribe((_, changed) => {
    if (changed.has("layer") || changed.has("part")) draw();
  });
}
