/**
 * From a number to a colour. viridis and cividis keep their order for colour-blind eyes and in
 * grey; the diverging scale goes from blue over the page's ground to orange.
 * Ten-point samples of the maps by Smith & van der Walt (viridis) and Nuñez et al. (cividis).
 */

const MAPS = {
  viridis: ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"],
  cividis: ["00224e", "083370", "35456c", "4f576c", "666970", "7d7c78", "948e77", "aea371", "c8b866", "e5cf52", "fee838"],
};
const DIVERGING = {
  light: [[43, 108, 176], [246, 245, 242], [201, 92, 20]],
  dark: [[116, 178, 245], [32, 34, 39], [255, 155, 92]],
};
const STEPS = 256;

/** @typedef {"linear" | "log" | "root"} Kind root: the square root of the size, with its sign */
/** @typedef {[number, number, number]} Rgb red, green, blue in 0..255 */
/**
 * @typedef {Object} Scale
 * @property {(value: number) => Rgb} rgb
 * @property {(value: number, steps?: number) => string} css of at most so many colours and one
 * @property {(share: number) => string} at the colour at a share of the range, for a legend
 * @property {(share: number) => number} value the value at a share of the range
 * @property {[number, number]} domain
 * @property {Kind} kind
 */

/** @param {number[][]} stops @returns {Rgb[]} */
function table(stops) {
  return Array.from({ length: STEPS }, (_, i) => {
    const place = (i / (STEPS - 1)) * (stops.length - 1);
    const left = Math.min(Math.floor(place), stops.length - 2);
    return /** @type {Rgb} */ ([0, 1, 2].map((c) => Math.round(stops[left][c] + (place - left) * (stops[left + 1][c] - stops[left][c]))));
  });
}

const hex = (/** @type {string} */ text) => [0, 2, 4].map((i) => parseInt(text.slice(i, i + 2), 16));
/** @type {Record<string, Rgb[]>} */
const TABLES = {
  viridis: table(MAPS.viridis.map(hex)),
  cividis: table(MAPS.cividis.map(hex)),
  diverging_light: table(DIVERGING.light),
  diverging_dark: table(DIVERGING.dark),
};

/** @type {Record<Kind, [(v: number) => number, (v: number) => number]>} there and back */
const MOVES = {
  linear: [(v) => v, (v) => v],
  log: [Math.log, Math.exp],
  root: [(v) => Math.sign(v) * Math.sqrt(Math.abs(v)), (v) => Math.sign(v) * v * v],
};

/** Is the page dark at the moment? */
export const isDark = () => document.documentElement.dataset.theme === "dark";

/**
 * @param {"viridis" | "cividis" | "diverging"} map
 * @param {[number, number]} domain the values at the two ends
 * @param {Kind} [kind] log needs both ends above 0
 * @returns {Scale}
 */
export function scale(map, domain, kind = "linear") {
  const colours = TABLES[map === "diverging" ? `diverging_${isDark() ? "dark" : "light"}` : map];
  const [move, back] = MOVES[kind];
  const [low, high] = domain.map(move);
  const share = (/** @type {number} */ value) => {
    const moved = high > low ? (move(value) - low) / (high - low) : 0;
    return Number.isNaN(moved) ? 0 : Math.min(1, Math.max(0, moved));
  };
  const at = (/** @type {number} */ part) => colours[Math.round(part * (STEPS - 1))];
  const css = (/** @type {Rgb} */ c) => `rgb(${c[0]}, ${c[1]}, ${c[2]})`;
  return {
    rgb: (value) => at(share(value)),
    css: (value, steps = STEPS) => css(at(Math.round(share(value) * steps) / steps)),
    at: (part) => css(at(part)),
    value: (part) => back(low + part * (high - low)),
    domain,
    kind,
  };
}

/** A range that is symmetric around 0, for the diverging scale. @param {ArrayLike<number>} values @returns {[number, number]} */
export function symmetric(values) {
  const [low, high] = extent(values);
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return [-most, most];
}

/** Least and greatest finite value; [0, 1] where there is none. @param {ArrayLike<number>} values @returns {[number, number]} */
export function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (!Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? [0, 1] : [low, high];
}

/** Black or white, whichever reads better on a colour. @param {Rgb} c */
export const ink = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#14161a" : "#ffffff");

/** Round values for an axis, about `wanted` of them. @param {number} low @param {number} high @param {number} [wanted] */
export function ticks(low, high, wanted = 5) {
  if (!(high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) return [low]; // one number but for its rounding
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough) ?? 10 * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** Round values for an axis in powers: 1, 2, 5, 10 … where they are few, else every so many powers. @param {number} low above 0 @param {number} high */
export function logTicks(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const powers = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
  const within = (/** @type {number[]} */ values) => values.map((v) => Number(v.toPrecision(6))).filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
  const fine = within(powers.flatMap((power) => [power, 2 * power, 5 * power]));
  if (fine.length < 2) return ticks(low, high, 3);
  if (fine.length <= 6) return fine;
  const coarse = within(powers);
  const every = Math.ceil(coarse.length / 6);
  return coarse.filter((_, i) => i % every === 0);
}
