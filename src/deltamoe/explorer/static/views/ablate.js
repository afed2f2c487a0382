/** Ablate: the same text with a part switched off. */

import { json } from "../api.js";
import { button, choice, h, show } from "../draw/dom.js";
import { lineChart } from "../draw/line.js";
import { exact, probability, visible } from "../draw/number.js";
import { facts, figure, headsOf } from "../panel.js";

/** @typedef {{kind: "layers" | "heads" | "experts", layer: number, index: number}} Part */

/** What is switched off; kept while the reader looks at other views. @type {Part[]} */
let off = [];
let expertsAre = "never_chosen";
/** The last question and its answer. @type {{key: string, answer: Promise<any>} | null} */
let last = null;
let turn = 0;

/** What the model makes of a trace with the parts off; the same question is asked once. @param {string} trace @returns {Promise<any>} */
function outcomeOf(trace) {
  const pairs = (/** @type {string} */ kind) => off.filter((part) => part.kind === kind).map((part) => [part.layer, part.index]);
  const body = { trace, layers: pairs("layers").map(([one]) => one), heads: pairs("heads"), experts: pairs("experts"), experts_are: expertsAre };
  const key = JSON.stringify(body);
  if (last?.key !== key) {
    const asked = { key, answer: json("api/ablate", body) };
    last = asked;
    asked.answer.catch(() => { if (last === asked) last = null; });
  }
  return last.answer;
}

/** @param {Part} part */
const nameOf = ({ kind, layer, index }) => (kind === "layers" ? `layer ${layer}` : `${kind.slice(0, -1)} ${index} of layer ${layer}`);

/** @type {import("../panel.js").View} */
export const ablate = {
  id: "ablate",
  title: "Ablate",
  explain: "Switch off a layer, a head or an expert and read the text again: what changes in the next token and in the surprise of every token tells what the part was good for here.",
  docs: "docs/explorer.md, POST /api/ablate",
  needs: "trace",
  depends: ["layer", "head", "expert"],
  async draw({ trace, store, width, app }) {
    if (!app.canBranch()) {
      return { element: h("div", { class: "empty" }, "Switching a part off needs the model itself, and this is a recorded run. Open the model: ", h("code", {}, "deltamoe explore RUN"), ".") };
    }
    const { layer, head, expert } = store.get();
    const { mixer, channel } = trace.layers[layer];
    const heads = headsOf(trace.config, mixer);
    const result = h("div", {});
    const chips = h("div", { class: "controls" });
    const add = (/** @type {Part} */ part) => {
      if (!off.some((one) => nameOf(one) === nameOf(part))) off = [...off, part];
      run();
    };
    const layers = trace.layers.map((one, i) => /** @type {[number, string]} */ ([i, `${i} ${one.mixer.toUpperCase()}+${one.channel === "moe" ? "MoE" : "MLP"}`]));
    const range = (/** @type {number} */ size) => Array.from({ length: size }, (_, i) => /** @type {[number, string]} */ ([i, String(i)]));
    const group = (/** @type {any[]} */ ...parts) => h("span", { class: "control-group" }, ...parts);
    const controls = h("div", { class: "controls" },
      group(choice("layer", layers, layer, (value) => store.set({ layer: Number(value) })), button("Layer off", () => add({ kind: "layers", layer, index: 0 }))),
      heads > 0 && group(choice("head", range(heads), Math.min(head, heads - 1), (value) => store.set({ head: Number(value) })),
        button("Head off", () => add({ kind: "heads", layer, index: Math.min(head, heads - 1) }))),
      channel === "moe" && group(choice("expert", range(trace.config.moe.num_experts), expert, (value) => store.set({ expert: Number(value) })),
        button("Expert off", () => add({ kind: "experts", layer, index: expert }))),
      channel === "moe" && choice("its place is", [["never_chosen", "taken by the next best"], ["silent", "left silent"]], expertsAre, (value) => { expertsAre = value; run(); }));

    async function run() {
      const mine = ++turn;
      show(chips, off.length ? h("span", { class: "note" }, "off:") : h("span", { class: "note" }, "Nothing is off. Choose a part and switch it off."),
        ...off.map((part) => button(`${nameOf(part)} ✕`, () => { off = off.filter((one) => one !== part); run(); })));
      if (!off.length) {
        show(result);
        return;
      }
      show(result, h("div", { class: "loading" }));
      try {
        const answer = await outcomeOf(app.traceId);
        if (mine !== turn) return;
        show(result, outcome(answer, trace, width, store));
        result.dataset.ready = "true";
      } catch (error) {
        if (mine === turn) show(result, h("div", { class: "broken", role: "alert" }, /** @type {Error} */ (error).message));
      }
    }
    run();
    return { element: [controls, chips, result] };
  },
};

/** @param {any} answer @param {import("../trace.js").Trace} trace @param {number} width @param {import("../store.js").Store} store */
function outcome({ before, after, divergence, by_token: byToken }, trace, width, store) {
  const later = new Map(after.next.map((/** @type {any} */ one) => [one.id, one.probability]));
  const earlier = new Map(before.next.map((/** @type {any} */ one) => [one.id, one.probability]));
  const ids = [...new Set([...before.next.slice(0, 8), ...after.next.slice(0, 8)].map((one) => one.id))];
  const text = new Map([...before.next, ...after.next].map((/** @type {any} */ one) => [one.id, one.text]));
  const most = Math.max(before.next[0].probability, after.next[0].probability);
  const bar = (/** @type {number | undefined} */ p, /** @type {string} */ className) => h("span", { class: "bar-track" }, h("span", { class: `bar-fill ${className}`, style: { width: `${(100 * (p ?? 0)) / most}%` } }));
  const say = (/** @type {number | undefined} */ p) => (p === undefined ? "not in 20" : probability(p));
  const surprise = lineChart([
    { name: "as it is", y: byToken.surprise_before }, { name: "with the part off", y: byToken.surprise_after, className: "is-lit", colour: "var(--accent)" },
  ], { width, height: 150, xTitle: "token", yTitle: "surprise, nats", pick: (t) => store.set({ token: t }) });
  const moved = lineChart([{ name: "KL(before ‖ after)", y: byToken.divergence, className: "is-lit" }], { width, height: 120, xTitle: "token", yTitle: "divergence of what follows it, nats", pick: (t) => store.set({ token: t }) });
  return [
    facts([["loss before", before.loss === null ? "–" : `${exact(before.loss)} nats`], ["loss after", after.loss === null ? "–" : `${exact(after.loss)} nats`],
      ["change", before.loss === null ? "–" : `${after.loss >= before.loss ? "+" : ""}${exact(after.loss - before.loss)} nats`], ["divergence of the next token", `${exact(divergence)} nats`],
      ["entropy of the next token", `${exact(before.entropy)} → ${exact(after.entropy)}`]]),
    figure(`What follows the last token, “${visible(trace.tokens[trace.numTokens - 1].text)}”`, h("span", { class: "note" }, "grey before, lit after"),
      h("div", { class: "bars two" }, ...ids.map((id) => h("div", { class: "bar" }, h("span", { class: "bar-label" }, visible(/** @type {string} */ (text.get(id)))),
        h("span", {}, bar(/** @type {any} */ (earlier.get(id)), ""), bar(/** @type {any} */ (later.get(id)), "is-after")), h("span", { class: "bar-value" }, say(/** @type {any} */ (earlier.get(id)))), h("span", { class: "bar-value" }, say(/** @type {any} */ (later.get(id)))))))),
    figure("Surprise of every token", null, surprise.element),
    figure("How far the prediction behind every token moved", null, moved.element),
  ];
}
