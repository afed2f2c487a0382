/**
 * What follows from a trace: memories, what is left of them, attention. The same definitions as
 * derive.py, so that a file needs no server; a test holds the two together.
 */

const LONGEST = 1e9; // of half-lives; a channel that forgets nothing has this one
const EVERY = 64; // tokens between two kept memories

/** @typedef {Float32Array} Matrix [K, V], row by row */

/** One head's memory along the tokens. */
class Walk {
  /** @param {import("./trace.js").Numbers[]} arrays query, key, value, log_decay, beta of one layer @param {number} head */
  constructor([query, key, value, logDecay, beta], head) {
    const shared = Math.floor((head * key.shape[1]) / value.shape[1]);
    this.query = (/** @type {number} */ t) => query.row(t, shared);
    this.key = (/** @type {number} */ t) => key.row(t, shared);
    this.value = (/** @type {number} */ t) => value.row(t, head);
    this.logDecay = (/** @type {number} */ t) => logDecay.row(t, head);
    this.beta = (/** @type {number} */ t) => beta.at(t, head);
    this.length = key.shape[0];
    this.K = key.shape[2];
    this.V = value.shape[2];
    /** @type {Matrix[]} memory before token i * EVERY */
    this.kept = [new Float32Array(this.K * this.V)];
  }

  /**
   * Move a memory over one token, in place.
   * @param {Matrix} memory @param {number} t
   * @returns {{recalled: Float32Array, delta: Float32Array}} what it answered to the key, and what was written
   */
  step(memory, t) {
    const { K, V } = this;
    const [key, value, logDecay, beta] = [this.key(t), this.value(t), this.logDecay(t), this.beta(t)];
    const recalled = new Float32Array(V);
    for (let k = 0; k < K; k++) {
      const decay = Math.exp(logDecay[k]);
      for (let v = 0, at = k * V; v < V; v++, at++) {
        memory[at] *= decay;
        recalled[v] += key[k] * memory[at];
      }
    }
    const delta = recalled.map((r, v) => beta * (value[v] - r));
    for (let k = 0; k < K; k++) for (let v = 0, at = k * V; v < V; v++, at++) memory[at] += key[k] * delta[v];
    return { recalled, delta };
  }

  /** The memory before a token. @param {number} t @returns {Matrix} a new one */
  before(t) {
    let from = Math.min(Math.floor(t / EVERY), this.kept.length - 1);
    const memory = this.kept[from].slice();
    for (let at = from * EVERY; at < t; at++) {
      this.step(memory, at);
      if ((at + 1) % EVERY === 0 && ++from === this.kept.length) this.kept.push(memory.slice());
    }
    return memory;
  }

  /** What one token does: the memory before and after, and the parts between. @param {number} t */
  token(t) {
    const before = this.before(t);
    const after = before.slice();
    const { recalled, delta } = this.step(after, t);
    return { before, after, recalled, delta, answer: ask(after, this.query(t), this.V) };
  }

  /**
   * What the memory still answers, later, to the key of token t: the share of t's value that comes back,
   * and the share that forgetting alone would leave.
   * @param {number} t
   */
  recall(t) {
    const memory = this.before(t);
    const key = this.key(t);
    const value = this.value(t);
    const size = Math.max(dot(value, value), 1e-30);
    const decayed = new Float64Array(this.K);
    const recalled = new Float32Array(this.length - t);
    const retained = new Float32Array(this.length - t);
    for (let at = t; at < this.length; at++) {
      this.step(memory, at);
      recalled[at - t] = dot(ask(memory, key, this.V), value) / size;
      const logDecay = this.logDecay(at);
      let left = 0;
      for (let k = 0; k < this.K; k++) {
        if (at > t) decayed[k] += logDecay[k];
        left += key[k] * key[k] * Math.exp(decayed[k]);
      }
      retained[at - t] = left;
    }
    return { recalled, retained };
  }
}

/** M^T k. @param {Matrix} memory @param {Float32Array} key @param {number} V */
function ask(memory, key, V) {
  const answer = new Float32Array(V);
  for (let k = 0; k < key.length; k++) for (let v = 0, at = k * V; v < V; v++, at++) answer[v] += key[k] * memory[at];
  return answer;
}

/** @param {ArrayLike<number>} a @param {ArrayLike<number>} b */
function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** Tokens until half is left, at most LONGEST. @param {number} logDecay */
export const halfLife = (logDecay) => (logDecay < 0 ? Math.min(LONGEST, Math.LN2 / -logDecay) : LONGEST);

/** x · sigmoid(x). @param {number} x */
export const silu = (x) => x / (1 + Math.exp(-x));

/** Length of a vector. @param {ArrayLike<number>} a */
export const norm = (a) => Math.sqrt(dot(a, a));

/** @type {WeakMap<import("./trace.js").Trace, Map<string, Promise<Walk>>>} */
const walks = new WeakMap();

/** One head's memory along the tokens. @param {import("./trace.js").Trace} trace @param {number} layer @param {number} head @returns {Promise<Walk>} */
export function walk(trace, layer, head) {
  let known = walks.get(trace);
  if (!known) walks.set(trace, (known = new Map()));
  const name = `${layer} ${head}`;
  const found = known.get(name) ?? trace.arrays(["kda.query", "kda.key", "kda.value", "kda.log_decay", "kda.beta"], layer).then((arrays) => new Walk(arrays, head));
  if (known.size > 16) known.clear();
  known.set(name, found);
  found.catch(() => known.delete(name));
  return found;
}

/**
 * What a token of one MLA head attends to: weights over the tokens up to it, which sum to 1.
 * @param {import("./trace.js").Numbers} query [T, H, channels] @param {import("./trace.js").Numbers} key
 * @param {number} head @param {number} token @returns {Float32Array} [token + 1]
 */
export function attentionRow(query, key, head, token) {
  const asked = query.row(token, head);
  const scale = asked.length ** -0.5;
  const scores = Float32Array.from({ length: token + 1 }, (_, source) => dot(asked, key.row(source, head)) * scale);
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp(scores[i] - most);
  return scores.map((score) => score / sum);
}
