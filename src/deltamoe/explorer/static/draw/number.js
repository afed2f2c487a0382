/** Numbers as people read them; the exact value is for the tooltip. */

/** Four significant digits, plain where short. @param {number} value */
export function exact(value) {
  if (value === undefined || value === null || Number.isNaN(value)) return "n/a";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const rounded = Number(value.toPrecision(4));
  const text = size >= 1e6 || size < 1e-3 ? rounded.toExponential() : String(rounded);
  return text.replace("-", "−").replace("e+", "e").replace("e-", "e−");
}

/** A count with thousands' separators. @param {number} value */
export const count = (value) => (Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : "n/a");

/** 48.1 B, 3.5 M, 912. @param {number} value */
export function short(value) {
  if (!Number.isFinite(value)) return "n/a";
  for (const [size, unit] of /** @type {[number, string][]} */ ([[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return String(Number(value.toPrecision(3)));
}

/** 1.5 MiB, 640 B. @param {number} value */
export function bytes(value) {
  if (!Number.isFinite(value)) return "n/a";
  for (const [size, unit] of /** @type {[number, string][]} */ ([[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${Math.round(value)} B`;
}

/** 12.3 %. @param {number} value a share of 1 */
export const percent = (value) => (Number.isFinite(value) ? `${Number((100 * value).toPrecision(3))} %` : "n/a");

/** A probability in a column of them: as many decimals in every row. @param {number} value */
export const probability = (value) => (value > 0 && value < 5e-5 ? "< 0.01 %" : `${(100 * value).toFixed(2)} %`);

/** Tokens until half is forgotten. @param {number} value */
export const tokens = (value) => (Number.isFinite(value) ? `${exact(value)} tokens` : value > 0 ? "never" : "n/a");

const CONTROL = /[\0-\x1f]/g; // each has a picture of itself in Unicode

/** White space and control characters made visible, so that a token is never an empty box. @param {string} piece */
export function visible(piece) {
  return piece.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(CONTROL, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0))) || "∅";
}
