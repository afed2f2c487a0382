/**
 * A conversation with the model: the turns, the answer that is being written, and what is kept of both
 * over a reload. The page holds the whole conversation and sends it with every question, so editing
 * and regenerating are sending another one. Knows nothing of how it is drawn.
 */

import { events } from "./api.js";
import { remember, remembered } from "./session.js";

/**
 * @typedef {Object} Turn
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {"stopped" | "interrupted" | "broken"} [cut] why an answer has no end
 * @property {Done} [done] what the server said at the end
 */
/** @typedef {{finish_reason: string, num_tokens: number, num_prompt_tokens: number, tokens_per_s: number, num_cached_tokens?: number}} Done */
/** @typedef {"idle" | "waiting" | "reading" | "writing"} Phase */
/**
 * @typedef {Object} Talk
 * @property {Turn[]} turns
 * @property {Phase} phase
 * @property {number} numRead tokens of the text that the last answer follows
 * @property {number} numWritten tokens of the last answer
 * @property {number} rate tokens/s of the last answer
 * @property {number | null} firstMs from asking to the last answer's first piece
 * @property {string} error the last one's sentence, or ""
 * @property {Record<string, number>} sampling keys of POST /api/chat
 */

const SAVE_MS = 200;
const LEAVING_MS = 2000;

/** @returns {Talk} */
const fresh = () => ({ turns: [], phase: "idle", numRead: 0, numWritten: 0, rate: 0, firstMs: null, error: "", sampling: { max_tokens: 200, temperature: 0.8 } });

/** What was kept; an answer the reload cut off says so. @param {string} key @returns {Talk} */
function reopen(key) {
  const kept = remembered(key);
  if (!Array.isArray(kept?.turns)) return fresh();
  const talk = { ...fresh(), ...kept, phase: /** @type {Phase} */ ("idle") };
  if (kept.phase !== "idle") {
    const last = talk.turns.at(-1);
    if (last?.role === "assistant") talk.turns = [...talk.turns.slice(0, -1), { ...last, cut: "interrupted" }];
  }
  return talk;
}

/**
 * @param {string} name of the model; each has a conversation of its own
 * @param {"turns" | "text"} form "text": no turns, one text that both write on
 */
export function createConversation(name, form) {
  const key = `chat:${form}:${name}`;
  let talk = reopen(key);
  /** @type {Set<(talk: Talk, piece: string | null) => void>} */
  const listeners = new Set();
  /** @type {AbortController | null} */
  let asking = null;
  let isLeaving = false;
  let saving = 0;

  function save() {
    clearTimeout(saving);
    saving = 0;
    if (!isLeaving) remember(key, talk);
  }
  /** Keep what came: once the page is left, its requests break, and what that does to the answer is not to be kept. */
  function leave() {
    save();
    isLeaving = true;
    setTimeout(() => { // still here: it was a download, or the page came back
      isLeaving = false;
      save();
    }, LEAVING_MS);
  }
  addEventListener("beforeunload", leave);
  addEventListener("pagehide", leave);

  /** @param {Partial<Talk>} changes @param {string | null} [piece] what the last answer grew by, if that is all */
  function set(changes, piece = null) {
    talk = { ...talk, ...changes };
    if (piece === null) save();
    else saving ||= setTimeout(save, SAVE_MS);
    for (const tell of listeners) tell(talk, piece);
  }

  const text = () => talk.turns.map((turn) => turn.content).join("");
  const messages = () => talk.turns.map(({ role, content }) => ({ role, content }));

  /** Have the model answer the conversation as it stands. */
  async function answer() {
    asking?.abort();
    const abort = (asking = new AbortController());
    const asked = form === "text" ? { text: text() } : { messages: messages() };
    /** @type {Turn} */
    const turn = { role: "assistant", content: "" };
    const before = talk.turns;
    const begin = performance.now();
    set({ turns: [...before, turn], phase: "waiting", numRead: 0, numWritten: 0, rate: 0, firstMs: null, error: "" });
    let error = "";
    try {
      for await (const { event, data } of events("api/chat", { ...asked, ...talk.sampling }, abort.signal)) {
        if (asking !== abort) return;
        if (event === "start") set({ phase: "reading", numRead: data.num_prompt_tokens });
        else if (event === "piece") {
          turn.content += data.text;
          const isFirst = talk.phase !== "writing";
          const now = { phase: /** @type {Phase} */ ("writing"), numWritten: data.num_tokens, rate: data.tokens_per_s, firstMs: isFirst ? performance.now() - begin : talk.firstMs };
          set(now, isFirst ? null : data.text);
        } else if (event === "done") {
          turn.done = data;
          set({ numWritten: data.num_tokens, rate: data.tokens_per_s });
        }
      }
      if (!turn.done) throw new Error("The answer broke off: the server said no end. Its log says why.");
    } catch (fault) {
      if (asking !== abort) return;
      turn.cut = abort.signal.aborted ? "stopped" : "broken";
      error = abort.signal.aborted ? "" : /** @type {Error} */ (fault).message;
    }
    asking = null;
    set({ turns: turn.content || turn.done ? [...before, turn] : before, phase: "idle", error });
  }

  return {
    form,
    get: () => talk,
    text,
    messages,
    isBusy: () => talk.phase !== "idle",
    /** @param {(talk: Talk, piece: string | null) => void} tell @returns {() => void} stop telling */
    subscribe(tell) {
      listeners.add(tell);
      return () => listeners.delete(tell);
    },
    /** Say something; "" lets the model go on. @param {string} content */
    send(content) {
      if (talk.phase !== "idle") return;
      if (content) set({ turns: [...talk.turns, { role: "user", content }] });
      answer();
    },
    stop: () => asking?.abort(),
    /** Another answer in the place of one; what followed it goes. @param {number} index */
    regenerate(index) {
      set({ turns: talk.turns.slice(0, index) });
      answer();
    },
    /** Other words in a turn; what followed goes, and the model answers. @param {number} index @param {string} content */
    edit(index, content) {
      const turn = { role: talk.turns[index].role, content };
      set({ turns: [...talk.turns.slice(0, index), ...(content ? [turn] : [])], error: "" });
      if (form === "text" || turn.role === "user") answer();
    },
    /** @param {Record<string, number>} sampling */
    sample: (sampling) => set({ sampling }),
    clear() {
      asking?.abort();
      asking = null;
      set({ ...fresh(), sampling: talk.sampling });
    },
  };
}
/** @typedef {ReturnType<typeof createConversation>} Conversation */
