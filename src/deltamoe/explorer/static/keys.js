/** A key for everything, and the sheet that lists them. */

import { h } from "./draw/dom.js";

/** @type {[string, string][]} */
const SHEET = [
  ["← →", "one token back or on; with Shift ten"], ["Home End", "first, last token"], ["Space", "play or pause along the tokens"],
  ["↑ ↓", "a layer up or down"], ["m", "open the block's mixer or its channel"], ["[ ]", "previous, next head"], [", .", "previous, next expert"],
  ["1 … 9", "a view by its place"], ["v V", "next, previous view"], ["/", "to the prompt"], ["k", "the recorded runs that are kept"], ["t", "dark or light"], ["?", "this sheet"], ["Esc", "close; leave the prompt"],
];

/** @returns {HTMLDialogElement} */
export function keySheet() {
  const dialog = /** @type {HTMLDialogElement} */ (h("dialog", { class: "keys", "aria-label": "Keys" },
    h("h2", {}, "Keys"),
    h("dl", {}, ...SHEET.flatMap(([keys, does]) => [h("dt", {}, ...keys.split(" ").map((key) => [h("kbd", {}, key), " "]).flat()), h("dd", {}, does)])),
    h("form", { method: "dialog" }, h("button", { class: "primary" }, "Close"))));
  document.body.append(dialog);
  return dialog;
}

/**
 * @param {import("./store.js").Store} store
 * @param {Object} app
 * @param {() => import("./trace.js").Trace | null} app.trace
 * @param {string[]} app.views in the order of the tabs
 * @param {() => void} app.toPrompt @param {() => void} app.toKept @param {() => void} app.theme @param {() => void} app.help
 * @param {HTMLDialogElement[]} app.sheets while one lies open, keys are its own
 * @param {(layer: number) => {heads: number, experts: number}} app.sizes
 * @param {() => number} app.layers
 */
export function listenToKeys(store, { trace, views, toPrompt, toKept, theme, sheets, help, sizes, layers }) {
  const within = (/** @type {number} */ value, /** @type {number} */ size) => Math.min(Math.max(0, value), Math.max(0, size - 1));
  const turn = (/** @type {number} */ value, /** @type {number} */ size) => (size ? (value + size) % size : 0);
  addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    const isTyping = target.matches("input, textarea, select, [contenteditable]");
    if (event.key === "Escape" && isTyping) target.blur();
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || sheets.some((sheet) => sheet.open)) return;
    const state = store.get();
    const tokens = trace()?.numTokens ?? 0;
    const far = event.shiftKey ? 10 : 1;
    const { heads, experts } = sizes(state.layer);
    const view = views.indexOf(state.view);
    /** @type {Record<string, () => void>} */
    const does = {
      ArrowLeft: () => store.set({ token: within(state.token - far, tokens), preview: null }),
      ArrowRight: () => store.set({ token: within(state.token + far, tokens), preview: null }),
      Home: () => store.set({ token: 0 }),
      End: () => store.set({ token: within(Infinity, tokens) }),
      " ": () => store.set({ playing: !state.playing && tokens > 0 }),
      ArrowUp: () => store.set({ layer: within(state.layer + 1, layers()) }),
      ArrowDown: () => store.set({ layer: within(state.layer - 1, layers()) }),
      m: () => store.set({ part: state.part === "mixer" ? "channel" : "mixer" }),
      "[": () => store.set({ head: turn(state.head - 1, heads) }),
      "]": () => store.set({ head: turn(state.head + 1, heads) }),
      ",": () => store.set({ expert: turn(state.expert - 1, experts) }),
      ".": () => store.set({ expert: turn(state.expert + 1, experts) }),
      v: () => store.set({ view: views[turn(view + 1, views.length)] }),
      V: () => store.set({ view: views[turn(view - 1, views.length)] }),
      "/": toPrompt,
      k: toKept,
      t: theme,
      "?": help,
    };
    const isButton = target.matches("button, summary, a") && (event.key === " " || event.key === "Enter");
    const run = /^[1-9]$/.test(event.key) ? () => views[Number(event.key) - 1] && store.set({ view: views[Number(event.key) - 1] }) : does[event.key];
    if (!run || isButton) return;
    event.preventDefault();
    run();
  });
}

const STEP_MS = 450;

/** Move along the tokens while the store says so. @param {import("./store.js").Store} store @param {() => import("./trace.js").Trace | null} trace */
export function playTokens(store, trace) {
  let timer = 0;
  store.subscribe(({ playing }, changed) => {
    if (!changed.has("playing")) return;
    document.body.classList.toggle("is-playing", playing);
    clearInterval(timer);
    if (playing) {
      timer = setInterval(() => {
        const { token } = store.get();
        const last = (trace()?.numTokens ?? 0) - 1;
        if (token >= last) store.set({ playing: false });
        else store.set({ token: token + 1, preview: null });
      }, STEP_MS);
    }
  });
}
