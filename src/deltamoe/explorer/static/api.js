/**
 * The server this page came from. An array travels as the length of a JSON header (u32), the header and
 * the numbers; long answers as server-sent events. Formats: docs/explorer.md.
 */

import { Trace, TraceError } from "./trace.js";

/** The server's own words about what went wrong. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** @param {string} path @param {RequestInit} [options] */
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is deltamoe explore still running?", 0);
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? said?.detail ?? `The server answered ${answer.status} ${answer.statusText}.`, answer.status);
}

/** @param {string} path @param {any} body @param {AbortSignal} [signal] */
const post = (path, body, signal) => ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

/** Plain data. @param {string} path @param {any} [body] asks by POST */
export const json = async (path, body) => (await (body === undefined ? ask(path) : post(path, body))).json();

/**
 * Server-sent events of one answer, as they come.
 * @param {string} path @param {any} body @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* events(path, body, signal) {
  const answer = await post(path, body, signal);
  const reader = /** @type {ReadableStream<any>} */ (answer.body).pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isOver = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      isOver = done;
      if (done) return;
      rest = (rest + value).replaceAll("\r\n", "\n");
      const parts = rest.split("\n\n");
      rest = /** @type {string} */ (parts.pop());
      for (const part of parts) {
        const lines = part.split("\n");
        const event = lines.find((line) => line.startsWith("event:"))?.slice(6).trim() ?? "message";
        const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (!data || data === "[DONE]") continue;
        const said = JSON.parse(data);
        if (event === "error" || said.error) throw new ApiError(said.error?.message ?? said.message ?? "The server could not go on.", 500);
        yield { event, data: said };
      }
    }
  } finally {
    if (!isOver) reader.cancel().catch(() => {});
  }
}

/** A recorded run on the server. @param {string} id @returns {Promise<Trace>} */
export async function openTrace(id) {
  const summary = await json(`api/trace/${encodeURIComponent(id)}`);
  return new Trace(summary, async (name, layer) => {
    const query = layer === null ? "" : `?layer=${layer}`;
    const bytes = await (await ask(`api/trace/${encodeURIComponent(id)}/${encodeURIComponent(name)}${query}`)).arrayBuffer();
    const length = new DataView(bytes).getUint32(0, true);
    if (4 + length > bytes.byteLength) throw new TraceError(`${name}: the answer is cut short. Load the trace again.`);
    return bytes.slice(4 + length);
  });
}

/** The bytes of a whole trace file. @param {string} id */
export const traceFile = async (id) => (await ask(`api/trace/${encodeURIComponent(id)}/file`)).arrayBuffer();
