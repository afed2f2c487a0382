/** The recorded runs that the server still keeps, the last one asked for first: a way back to each. */

import { json } from "../api.js";
import { h, show } from "../draw/dom.js";
import { count, visible } from "../draw/number.js";

const SHORT = 30; // letters of a prompt, and of what was written behind it

/** @param {string} text */
const end = (text) => (text.length > SHORT ? `…${text.slice(-SHORT)}` : text);

/**
 * @param {() => string} current id of the trace that is shown
 * @param {(id: string) => void} goTo
 */
export function keptSheet(current, goTo) {
  const list = h("ol", {});
  const sheet = /** @type {HTMLDialogElement} */ (h("dialog", { class: "kept", "aria-label": "Recorded runs" },
    h("h2", {}, "Recorded in this session"), list, h("form", { method: "dialog" }, h("button", { class: "primary" }, "Close"))));
  document.body.append(sheet);

  /** @param {any} trace */
  function row({ id, prompt, text, source, num_tokens: tokens }) {
    const branch = source.branched_from;
    const go = () => { sheet.close(); if (id !== current()) goTo(id); };
    return h("li", {}, h("button", { type: "button", class: "kept-one", "aria-current": id === current() && "true", dataset: { trace: id }, on: { click: go } },
      h("span", { class: "kept-text" }, visible(end(prompt)), text && h("span", { class: "written" }, visible(text.slice(0, SHORT)))),
      h("span", { class: "note" }, `${count(tokens)} tokens${branch ? `, branched at ${branch.token}` : ""}`)));
  }

  return {
    sheet,
    async show() {
      show(list);
      sheet.showModal();
      try {
        const { traces } = await json("api/traces");
        show(list, traces.length ? traces.map(row) : h("li", { class: "note" }, "Nothing is recorded yet."));
        /** @type {HTMLElement | null} */ (list.querySelector("[aria-current], button"))?.focus();
      } catch (error) {
        show(list, h("li", { class: "broken", role: "alert" }, /** @type {Error} */ (error).message));
      }
    },
  };
}
