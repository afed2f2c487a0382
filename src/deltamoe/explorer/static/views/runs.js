/** Runs: training as its records tell it, live while it goes on, and two runs on the same axes. */

import { button, choice, h, s, show } from "../draw/dom.js";
import { count, exact, short } from "../draw/number.js";
import { explain, hideTooltip } from "../draw/tooltip.js";
import { figure } from "../panel.js";
import { remember, remembered } from "../session.js";
import { differences, followRun, listRuns, numberOr, readRun } from "../training.js";
import { chartOf, QUANTITIES } from "./charts.js";
import { showLoad } from "./load_map.js";

/** @typedef {import("../training.js").Run} Run */

const LIVE_MS = 2000;
const QUIET_MS = 6000;
const MOST_FLAGS = 40;
const FLAGS = /** @type {Record<string, {name: string, shape: string}>} */ ({
  checkpoint: { name: "checkpoint", shape: "l7 3.5l-7 3.5z" }, resume: { name: "resumed", shape: "l4 3.5l-4 3.5zm5 0l4 3.5l-4 3.5z" },
  stop: { name: "stopped", shape: "h7v7h-7z" }, nan: { name: "not finite", shape: "l7 7m0 -7l-7 7" },
});

/** What the reader chose to see. @type {{first: string, second: string, axis: "step" | "tokens", weight: number, layer: number | null}} */
const chosen = { first: "", second: "", axis: "step", weight: 0.9, layer: null, ...remembered("runs") };
/** @type {Map<string, Run>} */
const known = new Map();

/** @type {import("../panel.js").View} */
export const runs = {
  id: "runs",
  title: "Runs",
  explain: "Training as it told it itself, one line of metrics.jsonl a step. A run that goes on is followed; a second one is drawn on the same axes, with what differs between the two.",
  docs: "docs/training.md",
  needs: "server",
  isWide: true,
  async draw({ width }) {
    const list = await listRuns();
    if (!list.length) {
      return { element: h("div", { class: "empty" }, h("b", {}, "No training run is here."), " The runs beside the one that is open are shown: folders with a metrics.jsonl. Begin one with ", h("code", {}, "deltamoe train"), " and open it with ", h("code", {}, "deltamoe explore RUN"), ".") };
    }
    const names = list.map((run) => run.name);
    if (!names.includes(chosen.first)) chosen.first = (list.find((run) => run.is_open) ?? list[0]).name;
    if (!names.includes(chosen.second) || chosen.second === chosen.first) chosen.second = "";
    return watch(list, width); // with everything that was there when it was asked for
  },
};

/** @param {Awaited<ReturnType<typeof listRuns>>} list @param {number} width */
async function watch(list, width) {
  const [head, table, notice, flags, charts, more] = [h("div", { class: "controls" }), h("div", {}), h("p", { class: "note run-notice", role: "status" }), h("div", { class: "keys-of" }), h("div", { class: "charts" }), h("div", {})];
  let isGone = false;
  let timer = 0;
  let turn = 0;
  const wanted = () => [chosen.first, chosen.second].filter(Boolean);

  /** @param {Partial<typeof chosen>} choice */
  function choose(choice) {
    Object.assign(chosen, choice);
    remember("runs", chosen);
    controls();
    load();
  }

  function controls() {
    const options = (/** @type {string} */ except) => list.filter((run) => run.name !== except).map((run) => /** @type {[string, string]} */ ([run.name, run.is_open ? `${run.name} (open)` : run.name]));
    const slider = /** @type {HTMLInputElement} */ (h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: chosen.weight, "aria-label": "smoothing", on: {
      input: () => { chosen.weight = slider.valueAsNumber; draw(); },
      change: () => { remember("runs", chosen); controls(); },
    } }));
    show(head,
      choice("run", options(""), chosen.first, (first) => choose({ first, second: chosen.second === first ? "" : chosen.second })),
      list.length > 1 && choice("beside", [["", "none"], ...options(chosen.first)], chosen.second, (second) => choose({ second })),
      choice("over", [["step", "steps"], ["tokens", "tokens read"]], chosen.axis, (axis) => choose({ axis: /** @type {any} */ (axis) })),
      explain(h("label", { class: "choice" }, h("span", {}, "smoothing"), slider, h("b", { class: "run-weight" }, exact(chosen.weight))), () => ["Smoothing", "What one step leaves of the mean before it. The numbers as they came stay, faint.", ["weight", exact(chosen.weight)]]));
  }

  async function load() {
    clearTimeout(timer);
    const mine = ++turn;
    let wait = QUIET_MS;
    try {
      if (!document.hidden) {
        for (const name of wanted()) {
          const before = known.get(name);
          const now = before ? await followRun(before) : await readRun(name);
          if (isGone || mine !== turn) return;
          known.set(name, now);
        }
        draw();
      }
      show(notice, words());
      if (wanted().some((name) => known.get(name)?.isRunning)) wait = LIVE_MS;
    } catch (error) {
      if (isGone || mine !== turn) return;
      const { message } = /** @type {Error} */ (error);
      if (wanted().every((name) => known.has(name))) show(notice, h("span", { class: "is-wrong" }, `${message} What is drawn is what came before; asking again.`));
      else show(charts, h("div", { class: "broken", role: "alert" }, h("span", {}, message), button("Try again", load)));
    }
    timer = setTimeout(load, wait);
  }

  function words() {
    const shown = wanted().map((name) => known.get(name)).filter((run) => run !== undefined);
    const thinned = shown.filter((run) => run.isThinned);
    return [shown.some((run) => run.isRunning) ? "Following: asks every 2 s." : "Nobody trains here now; asks every 6 s.",
      thinned.length ? ` ${thinned.map((run) => run.name).join(" and ")}: about 1,000 records are drawn, of each stretch those of least and greatest loss.` : "",
      shown.length > 1 ? ` Where a chart has a line for each layer, ${shown[1].name} is dashed.` : ""].join("");
  }

  /** @type {Map<string, Run | undefined>} what is on the page */
  let drawn = new Map();
  let how = "";
  function draw() {
    const shown = /** @type {Run[]} */ (wanted().map((name) => known.get(name)).filter(Boolean));
    const now = JSON.stringify([chosen, width]);
    if (how === now && shown.every((run) => drawn.get(run.name) === run) && shown.length === drawn.size) return;
    [how, drawn] = [now, new Map(shown.map((run) => [run.name, run]))];
    show(table, runTable(shown, list));
    if (!shown.some((run) => run.records.length)) {
      show(charts, h("div", { class: "empty" }, "No step has ended yet. The charts begin with the first."));
      show(flags);
      show(more);
      return;
    }
    const columns = Math.max(1, Math.floor((width + 24) / 420));
    charts.style.setProperty("grid-template-columns", `repeat(${columns}, minmax(0, 1fr))`);
    const all = shown.flatMap((run) => run.records.map((record) => numberOr(record[chosen.axis]))).filter(Number.isFinite);
    /** @type {[number, number]} */
    const xDomain = [Math.min(...all), Math.max(...all)];
    /** @type {(NonNullable<ReturnType<typeof chartOf>>)[]} */
    const made = [];
    const o = {
      axis: chosen.axis, weight: chosen.weight, width: Math.floor((width - 24 * (columns - 1)) / columns), xDomain, flags: shown.flatMap((run, i) => flagsOf(run, i, shown.length)),
      hover: (/** @type {number | null} */ x) => made.forEach((chart) => chart.point(x)),
    };
    show(flags, flagKey(shown));
    for (const quantity of QUANTITIES) {
      const chart = chartOf(quantity, shown, o);
      if (chart) made.push(chart);
    }
    const pointer = document.querySelector(".chart:hover") ? lastPointer : null;
    show(charts, ...made.map((chart) => chart.element));
    show(more, ...shown.map((run) => showLoad(run, chosen, width, (layer) => { chosen.layer = layer; remember("runs", chosen); how = ""; draw(); })), eventsOf(shown), shown.length > 1 && configsOf(shown));
    if (pointer) reach(pointer);
  }

  /** @type {PointerEvent | null} */
  let lastPointer = null;
  charts.addEventListener("pointermove", (event) => { if (event.isTrusted) lastPointer = event; });
  controls();
  await load();
  document.addEventListener("visibilitychange", load);
  return {
    element: [head, table, h("div", { class: "run-said" }, notice, flags), charts, more],
    stop() {
      isGone = true;
      clearTimeout(timer);
      hideTooltip();
      document.removeEventListener("visibilitychange", load);
    },
  };
}

/** Let the chart that was drawn anew under a resting pointer know of it. @param {PointerEvent} event */
function reach({ clientX, clientY }) {
  document.elementFromPoint(clientX, clientY)?.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY, bubbles: true }));
}

/** @param {Run} run @param {number} index @param {number} of */
function flagsOf(run, index, of) {
  const at = new Map(run.records.map((record) => [record.step, record[chosen.axis]]));
  return run.events.filter((event) => event.kind in FLAGS).slice(-MOST_FLAGS).map((event) => ({
    x: chosen.axis === "step" ? event.step : at.get(event.step), className: `is-${event.kind} is-run-${index}`, shape: FLAGS[event.kind].shape,
    text: `${of > 1 ? `${run.name}: ` : ""}${FLAGS[event.kind].name}${event.kind === "checkpoint" ? "" : ` (${event.text})`} at step ${count(event.step)}`,
  })).filter((flag) => Number.isFinite(flag.x));
}

/** What the flags on the axes are. @param {Run[]} shown */
function flagKey(shown) {
  const kinds = Object.keys(FLAGS).filter((kind) => shown.some((run) => run.events.some((event) => event.kind === kind)));
  return kinds.map((kind) => h("span", { dataset: { flag: kind } },
    s("svg", { class: "flag-key", width: 10, height: 9, "aria-hidden": "true" }, s("g", { class: `flag is-${kind}${shown.length > 1 ? "" : " is-run-0"}` }, s("path", { d: `M1 1${FLAGS[kind].shape}` }))), FLAGS[kind].name));
}

/** @param {Run[]} shown @param {{name: string, step: number | null, steps: number | null}[]} list */
function runTable(shown, list) {
  const columns = ["run", "", "step", "tokens read", "loss", "validation", "tokens/s", "gradient norm", "MaxVio, worst layer", "dead experts", "learning rate"];
  const rows = shown.map((run, i) => {
    const last = run.records.at(-1) ?? {};
    const recent = run.records.slice(-20).map((record) => numberOr(record.loss)).filter(Number.isFinite);
    const measured = run.records.findLast((record) => Number.isFinite(record.validation_bits_per_byte));
    const steps = run.config?.train?.steps ?? list.find((one) => one.name === run.name)?.steps;
    const each = Object.values(last.max_vio ?? {});
    const dead = /** @type {number[]} */ (Object.values(last.dead_experts ?? {})).reduce((a, b) => a + b, 0);
    const state = run.isRunning ? "running" : steps && last.step >= steps ? "finished" : "quiet";
    return h("tr", { dataset: { run: run.name } }, h("td", {}, h("i", { class: "run-colour", style: { background: `var(--run-${i})` } }), run.name), h("td", { class: `run-state is-${state}` }, state),
      h("td", {}, `${count(last.step)}${steps ? ` of ${count(steps)}` : ""}`, steps && h("span", { class: "bar-in-bar" }, h("i", { style: { width: `${Math.min(100, (100 * (last.step ?? 0)) / steps)}%` } }))),
      h("td", {}, short(last.tokens)), explain(h("td", { dataset: { loss: recent.at(-1) } }, exact(recent.reduce((a, b) => a + b, 0) / recent.length)), () => [`Loss of ${run.name}`, ["mean of the last 20 records", exact(recent.reduce((a, b) => a + b, 0) / recent.length)], ["last step", exact(numberOr(last.loss))]]),
      h("td", {}, measured ? `${exact(measured.validation_bits_per_byte)} bits/byte` : "–"), h("td", {}, short(last.tokens_per_s)), h("td", {}, exact(last.grad_norm)),
      h("td", {}, each.length ? exact(Math.max(.../** @type {number[]} */ (each))) : "–"), h("td", {}, last.dead_experts ? count(dead) : "–"), h("td", {}, exact(last.lr)));
  });
  return h("div", { class: "run-table" }, h("table", {}, h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", {}, name)))), h("tbody", {}, ...rows)));
}

/** The events as a list; samples in full. @param {Run[]} shown */
function eventsOf(shown) {
  const rows = shown.flatMap((run, i) => run.events.map((event) => ({ run, i, ...event }))).sort((a, b) => b.step - a.step).slice(0, 60);
  if (!rows.length) return null;
  return figure("Events", h("span", { class: "note" }, "the latest first"), h("ol", { class: "run-events" }, ...rows.map(({ run, i, step, kind, text }) => h("li", { class: `is-${kind}` },
    h("i", { class: "run-colour", style: { background: `var(--run-${i})` }, title: run.name }), h("b", {}, `step ${count(step)}`), h("span", { class: "run-kind" }, FLAGS[kind]?.name ?? kind), h("span", { class: "run-text" }, text)))));
}

/** @param {Run[]} shown */
function configsOf([one, other]) {
  const found = differences(one.config, other.config);
  return figure("What differs in their configs", null, found.length
    ? h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "key"), h("th", {}, one.name), h("th", {}, other.name))), h("tbody", {}, ...found.map(([key, left, right]) => h("tr", {}, h("td", {}, h("code", {}, key)), h("td", {}, left), h("td", {}, right)))))
    : h("p", { class: "note" }, one.config && other.config ? "Nothing." : "One of the runs has no config that can be read."));
}
