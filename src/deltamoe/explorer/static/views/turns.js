/** The turns of a conversation, as they grow; any of them can be edited where it stands. */

import { button, h, show } from "../draw/dom.js";
import { count, exact } from "../draw/number.js";

const FATES = { end: "the model ended here", length: "the wanted length is reached", stop: "a stop mark came" };
const CUTS = { stopped: "stopped", interrupted: "interrupted: the page was left while this was written, and the server stopped; what had come is kept", broken: "broken off" };
const NAMES = { user: "You", assistant: "Model" };

/** How an answer ended. @param {import("../conversation.js").Turn} turn */
function fate({ cut, done }) {
  if (cut) return CUTS[cut];
  if (!done) return "";
  const known = done.num_cached_tokens ? `; of the ${count(done.num_prompt_tokens)} tokens before, ${count(done.num_cached_tokens)} had been read already` : "";
  return `${count(done.num_tokens)} ${done.num_tokens === 1 ? "token" : "tokens"}, ${exact(done.tokens_per_s)} tokens/s; ${FATES[/** @type {"end"} */ (done.finish_reason)] ?? done.finish_reason}${known}`;
}

/** @param {import("../conversation.js").Conversation} conversation */
export function showTurns(conversation) {
  const isText = conversation.form === "text";
  const list = h("div", { class: isText ? "manuscript" : "turns" });
  const element = h("div", { class: "chat-log", role: "log", "aria-live": "off", tabindex: 0, "aria-label": "The conversation" }, list);
  /** @type {number | null} the turn that is open to be rewritten */
  let editing = null;
  /** @type {Text | null} where the answer grows */
  let growing = null;

  /** @param {number} index */
  function edit(index) {
    if (conversation.isBusy()) return;
    editing = index;
    draw();
    const field = /** @type {HTMLTextAreaElement} */ (list.querySelector("textarea"));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  /** @param {import("../conversation.js").Turn} turn @param {number} index */
  function editor({ content, role }, index) {
    const field = /** @type {HTMLTextAreaElement} */ (h("textarea", { "aria-label": "Edit this turn", maxlength: 200_000, rows: Math.min(14, 2 + content.split("\n").length + Math.floor(content.length / 90)) }));
    field.value = content;
    const close = () => {
      editing = null;
      draw();
    };
    const save = () => {
      editing = null;
      conversation.edit(index, field.value);
    };
    const num = conversation.get().turns.length - index - 1;
    const does = isText || role === "user" ? "Go on from here" : "Keep this";
    return h("div", { class: "turn-editor", on: {
      keydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          close();
        } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
      },
    } }, field, h("div", { class: "controls" }, button(does, save, { class: "primary" }), button("Cancel", close),
      h("span", { class: "note" }, num ? `what follows (${num} ${num === 1 ? "part" : "parts"}) goes; ` : "", h("kbd", {}, "Ctrl Enter"))));
  }

  /** @param {string} content */
  function grown(content) {
    growing = document.createTextNode(content);
    return growing;
  }

  /** One text: the parts flow into each other. @param {import("../conversation.js").Turn} turn @param {number} index */
  function part(turn, index) {
    if (index === editing) return editor(turn, index);
    const open = () => { if (getSelection()?.isCollapsed ?? true) edit(index); };
    return h("span", { class: `part is-${turn.role}`, role: "button", tabindex: 0, title: `${NAMES[turn.role]} wrote this; click to edit it and go on from there`, dataset: { role: turn.role }, on: {
      click: open,
      keydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key !== "Enter") return;
        event.preventDefault();
        edit(index);
      },
    } }, grown(turn.content));
  }

  /** @param {import("../conversation.js").Turn} turn @param {number} index */
  function bubble(turn, index) {
    if (index === editing) return editor(turn, index);
    const isAnswer = turn.role === "assistant";
    return h("article", { class: `turn is-${turn.role}`, dataset: { role: turn.role } },
      h("header", {}, h("b", {}, NAMES[turn.role]),
        h("span", { class: "turn-does" }, button("Edit", () => edit(index), { class: "quiet" }), isAnswer && button("Regenerate", () => conversation.regenerate(index), { class: "quiet" }))),
      h("p", { class: "turn-text" }, grown(turn.content)),
      isAnswer && h("p", { class: "note turn-fate" }, fate(turn)));
  }

  /** After an error: a broken answer is asked for anew, a text is written on. */
  function again() {
    const { turns } = conversation.get();
    if (!isText && turns.at(-1)?.role === "assistant") conversation.regenerate(turns.length - 1);
    else conversation.send("");
  }

  function draw() {
    const talk = conversation.get();
    const isBusy = talk.phase !== "idle";
    if (editing !== null && (isBusy || editing >= talk.turns.length)) editing = null;
    const last = talk.turns.at(-1);
    element.classList.toggle("is-writing", isBusy);
    show(list, talk.turns.length ? talk.turns.map(isText ? part : bubble) : empty(isText),
      isText && last?.role === "assistant" && !isBusy && h("p", { class: "note turn-fate" }, fate(last)),
      talk.error && h("div", { class: "broken", role: "alert" }, h("span", {}, talk.error), button("Try again", again)));
    for (const one of list.querySelectorAll(".turn-does button")) /** @type {HTMLButtonElement} */ (one).disabled = isBusy;
    element.scrollTop = element.scrollHeight;
  }

  return {
    element,
    toEnd() {
      element.scrollTop = element.scrollHeight;
    },
    /** @param {import("../conversation.js").Talk} talk @param {string | null} piece what the last turn grew by, if that is all */
    update(talk, piece) {
      if (piece === null || !growing) {
        draw();
        return;
      }
      const isAtEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
      growing.appendData(piece);
      if (isAtEnd) element.scrollTop = element.scrollHeight;
    },
  };
}

/** @param {boolean} isText */
function empty(isText) {
  return isText
    ? h("p", { class: "empty" }, h("b", {}, "One text, two writers."), " This model was trained on plain text and knows no turns: write a beginning below and it goes on; what it wrote stands in colour. Click any part to change it and let the model go on from there.")
    : h("p", { class: "empty" }, h("b", {}, "Say something"), " and the model answers. Every turn can be edited, every answer asked for again.");
}
