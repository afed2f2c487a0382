/** Export: pictures of what is on the page, the trace as a file, the whole as a page of its own. */

import { traceFile } from "../api.js";
import { button, choice, h, show } from "../draw/dom.js";
import { bytes } from "../draw/number.js";
import { toHtml } from "../offline.js";
import { toPng, toSvg } from "../picture.js";
import { figure } from "../panel.js";

let pictured = ""; // the view the reader chose last

/** @param {string} name @param {Blob} blob */
function save(name, blob) {
  const link = /** @type {HTMLAnchorElement} */ (h("a", { href: URL.createObjectURL(blob), download: name }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const [NARROW, WIDE] = [640, 1240];

/** A view drawn aside at a width of its own, taken as SVG. @param {import("../panel.js").View} view @param {any} app */
async function pictureOf(view, app) {
  const { store, trace } = app;
  const width = view.isWide ? WIDE : NARROW;
  const layers = view.over ? trace.entries.get(view.over)?.layers ?? [] : null;
  const layer = layers ? layers.toSorted((/** @type {number} */ a, /** @type {number} */ b) => Math.abs(a - store.get().layer) - Math.abs(b - store.get().layer))[0] : store.get().layer;
  if (layer === undefined) throw new Error(`This model has no layer that “${view.title}” can show.`);
  const place = h("div", { class: "aside-drawing", style: { width: `${width + 40}px` } });
  document.body.append(place);
  /** @type {import("../panel.js").Drawn | null} */
  let drawn = null;
  try {
    drawn = await view.draw({ trace, store, layer, head: store.get().head, width, app });
    show(place, h("h2", {}, view.title), h("p", { class: "explain" }, view.explain), drawn.element);
    await drawn.step?.(store.get().token);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    return toSvg(place);
  } finally {
    drawn?.stop?.();
    place.remove();
  }
}

/** @type {import("../panel.js").View} */
export const exporting = {
  id: "export",
  title: "Export",
  explain: "A picture of any view for a paper or a talk; the trace as a file that deltamoe explore opens without the model; or everything as one HTML file that opens offline and asks nobody for anything.",
  docs: "docs/explorer.md",
  needs: "nothing",
  async draw({ trace, app }) {
    const said = h("p", { class: "note", role: "status" });
    const isThere = { ablate: app.canBranch(), chat: Boolean(app.status?.chat), runs: Boolean(app.status?.has_runs), export: false };
    const views = app.views.filter((/** @type {import("../panel.js").View} */ { id, needs }) => (needs !== "trace" || trace) && (isThere[/** @type {"chat"} */ (id)] ?? true));
    if (!views.length) return { element: h("div", { class: "empty" }, "There is nothing to take a picture of yet: record a text, or open a trace file.") };
    if (!views.some((/** @type {import("../panel.js").View} */ { id }) => id === pictured)) pictured = views[0].id;
    const block = () => /** @type {Element} */ (document.querySelector(".block-place"));
    const name = (/** @type {string} */ what, /** @type {string} */ ending) => `deltamoe-${what}${chosen().needs === "trace" || what === "block" ? `-layer${app.store.get().layer}-token${app.store.get().token}` : ""}.${ending}`;
    const run = (/** @type {() => Promise<[string, Blob]>} */ make) => async () => {
      show(said, "Making it…");
      try {
        const [file, blob] = await make();
        save(file, blob);
        show(said, `${file}, ${bytes(blob.size)}`);
      } catch (error) {
        show(said, /** @type {Error} */ (error).message);
      }
    };
    const svgBlob = (/** @type {string} */ svg) => new Blob([svg], { type: "image/svg+xml" });
    const chosen = () => /** @type {import("../panel.js").View} */ (views.find((/** @type {import("../panel.js").View} */ view) => view.id === pictured));
    const file = async () => app.file ?? traceFile(app.traceId);
    return {
      element: [
        figure("A picture of a view", null, h("div", { class: "controls" }, choice("view", views.map((/** @type {import("../panel.js").View} */ view) => [view.id, view.title]), pictured, (value) => { pictured = value; }),
          button("SVG", run(async () => [name(pictured, "svg"), svgBlob(await pictureOf(chosen(), app))])),
          button("PNG", run(async () => [name(pictured, "png"), await toPng(await pictureOf(chosen(), app))])))),
        trace && figure("A picture of the opened block", null, h("div", { class: "controls" },
          button("SVG", run(async () => [name("block", "svg"), svgBlob(toSvg(block()))])),
          button("PNG", run(async () => [name("block", "png"), await toPng(toSvg(block()))])))),
        trace && figure("The trace", null, h("p", { class: "note" }, `${trace.numTokens} tokens, ${bytes(trace.summary.arrays.reduce((/** @type {number} */ sum, /** @type {any} */ one) => sum + one.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, one.dtype === "u16" ? 2 : 4), 0))} of numbers.`),
          h("div", { class: "controls" },
            button("Trace file", run(async () => ["trace.safetensors", new Blob([await file()], { type: "application/octet-stream" })])),
            button("One HTML file", run(async () => ["trace.html", new Blob([await toHtml(await file())], { type: "text/html" })])),
            button("Summary as JSON", run(async () => ["trace.json", new Blob([JSON.stringify(trace.summary, null, 1)], { type: "application/json" })])))),
        said,
      ].filter(Boolean),
    };
  },
};
