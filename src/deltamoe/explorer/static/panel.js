/**
 * The place where one view at a time is shown: its title, its sentence, its controls, and what to say
 * while it loads, when there is nothing to show and when something went wrong.
 */

import { button, choice, h, put, show } from "./draw/dom.js";
import { hideTooltip } from "./draw/tooltip.js";
import { nearestLayer } from "./metrics.js";

/**
 * @typedef {Object} Drawn
 * @property {Element | Element[]} element
 * @property {(token: number) => void | Promise<void>} [step] show another token
 * @property {() => void} [stop] called when the view goes
 */
/**
 * @typedef {Object} View
 * @property {string} id @property {string} title @property {string} explain one sentence in the project's words
 * @property {string} [docs] the page that says more
 * @property {"trace" | "server" | "nothing"} needs
 * @property {string} [over] an array whose layers are the ones that can be chosen
 * @property {boolean} [hasHeads] @property {boolean} [isWide]
 * @property {string[]} [depends] keys of the store that make it draw anew; token and preview call `step`
 * @property {(context: Context) => Promise<Drawn>} draw
 */
/**
 * @typedef {Object} Context
 * @property {import("./trace.js").Trace} trace
 * @property {import("./store.js").Store} store
 * @property {number} layer the chosen one, or the nearest the view can show
 * @property {number} head
 * @property {number} width pixels there are
 * @property {any} app
 */

/** A part of a view: its heading, with choices beside it; what its colours mean in a row of their own. @param {string} title @param {any} aside @param {...any} children */
export function figure(title, aside, ...children) {
  const isKey = (/** @type {any} */ one) => one instanceof Element && one.matches(".legend, .swatch");
  const all = [aside].flat(Infinity).filter(Boolean);
  const keys = all.filter(isKey);
  return h("section", { class: "figure" }, h("div", { class: "figure-head" }, h("h3", {}, title), all.filter((one) => !isKey(one)).map((one) => (typeof one === "string" ? h("span", { class: "note" }, one) : one))),
    keys.length > 0 && h("div", { class: "figure-keys" }, keys), ...children);
}

/** @param {[string, string][]} entries name and value */
export const facts = (entries) => h("div", { class: "facts" }, ...entries.map(([name, value]) => h("div", { class: "fact" }, h("span", {}, name), h("b", {}, value))));

/** @param {any} config @param {string} mixer */
export const headsOf = (config, mixer) => (mixer === "mla" ? config.mla?.num_heads : config.kda ? config.kda.num_value_heads ?? config.kda.num_heads : 0) ?? 0;

/** @param {HTMLElement} root @param {HTMLElement} main @param {View[]} views @param {any} app */
export function createPanel(root, main, views, app) {
  const { store } = app;
  let turn = 0;
  let seen = 0; // the width that is drawn for
  /** @type {Drawn | null} */
  let drawn = null;
  /** @type {View} */
  let view = views[0];

  const chosenView = () => views.find((/** @type {View} */ one) => one.id === store.get().view) ?? views[0];

  /** Open the block a view is about, when the view is chosen. */
  function follow() {
    view = chosenView();
    const layer = layerOf();
    if (view.over && layer !== undefined) store.set({ layer, part: /^(kda|mla)/.test(view.over) ? "mixer" : "channel" });
    else if (!store.get().part) store.set({ part: "channel" });
  }

  function layerOf() {
    const { layer } = store.get();
    return view.over && app.trace ? nearestLayer(app.trace, view.over, layer) : layer;
  }

  /** @param {number} layer */
  function controls(layer) {
    const { trace } = app;
    const layers = view.over && trace ? trace.entries.get(view.over)?.layers ?? [] : [];
    const heads = view.hasHeads && trace ? headsOf(trace.config, trace.layers[layer]?.mixer) : 0;
    return [
      layers.length > 0 && choice("layer", layers.map((/** @type {number} */ one) => [one, String(one)]), layer, (value) => store.set({ layer: Number(value) })),
      heads > 0 && choice("head", Array.from({ length: heads }, (_, i) => /** @type {[number, string]} */ ([i, String(i)])), Math.min(store.get().head, heads - 1), (value) => store.set({ head: Number(value) })),
    ];
  }

  async function draw() {
    const mine = ++turn;
    drawn?.stop?.();
    drawn = null;
    hideTooltip();
    view = chosenView();
    main.dataset.wide = String(Boolean(view.isWide));
    seen = root.clientWidth;
    const layer = layerOf();
    const body = h("div", { class: "panel-body", dataset: { view: view.id } });
    const explain = h("p", { class: "explain" }, view.explain, view.docs && [" ", h("span", { class: "docs" }, view.docs)]);
    const right = h("div", { class: "right" }, ...controls(layer).filter(Boolean));
    show(root, h("div", { class: "section-head" }, h("h2", {}, view.title), right), explain, body);
    const empty = emptiness(layer);
    if (empty) {
      put(body, empty);
      return;
    }
    const waiting = setTimeout(() => put(body, h("div", { class: "loading", role: "status", "aria-label": "Loading" })), 150);
    try {
      const heads = headsOf(app.trace?.config ?? {}, app.trace?.layers[layer]?.mixer);
      const head = Math.min(store.get().head, Math.max(0, heads - 1));
      const width = Math.max(320, seen - 40);
      const found = await view.draw({ trace: app.trace, store, layer, head, width, app });
      if (mine !== turn) {
        found.stop?.();
        return;
      }
      drawn = found;
      show(body, found.element);
      await found.step?.(store.shown());
      body.dataset.ready = "true";
    } catch (error) {
      if (mine === turn) show(body, trouble(/** @type {Error} */ (error)));
    } finally {
      clearTimeout(waiting);
    }
  }

  /** @param {number | undefined} layer */
  function emptiness(layer) {
    const say = (/** @type {any[]} */ ...words) => h("div", { class: "empty" }, ...words);
    if (view.needs === "server" && !app.status) return say("This view needs the program behind the page. Start it with ", h("code", {}, "deltamoe explore RUN"), ".");
    if (view.needs === "trace" && !app.trace) return say("Nothing is recorded yet. ", h("b", {}, "Type a prompt above"), " and press Enter, or open a trace file.");
    if (view.over && app.trace && layer === undefined) return say(`This model has no layer that can show it: ${app.trace.reason(view.over)}`);
    return null;
  }

  /** @param {Error} error */
  function trouble(error) {
    return h("div", { class: "broken", role: "alert" }, h("span", {}, error.message || String(error)), button("Try again", draw));
  }

  store.subscribe((/** @type {any} */ state, /** @type {Set<string>} */ changed) => {
    if (changed.has("view") && app.trace) follow();
    const isOther = changed.has("view") || (changed.has("layer") && view.over) || (changed.has("head") && view.hasHeads) || (view.depends ?? []).some((key) => changed.has(key));
    if (isOther) draw();
    else if (changed.has("token") || changed.has("preview")) {
      Promise.resolve(drawn?.step?.(store.shown())).catch((error) => show(root, trouble(error)));
    }
  });
  let wanted = 0;
  new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - seen) < 24) return;
    clearTimeout(wanted);
    wanted = setTimeout(draw, 120);
  }).observe(root);
  addEventListener("themechange", draw);
  return { draw, follow };
}

/**
 * The tabs. @param {HTMLElement} root @param {View[][]} groups @param {import("./store.js").Store} store
 */
export function showTabs(root, groups, store) {
  let place = 0;
  const tabs = groups.flatMap((group, i) => [
    ...(i ? [h("span", { class: "tab-space", "aria-hidden": "true" })] : []),
    ...group.map((view) => h("button", {
      type: "button", class: "tab", role: "tab", dataset: { view: view.id }, title: ++place < 10 ? `key ${place}` : "keys v, V", on: { click: () => store.set({ view: view.id }) },
    }, view.title)),
  ]);
  root.setAttribute("role", "tablist");
  show(root, ...tabs);
  const mark = () => tabs.forEach((tab) => tab.dataset.view && tab.setAttribute("aria-selected", String(tab.dataset.view === store.get().view)));
  store.subscribe((_, changed) => changed.has("view") && mark());
  mark();
}
