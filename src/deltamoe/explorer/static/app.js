/** The page put together: where the trace comes from, and which part shows what. Everything else is in the modules. */

import { json, openTrace } from "./api.js";
import { record, showAsk } from "./ask.js";
import { button, h, show } from "./draw/dom.js";
import { exact } from "./draw/number.js";
import { keySheet, listenToKeys, playTokens } from "./keys.js";
import { createPanel, headsOf, showTabs } from "./panel.js";
import { createStore } from "./store.js";
import { startTheme, switchTheme } from "./theme.js";
import { readTraceFile } from "./trace.js";
import { showBlock } from "./views/block.js";
import { keptSheet } from "./views/kept.js";
import { showMeters } from "./views/meters.js";
import { showStack } from "./views/stack.js";
import { showTokens } from "./views/tokens.js";
import { VIEWS } from "./views/index.js";

const at = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const store = createStore(followHash);
const sheet = keySheet();
/** @type {{abort: AbortController | null, trace: import("./trace.js").Trace | null, model: any, status: any, phase: string, store: typeof store, file: ArrayBuffer | null, traceId: string, [more: string]: any}} */
const app = { store, trace: null, model: null, status: null, phase: "idle", abort: null, file: null, traceId: "" };
/** @type {(() => void)[]} */
let leave = [];

/** @param {string} phase */
function tell(phase) {
  app.phase = phase;
  showMeters(at("meters"), app.trace?.summary.model ?? app.model, app.trace, phase);
}

/** @param {string} words for those who do not see the page */
const announce = (words) => show(at("said"), words);

/** @param {Error} error */
function fail(error) {
  show(at("tokens"), h("div", { class: "broken", role: "alert" }, h("span", {}, error.message), app.trace && button("Back", () => open(/** @type {any} */ (app.trace)))));
}

/** What is known of a layer, in a few numbers. @param {number} layer @returns {import("./draw/tooltip.js").Lines} */
function layerNumbers(layer) {
  const said = app.trace?.summary.layers[layer] ?? app.model?.layers?.[layer];
  if (!said) return [`Layer ${layer}`];
  const names = { residual_after: "norm of the stream after it", half_life: "median half-life, tokens", beta: "mean beta", max_vio: "MaxVio", dormant_experts: "dormant experts", parameters: "parameters" };
  return [`Layer ${layer}: ${said.mixer.toUpperCase()} and ${said.channel === "moe" ? "MoE" : "MLP"}`,
    ...Object.entries(names).filter(([key]) => typeof said[key] === "number").map(([key, name]) => /** @type {[string, string]} */ ([name, exact(said[key])]))];
}

/**
 * Show a trace. If that fails, the one before it is what Back shows.
 * @param {import("./trace.js").Trace} trace @param {number} [token] the one to begin at
 * @param {{file: ArrayBuffer | null, traceId: string}} [from] where it came from
 */
function open(trace, token = store.get().token, from = app) {
  const before = { trace: app.trace, file: app.file, traceId: app.traceId };
  Object.assign(app, { file: from.file, traceId: from.traceId });
  try {
    draw(trace, token);
  } catch (error) {
    if (before.trace !== trace) Object.assign(app, before);
    store.set({ trace: app.traceId });
    throw new Error(`This recorded run cannot be shown: ${/** @type {Error} */ (error).message}`);
  }
  if (trace !== before.trace) app.ask?.fill(trace.summary.prompt);
}

/** @param {import("./trace.js").Trace} trace @param {number} token */
function draw(trace, token) {
  clear();
  app.trace = /** @type {any} */ (trace);
  trace.limit = app.status?.limits?.prompt_tokens;
  store.set({ ...within({ ...store.get(), token }), trace: app.traceId, preview: null, playing: false });
  if (!store.get().part) panel.follow();
  const parts = [ // each is left again even if the next one cannot be drawn
    () => showTokens(at("tokens"), trace, store, app.traceId ? goTo : null),
    () => showStack(at("stack"), trace.config, trace.layers, store, layerNumbers),
    () => showBlock(at("block"), trace, store),
  ];
  for (const part of parts) leave.push(part());
  tell(trace.summary.finish_reason === "end" ? "ended" : "done");
  panel.draw();
  announce(`${trace.numTokens} tokens`);
}

/** Nothing that is shown hears of changes any more. */
function clear() {
  leave.forEach((run) => run());
  leave = [];
}

/** What there is of what is wanted. @param {Partial<import("./store.js").State>} wanted */
function within(wanted) {
  if (!app.trace) return wanted;
  const { numTokens, layers, config } = app.trace;
  const most = { token: numTokens - 1, layer: layers.length - 1, expert: (config.moe?.num_experts ?? 1) - 1 };
  const kept = Object.entries(most).filter(([key]) => key in wanted).map(([key, last]) => [key, Math.min(/** @type {any} */ (wanted)[key], last)]);
  return { ...wanted, ...Object.fromEntries(kept) };
}

/** Go where a changed address says. @param {Partial<import("./store.js").State>} wanted */
async function followHash({ trace, ...rest }) {
  if (trace && trace !== app.traceId) await goTo(trace);
  store.set(within(rest));
}

let opening = 0;

/** What is asked for last is what is shown: whatever is on its way, a recording too, ends. @returns {() => boolean} is it still the last? */
function supersede() {
  app.abort?.abort();
  app.abort = null;
  app.ask?.busy(false);
  const mine = ++opening;
  return () => mine === opening;
}

/** @param {File} file */
async function openFile(file) {
  const isLast = supersede();
  try {
    const bytes = await file.arrayBuffer();
    if (isLast()) open(readTraceFile(bytes), 0, { file: bytes, traceId: "" });
  } catch (error) {
    if (isLast()) fail(/** @type {Error} */ (error));
  }
}

/** @param {string} id @param {number | undefined} token @param {() => boolean} isLast */
async function openId(id, token, isLast) {
  const trace = await openTrace(id);
  if (isLast()) open(trace, token, { file: null, traceId: id });
}

/** Show a recorded run that the server keeps; if it is gone, that is said. @param {string} id @param {number} [token] */
function goTo(id, token) {
  const isLast = supersede();
  return openId(id, token, isLast).catch((error) => isLast() && fail(error));
}

/** @param {string} path @param {any} body @param {number} [token] the one to show afterwards */
async function recordTrace(path, body, token = 0) {
  const isLast = supersede();
  const abort = (app.abort = new AbortController());
  ask.busy(true);
  store.set({ playing: false });
  clear();
  try {
    const id = await record(at("tokens"), path, body, abort.signal, tell, (app.trace?.config ?? app.model?.config)?.num_layers ?? 0);
    performance.mark("answered");
    await openId(id, token, isLast);
  } catch (error) {
    if (!isLast()) return;
    if (abort.signal.aborted) {
      if (app.trace) open(app.trace);
      else show(at("tokens"), h("div", { class: "empty" }, "Stopped."));
    } else fail(/** @type {Error} */ (error));
    tell("idle");
  } finally {
    if (isLast()) {
      app.abort = null;
      ask.busy(false);
    }
  }
}

/** Another text from here on. @param {number} token @param {number} id */
app.branch = (token, id) => recordTrace("api/branch", { trace: app.traceId, token, id, ...ask.sampling() }, token + 1);
app.canBranch = () => app.status?.mode === "live" && Boolean(app.traceId);
app.record = recordTrace;
app.tell = tell;

/** What stands in the middle before anything is recorded. */
const welcome = () => h("div", { class: "empty" },
  h("h2", {}, "See the model think"),
  h("p", {}, "Type a prompt above. The model reads it and goes on as it always does; then it reads the whole text once more, watched, and every number on this page is one of that reading."),
  h("ul", {}, ...[
    ["Point at a token", "to look at it, click to stay with it, step with the arrow keys, play with Space."],
    ["Click a block of the stack", "and it opens here: the router and its experts, KDA's memory, MLA's latent cache."],
    ["Every mark has its exact number", "under the pointer, and every view its key: press ? for the list."],
  ].map(([what, why]) => h("li", {}, h("b", {}, what), " ", why))));

/** The trace that was put into this page when it was exported. */
function inlined() {
  const element = document.getElementById("deltamoe-trace");
  if (!element) return null;
  const text = atob(/** @type {string} */ (element.textContent));
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  return bytes.buffer;
}

startTheme();
const views = VIEWS.flat();
app.views = views;
const panel = createPanel(at("panel"), /** @type {HTMLElement} */ (document.querySelector("main")), views, app);
app.panel = panel;
app.trouble = fail;
showTabs(at("tabs"), VIEWS, store);
show(at("buttons"), button("◐", switchTheme, { class: "quiet", title: "dark or light (t)", "aria-label": "Dark or light" }), button("?", () => sheet.showModal(), { class: "quiet", title: "keys (?)", "aria-label": "Keys" }));

const file = inlined();
if (!file) {
  try {
    app.status = await json("api/status");
    if (app.status.mode !== "runs") app.model = await json("api/model");
    else store.set({ view: "runs" }); // a run without a checkpoint: its training is all there is
  } catch (error) {
    fail(/** @type {Error} */ (error));
  }
}
const kept = keptSheet(() => app.traceId, goTo);
const ask = showAsk(/** @type {HTMLFormElement} */ (at("ask")), { record: recordTrace, stop: () => app.abort?.abort(), openFile, showKept: kept.show }, app.status);
app.ask = ask;
listenToKeys(store, {
  trace: () => app.trace,
  views: views.map((view) => view.id),
  toPrompt: ask.focus,
  toKept: () => app.status?.mode === "live" && kept.show(),
  theme: switchTheme,
  sheets: [sheet, kept.sheet],
  help: () => sheet.showModal(),
  layers: () => app.trace?.layers.length ?? 0,
  sizes: (layer) => ({ heads: headsOf(app.trace?.config ?? {}, app.trace?.layers[layer]?.mixer ?? ""), experts: app.trace?.config.moe?.num_experts ?? 0 }),
});
playTokens(store, () => app.trace);

tell("idle");
const wanted = [store.get().trace, app.status?.trace].filter(Boolean);
try {
  if (file) {
    open(readTraceFile(file), undefined, { file, traceId: "" });
  } else if (wanted.length) {
    const isLast = supersede();
    await openId(wanted[0], undefined, isLast).catch((error) => (wanted[1] ? openId(wanted[1], undefined, isLast) : Promise.reject(error)));
  }
} catch (error) {
  store.set({ trace: "" });
  fail(/** @type {Error} */ (error));
}
if (!app.trace) {
  if (app.model) leave.push(showStack(at("stack"), app.model.config, app.model.layers, store, layerNumbers));
  if (app.status && !wanted.length) show(at("tokens"), h("div", { class: "empty" }, "The tokens of your text will stand here and drive everything below."));
  show(at("block"), welcome());
  panel.draw();
}
document.body.dataset.started = "true";
