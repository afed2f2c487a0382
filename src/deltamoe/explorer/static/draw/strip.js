/**
 * A tensor as a strip of coloured cells in SVG, with the exact number under the pointer. Cells of one
 * colour share a path, so a strip of any length costs at most 32 nodes.
 */

import { s } from "./dom.js";
import { exact } from "./number.js";
import { extent, scale, symmetric } from "./scale.js";
import { explain } from "./tooltip.js";

const COLOURS = 32;

/**
 * @param {ArrayLike<number>} values
 * @param {Object} options
 * @param {number} options.x @param {number} options.y @param {number} options.width @param {number} options.height
 * @param {string} options.name for the tooltip
 * @param {string} [options.unit]
 * @param {string} [options.axis] what its columns count @param {string} [options.rowAxis] and its rows
 * @param {number} [options.rows] one under the other; cells run row by row
 * @param {number} [options.lit] the row that is framed
 * @param {[number, number]} [options.domain]
 * @param {(value: number) => string} [options.format] @param {import("./scale.js").Kind} [options.kind]
 */
export function strip(values, { x, y, width, height, name, unit = "", axis = "channel", rowAxis = "row", rows = 1, lit, domain, format = exact, kind }) {
  const columns = Math.max(1, Math.round(values.length / rows));
  const [least, greatest] = extent(values);
  const isSigned = least < 0 || greatest === 0;
  const colour = scale(isSigned ? "diverging" : "viridis", domain ?? (isSigned ? symmetric(values) : [0, greatest]), kind);
  const [low, high] = colour.domain;
  const across = width / columns;
  const down = height / rows;
  /** @type {Map<string, string>} */
  const paths = new Map();
  for (let i = 0; i < values.length; i++) {
    const fill = colour.css(values[i], COLOURS);
    const left = x + (i % columns) * across;
    const top = y + Math.floor(i / columns) * down;
    paths.set(fill, `${paths.get(fill) ?? ""}M${left.toFixed(2)} ${top.toFixed(2)}h${across.toFixed(2)}v${down.toFixed(2)}h${(-across).toFixed(2)}z`);
  }
  const group = s("g", { class: "strip", "shape-rendering": "crispEdges", "data-name": name },
    s("rect", { x, y, width, height, class: "strip-ground" }),
    ...[...paths].map(([fill, d]) => s("path", { d, fill })),
    lit !== undefined && rows > 1 && s("rect", { x: x - 1, y: y + lit * down - 0.5, width: width + 2, height: down + 1, class: "strip-lit" }));
  return explain(group, (event) => {
    const area = group.firstElementChild?.getBoundingClientRect();
    if (!area || event.clientX === undefined) return null;
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - area.left) / area.width) * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - area.top) / area.height) * rows)));
    const place = rows > 1 ? `${rowAxis} ${row}, ${axis} ${column}` : `${axis} ${column} of ${columns}`;
    return [name, [place, `${format(values[row * columns + column])} ${unit}`], ["range shown", `${exact(low)} to ${exact(high)}`]];
  });
}
