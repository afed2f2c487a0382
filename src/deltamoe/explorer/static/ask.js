/** The prompt: what the model is to read and how far it goes on; and the run while it is made. */

import { button, h, put, show } from "./draw/dom.js";
import { visible } from "./draw/number.js";
import { events } from "./api.js";

/**
 * @param {HTMLFormElement} root
 * @param {Object} app
 * @param {(path: string, body: any) => void} app.record
 * @param {() => void} app.stop
 * @param {(file: File) => void} app.openFile
 * @param {() => void} app.showKept
 * @param {any} status of the server; null for a page without one
 */
export function showAsk(root, { record, stop, openFile, showKept }, status) {
  const prompt = /** @type {HTMLTextAreaElement} */ (h("textarea", { class: "prompt", name: "prompt", "aria-label": "Prompt", rows: 1, placeholder: "Type a text and press Enter: every step of the model is recorded", spellcheck: "false", maxlength: 40000 }));
  const most = status?.limits?.prompt_tokens ?? 512;
  const number = (/** @type {string} */ name, /** @type {any} */ more) => /** @type {HTMLInputElement} */ (h("input", { class: "number", type: "number", name, "aria-label": name, ...more }));
  const length = number("tokens to write", { min: 0, max: most, step: 1, value: 24 });
  const temperature = number("temperature", { min: 0, max: 2, step: 0.1, value: 0.7 });
  const seed = number("seed", { min: 0, max: 2 ** 31 - 1, step: 1, value: 1 });
  const go = h("button", { type: "submit", class: "primary" }, "Trace");
  const halt = button("Stop", stop, { hidden: true });
  const file = /** @type {HTMLInputElement} */ (h("input", { type: "file", hidden: true, accept: ".safetensors,.trace", "aria-label": "Trace file", on: {
    change: () => { const [chosen] = file.files ?? []; if (chosen) openFile(chosen); file.value = ""; } } }));
  const isLive = status?.mode === "live";
  show(root,
    isLive ? [prompt, h("label", { class: "field" }, "write", length), h("label", { class: "field" }, "temperature", temperature), h("label", { class: "field" }, "seed", seed), go, halt]
      : h("span", { class: "note", style: { flex: "1" } }, status?.mode === "runs" ? "This run has no checkpoint yet: its training is shown. Open it again later to type a prompt." : status ? "A trace file is open. To type a prompt, open a model: deltamoe explore RUN" : "A recorded run, opened without a server: everything here is in the file."),
    isLive && button("Recorded", showKept, { title: "the recorded runs of this session (k)" }),
    button("Open a trace file", () => file.click(), { title: "or drop one on the page" }), file);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    root.requestSubmit();
  });
  root.onsubmit = (event) => {
    event.preventDefault();
    if (!isLive || !prompt.value || /** @type {HTMLButtonElement} */ (go).disabled) return;
    prompt.blur();
    record("api/trace", { prompt: prompt.value, ...sampling() });
  };
  const sampling = () => ({ max_new_tokens: length.valueAsNumber || 0, temperature: temperature.valueAsNumber || 0, ...(seed.value === "" ? {} : { seed: seed.valueAsNumber }) });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    const [dropped] = event.dataTransfer?.files ?? [];
    if (dropped) openFile(dropped);
  });
  return {
    sampling,
    focus: () => prompt.focus(),
    /** @param {string} text */
    fill(text) {
      if (document.activeElement !== prompt) prompt.value = text; // nobody is typing
    },
    /** @param {boolean} isBusy */
    busy(isBusy) {
      /** @type {HTMLButtonElement} */ (go).disabled = isBusy;
      halt.hidden = !isBusy;
    },
  };
}

/**
 * Record a run and say on the way what is happening.
 * @param {HTMLElement} root where the tokens will be @param {string} path @param {any} body @param {AbortSignal} signal
 * @param {(phase: string) => void} tell @param {number} layers
 * @returns {Promise<string>} id of the trace
 */
export async function record(root, path, body, signal, tell, layers) {
  const text = h("p", {});
  const note = h("span", { class: "note" }, "reading");
  show(root, h("div", { class: "progress" }, text, note));
  let id = "";
  tell("reading");
  for await (const { event, data } of events(path, body, signal)) {
    if (event === "start") put(text, data.tokens.map((/** @type {any} */ token) => (token.is_special ? "" : token.text)).join(""));
    else if (event === "token") {
      tell("writing");
      show(note, `writing, token ${data.position}`);
      put(text, h("span", { class: "written" }, data.is_special ? visible(data.text) : data.text));
    } else if (event === "layer_summary") {
      tell("measuring");
      show(note, `measuring, layer ${data.layer + 1} of ${layers}`);
    } else if (event === "done") id = data.id;
  }
  if (id) return id;
  throw new Error("The server ended the recording without a trace. Its log says why.");
}
