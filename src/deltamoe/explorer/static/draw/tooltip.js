/** One tooltip for the page: the exact numbers behind whatever mark the pointer is on. */

import { h, show } from "./dom.js";

/** @typedef {(string | [string, string])[]} Lines a heading, then words, or a name and its value */

const box = h("div", { class: "tooltip", role: "tooltip", hidden: true });

/** @param {{clientX: number, clientY: number}} at @param {Lines} lines */
export function showTooltip(at, lines) {
  if (!box.isConnected) document.body.append(box);
  show(box, ...lines.map((line, i) => typeof line === "string"
    ? h("div", { class: i ? "tooltip-words" : "tooltip-head" }, line)
    : h("div", { class: "tooltip-line" }, h("span", {}, line[0]), h("b", {}, line[1]))));
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const left = at.clientX + 14 + width > innerWidth ? at.clientX - width - 10 : at.clientX + 14;
  const top = at.clientY + 16 + height > innerHeight ? at.clientY - height - 10 : at.clientY + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.max(4, top)}px`;
}

/** Nothing is under the pointer any more. */
export function hideTooltip() {
  box.hidden = true;
}

/**
 * Show lines while the pointer or the keyboard is on an element.
 * @param {Element} element @param {(event: any) => Lines | null} lines null shows nothing
 */
export function explain(element, lines) {
  const over = (/** @type {any} */ event) => {
    const said = lines(event);
    if (said) showTooltip(event, said);
    else hideTooltip();
  };
  element.addEventListener("pointermove", over);
  element.addEventListener("pointerleave", hideTooltip);
  element.addEventListener("focus", (event) => {
    const { right, top } = element.getBoundingClientRect();
    const said = lines(event);
    if (said && element.matches(":focus-visible")) showTooltip({ clientX: right, clientY: top }, said);
  });
  element.addEventListener("blur", hideTooltip);
  return element;
}
