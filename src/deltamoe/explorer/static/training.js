/**
 * Training runs, read from the records of their metrics.jsonl alone, while a run goes on or after it.
 * Polling asks for what was written since; a resumed run lives some steps a second time, and is then
 * read anew. Knows nothing of how it is drawn.
 */

import { json } from "./api.js";

/** @typedef {Record<string, any>} Step one line of metrics.jsonl, as docs/training.md has it */
/** @typedef {{step: number, kind: string, text: string}} Event */
/**
 * @typedef {Object} Run
 * @property {string} name @property {any} config null where the run has none that can be read
 * @property {Step[]} records by step, thinned by the server where there are many
 * @property {Event[]} events by step
 * @property {boolean} isRunning somebody trains it now
 * @property {string} next where the server goes on telling
 * @property {boolean} isThinned
 */

const POINTS = 1000;

/** The runs there are, newest first. @returns {Promise<{name: string, step: number | null, steps: number | null, modified: number, is_open: boolean, is_running: boolean}[]>} */
export const listRuns = async () => (await json("api/runs")).runs;

/** What a run wrote since an earlier answer. @param {string} name @param {string} [from] that answer's `next` */
const ask = (name, from) => json(`api/runs/${encodeURIComponent(name)}?points=${POINTS}${from ? `&from=${encodeURIComponent(from)}` : ""}`);

/** @param {Run | null} run what is known, which an answer that begins anew replaces @param {any} answer @returns {Run} */
function grown(run, answer) {
  const before = run && !answer.is_anew ? run : { records: [], events: [], isThinned: false };
  return {
    name: answer.name, config: answer.config, isRunning: answer.is_running, next: answer.next,
    records: [...before.records, ...answer.records], events: merged(before.events, marked(answer)), isThinned: before.isThinned || answer.num_records > answer.records.length,
  };
}

/** The whole of a run. @param {string} name @returns {Promise<Run>} */
export async function readRun(name) {
  let answer = await ask(name);
  let run = grown(null, answer);
  while (answer.has_more) {
    answer = await ask(name, run.next);
    run = grown(run, answer);
  }
  return run;
}

/** The run with what came since; the same object where nothing did. @param {Run} run @returns {Promise<Run>} */
export async function followRun(run) {
  const answer = await ask(run.name, run.next);
  if (answer.is_anew || answer.has_more || run.records.length > 2 * POINTS) {
    const whole = await readRun(run.name);
    const resumed = resumedAfter(run.records, whole.records);
    const seen = run.events.filter((event) => event.kind === "resume" && event.step < (resumed ?? Infinity));
    if (resumed !== null) seen.push({ step: resumed, kind: "resume", text: "resumed, seen while this page was open" });
    return { ...whole, events: merged(whole.events, seen) };
  }
  const now = grown(run, answer);
  return answer.records.length || now.isRunning !== run.isRunning || now.events.length !== run.events.length ? now : run;
}

/** The step a run went on from, if it lives known steps again; else null. @param {Step[]} known @param {Step[]} records as they are now */
function resumedAfter(known, records) {
  const now = new Map(records.map((record) => [record.step, record]));
  const other = known.find((record) => {
    const again = now.get(record.step);
    return again && (again.seconds !== record.seconds || again.loss !== record.loss);
  });
  if (other) return other.step - 1;
  const [last, before] = [records.at(-1)?.step ?? 0, known.at(-1)?.step ?? 0];
  return last < before ? last : null;
}

/** The server's events, and a loss that is no number. @param {any} answer @returns {Event[]} */
function marked({ events, records }) {
  const lost = records.filter((/** @type {Step} */ record) => "loss" in record && !isNumber(record.loss));
  return merged(events, lost.map((/** @type {Step} */ { step }) => ({ step, kind: "nan", text: "the loss is not finite" })));
}

/** @param {Event[]} some @param {Event[]} others */
function merged(some, others) {
  const byName = new Map([...some, ...others].map((event) => [`${event.step} ${event.kind}`, event]));
  return [...byName.values()].sort((a, b) => a.step - b.step);
}

/** @param {any} value */
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** @param {any} value NaN for what is none, so that a line breaks there */
export const numberOr = (value) => (isNumber(value) ? value : NaN);

/** The layers a field has numbers for. @param {Run[]} runs @param {string} field */
export function layersOf(runs, field) {
  const found = new Set(runs.flatMap((run) => [run.records[0], run.records.at(-1)]).flatMap((record) => Object.keys(record?.[field] ?? {})));
  return [...found].map(Number).sort((a, b) => a - b);
}

/**
 * A moving mean that forgets: `weight` is what a step leaves of the mean before it, whatever steps the
 * records leave out; its beginning is corrected, as Adam's.
 * @param {ArrayLike<number>} steps @param {number[]} values @param {number} weight 0 (none) to below 1
 */
export function smoothed(steps, values, weight) {
  let [mean, norm, before] = [0, 0, steps[0] - 1];
  return values.map((value, i) => {
    if (!Number.isFinite(value)) return NaN;
    const kept = weight ** Math.max(1, steps[i] - before);
    before = steps[i];
    mean = kept * mean + (1 - kept) * value;
    norm = kept * norm + (1 - kept);
    return mean / norm;
  });
}

/** Tokens of each expert as multiples of the fair share. @param {number[] | undefined} load */
export function shares(load) {
  const sum = (load ?? []).reduce((a, b) => a + b, 0);
  return sum ? /** @type {number[]} */ (load).map((tokens) => (tokens * /** @type {number[]} */ (load).length) / sum) : [];
}

/** How even a load is: its entropy over that of a fair one, 0 to 1. @param {number[] | undefined} load */
export function evenness(load) {
  const each = shares(load);
  if (each.length < 2) return NaN;
  const entropy = each.reduce((sum, share) => (share ? sum - (share / each.length) * Math.log(share / each.length) : sum), 0);
  return entropy / Math.log(each.length);
}

/** What differs in two configs, key by key. @param {any} one @param {any} other @returns {[string, string, string][]} */
export function differences(one, other) {
  const flat = (/** @type {any} */ value, /** @type {string} */ path) => (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length
    ? Object.entries(value).flatMap(([key, inner]) => flat(inner, path ? `${path}.${key}` : key)) : [[path, JSON.stringify(value)]]);
  const [left, right] = [new Map(flat(one ?? {}, "")), new Map(flat(other ?? {}, ""))];
  return [...new Set([...left.keys(), ...right.keys()])].filter((key) => left.get(key) !== right.get(key)).map((key) => [key, left.get(key) ?? "–", right.get(key) ?? "–"]);
}
