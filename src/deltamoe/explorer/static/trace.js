/**
 * A recorded run: its summary, and its arrays as they are asked for, from the server or out of a
 * file. Views cannot tell which. The format is docs/explorer.md's.
 */

import { checkGeometry, GeometryError } from "./geometry.js";

const KIND = "deltamoe.trace";
const FORMAT = 1;
const MOST_HEADER_BYTES = 16 << 20;

/** A file or an answer that is not what it should be; the message is for the reader. */
export class TraceError extends Error {}

/** Numbers with a shape. */
export class Numbers {
  /** @param {any} data a typed array @param {number[]} shape @param {any} entry of the summary */
  constructor(data, shape, entry) {
    this.data = data;
    this.shape = shape;
    this.entry = entry;
  }

  /** The part at the first few indices. @param {...number} at @returns {Float32Array} */
  row(...at) {
    const size = this.shape.slice(at.length).reduce((a, b) => a * b, 1);
    const start = at.reduce((sum, index, axis) => sum * this.shape[axis] + index, 0) * size;
    return this.data.subarray(start, start + size);
  }

  /** One number. @param {...number} at @returns {number} */
  at(...at) {
    return this.data[at.reduce((sum, index, axis) => sum * this.shape[axis] + index, 0)];
  }

  /** Every `index`-th of the last axis: one head over all tokens. @param {number} index @returns {Float32Array} */
  column(index) {
    const width = /** @type {number} */ (this.shape.at(-1));
    return Float32Array.from({ length: this.data.length / width }, (_, i) => this.data[i * width + index]);
  }
}

/** @typedef {(name: string, layer: number | null) => Promise<ArrayBuffer>} Read the little-endian bytes of one layer of an array */

export class Trace {
  /** @param {any} summary @param {Read} read */
  constructor(summary, read) {
    if (summary?.kind !== KIND) throw new TraceError("This is no deltamoe trace. Record one with: deltamoe trace RUN --prompt TEXT --out FILE");
    if (summary.format > FORMAT) throw new TraceError(`This trace was written by a newer deltamoe: format ${summary.format}, this page knows ${FORMAT}. Upgrade deltamoe.`);
    this.summary = summary;
    this.config = summary.model.config;
    this.tokens = summary.tokens;
    this.numTokens = summary.num_tokens;
    /** @type {{layer: number, mixer: "kda" | "mla", channel: "mlp" | "moe"}[]} */
    this.layers = summary.layers;
    this.entries = new Map(summary.arrays.map((/** @type {any} */ entry) => [entry.name, entry]));
    this.read = read;
    /** @type {number | undefined} the longest text its server records */
    this.limit = undefined;
    /** @type {Map<string, Promise<Numbers>>} */
    this.kept = new Map();
  }

  /** Text of a token id. @param {number} id */
  text(id) {
    return this.summary.texts[id] ?? `#${id}`;
  }

  /** Is an array recorded (for a layer)? @param {string} name @param {number} [layer] */
  has(name, layer) {
    const entry = this.entries.get(name);
    return Boolean(entry && (layer === undefined || entry.layers?.includes(layer)));
  }

  /** Why an array is not there. @param {string} name @param {number} [layer] */
  reason(name, layer) {
    const left = (this.summary.left_out ?? []).find((/** @type {any} */ one) => one.arrays.includes(name) && (layer === undefined || one.layers.includes(layer)));
    return left?.reason ?? `${name} was not recorded${layer === undefined ? "" : ` for layer ${layer}`}.`;
  }

  /**
   * An array, or one layer of it.
   * @param {string} name @param {number} [layer] @returns {Promise<Numbers>}
   */
  array(name, layer) {
    const key = `${name} ${layer ?? ""}`;
    const kept = this.kept.get(key);
    if (kept) return kept;
    const entry = this.entries.get(name);
    if (!this.has(name, layer)) return Promise.reject(new TraceError(this.reason(name, layer)));
    const shape = layer === undefined ? entry.shape : entry.shape.slice(1);
    const Kind = { f32: Float32Array, i32: Int32Array, u16: Uint16Array }[/** @type {"f32"} */ (entry.dtype)];
    const size = shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
    const numbers = this.read(name, layer ?? null).then((bytes) => {
      if (bytes.byteLength !== size * Kind.BYTES_PER_ELEMENT) {
        throw new TraceError(`${name}: ${bytes.byteLength} bytes came, ${size * Kind.BYTES_PER_ELEMENT} were expected. Load the trace again.`);
      }
      return new Numbers(new Kind(bytes), shape, entry);
    });
    this.kept.set(key, numbers);
    numbers.catch(() => this.kept.delete(key));
    return numbers;
  }

  /** Several arrays of one layer. @param {string[]} names @param {number} [layer] */
  arrays(names, layer) {
    return Promise.all(names.map((name) => this.array(name, layer)));
  }
}

/**
 * Read a trace file. Every count is held against the bytes that are there before anything is made of it.
 * @param {ArrayBuffer} file
 * @returns {Trace}
 */
export function readTraceFile(file) {
  const broken = (/** @type {string} */ why) => new TraceError(`This is no trace file: ${why}. Record one with: deltamoe trace RUN --prompt TEXT --out FILE`);
  if (file.byteLength < 8) throw broken(`it has ${file.byteLength} bytes`);
  const length = Number(new DataView(file).getBigUint64(0, true));
  if (length > MOST_HEADER_BYTES || length > file.byteLength - 8) throw broken("its header is longer than the file or than 16 MiB");
  let header;
  let summary;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(file, 8, length)));
    summary = JSON.parse(header.__metadata__?.summary ?? "null");
  } catch {
    throw broken("its header is not JSON in UTF-8");
  }
  if (header?.__metadata__?.kind !== KIND || typeof summary !== "object" || summary === null || !Array.isArray(summary.arrays)) {
    throw broken("its metadata do not describe a recorded run");
  }
  const data = 8 + length;
  if (!(summary.format > FORMAT)) { // Trace names a newer one
    try {
      checkGeometry(summary, header, file.byteLength - data);
    } catch (error) {
      throw error instanceof GeometryError ? broken(error.message) : error;
    }
  }
  return new Trace(summary, async (name, layer) => {
    const entry = summary.arrays.find((/** @type {any} */ one) => one.name === name);
    const [begin, end] = header[name].data_offsets;
    if (layer === null) return file.slice(data + begin, data + end);
    const each = (end - begin) / entry.layers.length;
    const start = data + begin + entry.layers.indexOf(layer) * each;
    return file.slice(start, start + each);
  });
}
