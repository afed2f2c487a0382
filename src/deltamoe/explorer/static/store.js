/**
 * What the reader has chosen: one object, told to whoever asked. The choice stands in the url's
 * hash, so that a link or a reload shows the same.
 */

/**
 * @typedef {Object} State
 * @property {string} trace id of the trace on the server; "" for a file or none
 * @property {number} token the pinned one
 * @property {number | null} preview the one under the pointer
 * @property {number} layer
 * @property {"mixer" | "channel" | ""} part the half of the block that is opened; "" until something is
 * @property {number} head
 * @property {number} expert
 * @property {string} view
 * @property {string} metric what colours the tokens
 * @property {boolean} playing
 */

/** @type {State} */
const START = { trace: "", token: 0, preview: null, layer: 0, part: "", head: 0, expert: 0, view: "sparse", metric: "surprise", playing: false };
const IN_HASH = /** @type {(keyof State)[]} */ (["trace", "view", "token", "layer", "part", "head", "expert", "metric"]);
const PARTS = ["mixer", "channel", ""];

/** @returns {Partial<State>} */
function fromHash() {
  const said = new URLSearchParams(location.hash.slice(1));
  /** @type {Record<string, any>} */
  const found = {};
  for (const key of IN_HASH) {
    const value = said.get(key);
    if (value === null) continue;
    if (typeof START[key] === "number") {
      const whole = Number.parseInt(value, 10);
      if (whole >= 0) found[key] = whole;
    } else if (key === "part" ? PARTS.includes(value) : /^[\w-]{0,64}$/.test(value)) found[key] = value;
  }
  return found;
}

/**
 * The chosen state, and a way to hear of changes.
 * @param {(wanted: Partial<State>) => void} follow called with what a changed hash says
 */
export function createStore(follow) {
  /** @type {State} */
  let state = { ...START, ...fromHash() };
  /** @type {Set<(state: State, changed: Set<string>) => void>} */
  const listeners = new Set();

  function writeHash() {
    const said = new URLSearchParams();
    for (const key of IN_HASH) if (state[key] !== "") said.set(key, String(state[key]));
    const shown = fromHash().trace;
    const isOther = shown && state.trace && shown !== state.trace; // the browser's Back leads to the trace before
    history[isOther ? "pushState" : "replaceState"](null, "", `#${said}`);
  }

  /** @param {Partial<State>} wanted */
  function set(wanted) {
    const changed = new Set(Object.entries(wanted).filter(([key, value]) => state[/** @type {keyof State} */ (key)] !== value).map(([key]) => key));
    if (!changed.size) return;
    state = { ...state, ...wanted };
    if (IN_HASH.some((key) => changed.has(key))) writeHash();
    for (const tell of listeners) tell(state, changed);
  }

  addEventListener("hashchange", () => follow(fromHash()));
  return {
    get: () => state,
    set,
    /** The token to show: the one under the pointer, else the pinned one. */
    shown: () => state.preview ?? state.token,
    /** @param {(state: State, changed: Set<string>) => void} tell @returns {() => void} stop telling */
    subscribe(tell) {
      listeners.add(tell);
      return () => listeners.delete(tell);
    },
  };
}
/** @typedef {ReturnType<typeof createStore>} Store */
