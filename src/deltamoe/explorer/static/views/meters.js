/** The strip at the top: what the model weighs and what this run cost, from the real tensors. */

import { h, show } from "../draw/dom.js";
import { bytes, count, percent, short } from "../draw/number.js";
import { explain } from "../draw/tooltip.js";

/** @param {string} name @param {any} value @param {import("../draw/tooltip.js").Lines} lines */
const meter = (name, value, lines, dataset = {}) => explain(
  h("div", { class: "meter", tabindex: 0, dataset }, h("span", { class: "meter-name" }, name), h("span", { class: "meter-value" }, value)), () => lines);

/** A bar within a bar. @param {number} part @param {number} whole */
const barInBar = (part, whole) => h("span", { class: "bar-in-bar", "aria-hidden": "true" }, h("i", { style: { width: `${(100 * part) / (whole || 1)}%` } }));

/**
 * @param {HTMLElement} root
 * @param {any} model the `model` of a trace's summary or of the server
 * @param {import("../trace.js").Trace | null} trace
 * @param {string} phase such as "reading"
 */
export function showMeters(root, model, trace, phase) {
  if (!model) {
    show(root);
    return;
  }
  const { total, active, by_part: parts, active_by_part: activeParts } = model.parameters;
  const flops = model.flops_per_next_token;
  const timings = trace?.summary.timings;
  const fixed = model.state_bytes;
  const each = model.cache_bytes_per_token;
  const length = trace?.numTokens ?? 0;
  const { num_layers: layers, vocab_size: vocab, dim } = model.config;
  show(root,
    meter("model", trace?.summary.source?.name ?? model.source?.name ?? "model", [
      "The model", ["layers", count(layers)], ["width D", count(dim)], ["vocabulary", count(vocab)], ["dtype", model.dtype], ["weights", bytes(model.weight_bytes)],
      ...(trace ? [/** @type {[string, string]} */ (["tokenizer", trace.summary.tokenizer.name])] : []),
    ]),
    meter("parameters, active of total", h("span", {}, `${short(active)} of ${short(total)}`, barInBar(active, total)), [
      "Parameters: one token uses a part", ["total", count(total)], ["active", `${count(active)} (${percent(active / total)})`],
      ...Object.keys(parts).filter((part) => parts[part]).map((part) => /** @type {[string, string]} */ ([part, `${count(activeParts[part])} of ${count(parts[part])}`])),
    ], { total, active }),
    meter("FLOPs a token", h("span", {}, `${short(flops.active)} of ${short(flops.all_experts)}`, barInBar(flops.active, flops.all_experts)), [
      `To make the next token at ${count(flops.context)} tokens`, ["as it runs", count(flops.active)], ["if every expert answered", count(flops.all_experts)],
    ]),
    meter("state, fixed", bytes(fixed), ["KDA's memory and convolution: the same at every length", ["bytes", count(fixed)]], { fixed }),
    meter("cache, growing", `${bytes(each)}/token${model.crossover_tokens ? `, > state at ${count(model.crossover_tokens)}` : ""}`, [
      "MLA's latents: more with every token", ["bytes a token", count(each)], ["bytes now", count(each * length)],
      ["as large as the state at", model.crossover_tokens ? `${count(model.crossover_tokens)} tokens` : "never: it does not grow"],
    ], { each }),
    timings && meter("tokens/s, read · written", `${short(timings.prefill_tokens_per_s)} · ${timings.decode_tokens_per_s ? short(timings.decode_tokens_per_s) : "–"}`, [
      "Measured while this text was made, nothing watching", ["reading the prompt (prefill)", `${short(timings.prefill_tokens_per_s)} tokens/s`],
      ["writing (decode)", timings.decode_tokens_per_s ? `${short(timings.decode_tokens_per_s)} tokens/s` : "nothing was written"],
      ["the watched pass", `${Number(timings.read_s.toPrecision(3))} s`],
    ]),
    meter("context", trace ? `${count(length)}${trace.limit ? ` of ${count(trace.limit)}` : ""}` : "–", ["Tokens in this trace", ["prompt", count(trace?.summary.num_prompt_tokens ?? 0)], ["written", count(length - (trace?.summary.num_prompt_tokens ?? 0))]]),
    meter("phase", h("span", { class: "phase" }, phase), ["What the program is doing", ["now", phase], ["the text ended because of", trace?.summary.finish_reason ?? "–"]]));
}
