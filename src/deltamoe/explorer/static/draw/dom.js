/**
 * Make elements. Text always becomes a text node, so what a token or a file says can never
 * become markup. Knows nothing of models.
 */

const SVG = "http://www.w3.org/2000/svg";

/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * @template {Element} E
 * @param {E} element
 * @param {Record<string, any>} properties `on: {click}`, `style: {}`, `dataset: {}`; the rest are attributes.
 * @param {Child[]} children
 * @returns {E}
 */
function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (name === "dataset") Object.assign(/** @type {any} */ (element).dataset, value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) /** @type {any} */ (element).style.setProperty(key, to);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  put(element, ...children);
  return element;
}

/** Append children; null, undefined and false are left out. @param {Element} element @param {Child[]} children */
export function put(element, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/** An HTML element. @param {string} tag @param {Record<string, any>} [properties] @param {...any} children */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** An SVG element. @param {string} tag @param {Record<string, any>} [attributes] @param {...any} children */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Replace everything in an element. @param {Element} element @param {...any} children */
export function show(element, ...children) {
  element.replaceChildren();
  return put(element, ...children);
}

/** A button that reads as what it does. @param {string} label @param {() => void} run @param {Record<string, any>} [properties] */
export function button(label, run, properties = {}) {
  return /** @type {HTMLButtonElement} */ (h("button", { type: "button", on: { click: run }, ...properties }, label));
}

/**
 * A labelled choice.
 * @param {string} label @param {[string | number, string][]} options value and text
 * @param {string | number} chosen @param {(value: string) => void} choose
 */
export function choice(label, options, chosen, choose) {
  const select = /** @type {HTMLSelectElement} */ (h("select", { "aria-label": label, on: { change: () => choose(select.value) } },
    ...options.map(([value, text]) => h("option", { value, selected: String(value) === String(chosen) }, text))));
  return h("label", { class: "choice" }, h("span", {}, label), select);
}
