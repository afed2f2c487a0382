/** The boxes of an opened block that hold a tensor: one token's row of an array, or the reason why there is none. */

import { box } from "../draw/diagram.js";
import { exact, visible } from "../draw/number.js";

/** @typedef {Record<string, Float32Array | undefined>} Rows by array; undefined where one was not recorded */

/**
 * One token's rows of some arrays of a layer.
 * @param {import("../trace.js").Trace} trace @param {number} layer
 * @param {Record<string, number[]>} wanted the first few indices of each array: the token, then perhaps the head
 * @returns {Promise<Rows>}
 */
export async function rowsOf(trace, layer, wanted) {
  const found = await Promise.all(Object.entries(wanted).map(async ([name, at]) => (
    trace.has(name, layer) ? [name, (await trace.array(name, layer)).row(...at)] : [name, undefined])));
  return Object.fromEntries(found);
}

/**
 * @typedef {Object} Tensor
 * @property {ArrayLike<number> | undefined | null} values
 * @property {string} array where they come from, directly or not: it tells why they are not there
 * @property {string[]} [words] what the box does @property {string} [label] under the pointer, if not the title
 * @property {Partial<import("../draw/diagram.js").Box["strip"]>} [strip]
 */

/** A maker of such boxes for one layer. @param {import("../trace.js").Trace} trace @param {number} layer */
export const tensorBoxes = (trace, layer) => (/** @type {Omit<import("../draw/diagram.js").Box, "strip"> & Tensor} */ { values, array, words = [], label, strip, ...rest }) => box({
  ...rest,
  strip: values ? { values, name: label ?? rest.title, height: 12, ...strip } : undefined,
  lines: [rest.title, ...words, ...(values ? [] : [trace.reason(array, layer)])],
});

/**
 * The token at the foot of a diagram, as its normed stream.
 * @param {ReturnType<typeof tensorBoxes>} tensor @param {import("../trace.js").Trace} trace @param {number} token
 * @param {{x: number, y: number, width: number, array: string, values: Float32Array | undefined, norm: number}} o the norm of the stream before its norm
 */
export const tokenBox = (tensor, trace, token, { norm, ...o }) => tensor({
  ...o, height: 54, title: `token ${token}: “${visible(trace.tokens[token].text).slice(0, 18)}”`, sub: `the normed stream; its norm before: ${exact(norm)}`, name: "token", label: "the normed stream",
});
