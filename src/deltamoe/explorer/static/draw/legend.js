/** What the colours mean: a bar with its range, its unit and its kind of scale. */

import { h, s } from "./dom.js";
import { exact } from "./number.js";

const CELLS = 48;
const WIDTH = 144;
const NAMES = { linear: "", log: ", log scale", root: ", root scale" };

/**
 * @param {import("./scale.js").Scale} scale @param {string} name what is measured
 * @param {string} unit such as "tokens" @param {(value: number) => string} [format]
 */
export function legend(scale, name, unit, format = exact) {
  const [low, high] = scale.domain;
  const bar = s("svg", { width: WIDTH, height: 10, class: "legend-bar", "aria-hidden": "true" },
    ...Array.from({ length: CELLS }, (_, i) => s("rect", {
      x: (i * WIDTH) / CELLS, y: 0, width: WIDTH / CELLS + 0.5, height: 10, fill: scale.at(i / (CELLS - 1)),
    })));
  return h("div", { class: "legend", dataset: { low, high, unit } },
    h("span", { class: "legend-name" }, name),
    h("span", { class: "legend-end" }, format(low)), bar, h("span", { class: "legend-end" }, format(high)),
    h("span", { class: "legend-unit" }, `${unit}${NAMES[scale.kind]}`));
}

/** A swatch with a word. @param {string} className @param {string} text */
export function swatch(className, text) {
  return h("span", { class: "swatch" }, h("i", { class: className }), text);
}
