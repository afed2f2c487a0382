/** Chat: a conversation with the live model, streamed; of a base model one text that both write on. */

import { createConversation } from "../conversation.js";
import { button, h, show } from "../draw/dom.js";
import { bytes, count, exact } from "../draw/number.js";
import { explain } from "../draw/tooltip.js";
import { showTurns } from "./turns.js";

/** @type {ReturnType<typeof build> | null} it goes on, half-written words and all, while the reader looks at other views */
let built = null;

const PHASES = { idle: "idle", waiting: "waiting for the model", reading: "reading", writing: "writing" };
const SAMPLING = /** @type {[string, string, Record<string, any>, string][]} */ ([
  ["max_tokens", "tokens at most", { min: 1, max: 4096, step: 1 }, "The answer ends after so many tokens"],
  ["temperature", "temperature", { min: 0, max: 2, step: 0.1 }, "0 takes the likeliest token every time"],
  ["top_p", "top-p", { min: 0.01, max: 1, step: 0.01, placeholder: "1" }, "Only the likeliest tokens that make up this share are drawn from"],
  ["top_k", "top-k", { min: 1, step: 1, placeholder: "all" }, "Only so many of the likeliest tokens are drawn from"],
  ["seed", "seed", { min: 0, max: 2 ** 31 - 1, step: 1, placeholder: "any" }, "The same seed gives the same answer again; empty draws another one each time"],
]);

/** @type {import("../panel.js").View} */
export const chat = {
  id: "chat",
  title: "Chat",
  explain: "Talk with the model that is open. It reads the whole conversation, so any turn can be edited and the rest comes anew. The same text can then be traced, token by token.",
  docs: "docs/explorer.md, POST /api/chat",
  needs: "server",
  isWide: true,
  async draw({ app, store }) {
    if (!app.status.chat) return { element: h("div", { class: "empty" }, "A trace file is open, and a file cannot answer. To talk, open the model: ", h("code", {}, "deltamoe explore RUN"), ".") };
    built ??= build(app, store);
    const { element, settle } = built;
    requestAnimationFrame(settle);
    return { element };
  },
};

/** The view, once. @param {any} app @param {import("../store.js").Store} store */
function build(app, store) {
  const conversation = createConversation(app.status.source.name, app.status.chat);
  const turns = showTurns(conversation);
  const side = aside(conversation, app);
  const again = button("Regenerate", () => conversation.regenerate(conversation.get().turns.length - 1), { title: "another answer in the place of the last one" });
  const trace = button("Trace this conversation", traceIt, { title: "record what the model does while it reads this text, and look at it" });
  const anew = button("New conversation", () => { conversation.clear(); composer.focus(); });
  const composer = compose(conversation, [again, trace, anew]);

  async function traceIt() {
    const before = app.traceId;
    const asked = conversation.form === "text" ? { prompt: conversation.text() } : { messages: conversation.messages() };
    await app.record?.("api/trace", { ...asked, max_new_tokens: 0 }, LAST);
    if (app.traceId !== before) store.set({ view: "sparse" });
  }

  /** @param {import("../conversation.js").Talk} talk @param {string | null} piece */
  function update(talk, piece) {
    turns.update(talk, piece);
    side.update(talk);
    if (piece !== null) return;
    composer.update(talk);
    const isBusy = talk.phase !== "idle";
    const last = talk.turns.at(-1);
    again.hidden = last?.role !== "assistant";
    for (const one of [again, trace, anew]) one.disabled = isBusy || !last;
  }
  conversation.subscribe(update);
  conversation.subscribe(({ phase }, piece) => piece === null && app.tell?.(PHASES[phase]));
  update(conversation.get(), null);
  const element = h("div", { class: "chat", dataset: { form: conversation.form } }, h("section", { class: "chat-main" }, turns.element, composer.element), side.element);
  /** @type {HTMLElement | null} */
  let focused = null;
  element.addEventListener("focusin", (event) => { focused = /** @type {HTMLElement} */ (event.target); });
  element.addEventListener("focusout", () => { if (element.isConnected && document.hasFocus()) setTimeout(() => { if (element.isConnected) focused = null; }); });
  return {
    element,
    /** Put back what was taken out of the page: where one wrote, and the end of the text in sight. */
    settle() {
      turns.toEnd();
      if (document.activeElement === document.body) focused?.focus({ preventScroll: true });
    },
  };
}

/** Beyond every trace's end: the last token is shown. */
const LAST = 1_000_000;

/** The field to write in, and what else can be done. @param {import("../conversation.js").Conversation} conversation @param {Element[]} others */
function compose(conversation, others) {
  const isText = conversation.form === "text";
  const field = /** @type {HTMLTextAreaElement} */ (h("textarea", {
    class: "chat-field", name: "message", rows: 2, maxlength: 200_000, "aria-label": isText ? "Write on" : "Message",
    placeholder: isText ? "Write the beginning, or write on, and press Enter: the model goes on from there (Shift Enter begins a line)" : "Say something, and press Enter (Shift Enter begins a line)",
  }));
  const send = h("button", { type: "submit", class: "primary" }, isText ? "Go on from here" : "Send");
  const stop = button("Stop", conversation.stop, { class: "primary chat-stop", title: "Esc" });
  const form = h("form", { class: "chat-ask" }, field,
    h("div", { class: "chat-keys" }, send, stop, ...others));
  const submit = () => {
    const content = field.value;
    if (conversation.isBusy() || (!content && !isText)) return;
    field.value = "";
    conversation.send(content);
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && conversation.isBusy()) {
      event.stopPropagation();
      conversation.stop();
    } else if (event.key === "Enter" && event.target === field && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  return {
    element: form,
    focus: () => field.focus(),
    /** @param {import("../conversation.js").Talk} talk */
    update({ phase }) {
      send.hidden = phase !== "idle";
      stop.hidden = phase === "idle";
    },
  };
}

/** A name and its value that changes. @param {string} name @param {string} id */
function meter(name, id) {
  const value = h("b", { dataset: { meter: id } });
  return { element: h("div", { class: "chat-meter" }, h("span", {}, name), value), say: (/** @type {string} */ said) => show(value, said) };
}

/** A bar that fills. @param {string} [className] */
function filling(className = "") {
  const fill = h("i", {});
  return { element: h("span", { class: `bar-in-bar ${className}`, "aria-hidden": "true" }, fill), to: (/** @type {number} */ share) => fill.style.setProperty("width", `${100 * Math.min(1, share)}%`) };
}

/** The conversation in numbers, and how the next answer is drawn. @param {import("../conversation.js").Conversation} conversation @param {any} app */
function aside(conversation, app) {
  const most = app.status.limits.context;
  const { state_bytes: fixed, cache_bytes_per_token: each, crossover_tokens: crossover } = app.model;
  const [phase, rate, first, context, state, cache] = [meter("phase", "phase"), meter("writing (decode)", "rate"), meter("first piece after", "first"), meter("context used", "context"), meter("state, fixed", "state"), meter("cache, growing", "cache")];
  phase.element.setAttribute("role", "status");
  const [contextBar, stateBar, cacheBar] = [filling(), filling(), filling()];
  let waiting = 0;
  /** @type {import("../conversation.js").Talk} */
  let talk;
  function write() {
    waiting = 0;
    const { numRead, numWritten } = talk;
    const used = numRead + numWritten;
    phase.say(talk.phase === "reading" ? `reading ${count(numRead)} tokens` : talk.phase === "writing" ? `writing, token ${count(numWritten)}` : PHASES[talk.phase]);
    rate.say(numWritten ? `${exact(talk.rate)} tokens/s` : "–");
    first.say(talk.firstMs === null ? "–" : `${exact(talk.firstMs / 1000)} s`);
    context.say(`${count(used)} of ${count(most)}`);
    contextBar.to(used / most);
    const whole = Math.max(fixed, each * used) || 1;
    state.say(bytes(fixed));
    cache.say(bytes(each * used));
    stateBar.to(fixed / whole);
    cacheBar.to((each * used) / whole);
  }
  const number = (/** @type {string} */ key, /** @type {string} */ label, /** @type {any} */ limits, /** @type {string} */ words) => {
    const field = /** @type {HTMLInputElement} */ (h("input", { class: "number", type: "number", name: `chat-${key}`, "aria-label": label, ...limits, value: conversation.get().sampling[key] ?? "", on: {
      change: () => {
        const { [key]: _, ...others } = conversation.get().sampling;
        const isGiven = field.value !== "" && field.checkValidity();
        field.classList.toggle("is-wrong", field.value !== "" && !isGiven);
        if (isGiven || field.value === "") conversation.sample(isGiven ? { ...others, [key]: field.valueAsNumber } : others);
      },
    } }));
    return explain(h("label", { class: "chat-choice" }, h("span", {}, label), field), () => [label, words]);
  };
  return {
    element: h("aside", { class: "chat-side", "aria-label": "The conversation in numbers" },
      h("h3", {}, "This conversation"), phase.element, rate.element, first.element,
      context.element, contextBar.element,
      explain(h("div", { class: "chat-bytes", tabindex: 0 }, state.element, stateBar.element, cache.element, cacheBar.element), () => [
        "What the model carries from token to token", ["KDA's memory and convolution, always", `${count(fixed)} bytes`], ["MLA's latents, each token", `${count(each)} bytes`],
        ["as large as the state at", crossover ? `${count(crossover)} tokens` : "no length: it does not grow"]]),
      h("h3", {}, "The next answer"), ...SAMPLING.map(([key, label, limits, words]) => number(key, label, limits, words))),
    /** @param {import("../conversation.js").Talk} now */
    update(now) {
      talk = now;
      waiting ||= requestAnimationFrame(write);
    },
  };
}
