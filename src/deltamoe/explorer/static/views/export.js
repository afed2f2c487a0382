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

/** A view drawn aside at a width of its own, taken as SVG. @param {import("../panel.js").View} view @param {any} app */
async function pictureOf(view, app) {
  const { store, trace } = app;
  const layers = view.over ? trace.entries.get(view.over)?.layers ?? [] : null;
  const layer = layers ? layers.toSorted((/** @type {number} */ a, /** @type {number} */ b) => Math.abs(a - store.get().layer) - Math.abs(b - store.get().layer))[0] : store.get().layer;
  if (layer === undefined) throw new Error(`This model has no layer that “${view.title}” can show.`);
  const place = h("div", { class: "aside-drawing" });
  document.body.append(place);
  try {
    const drawn = await view.draw({ trace, store, layer, head: store.get().head, width: 640, app });
    show(place, h("h2", {}, view.title), h("p", { class: "explain" }, view.explain), drawn.element);
    await drawn.step?.(store.get().token);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const svg = toSvg(place);
    drawn.stop?.();
    return svg;
  } finally {
    place.remove();
  }
}

/** @type {import("../panel.js").View} */
export const exporting = {
  id: "export",
  title: "Export",
  explain: "A picture of any view for a paper or a talk; the trace as a file that deltamoe explore opens without the model; or everything as one HTML file that opens offline and asks nobody for anything.",
  docs: "docs/explorer.md",
  needs: "trace",
  async draw({ trace, app }) {
    const said = h("p", { class: "note", role: "status" });
    const views = app.views.filter((/** @type {import("../panel.js").View} */ view) => view.needs === "trace" && view.id !== "export" && (view.id !== "ablate" || app.canBranch()));
    pictured ||= views[0].id;
    const block = () => /** @type {Element} */ (document.querySelector(".block-place"));
    const name = (/** @type {string} */ what, /** @type {string} */ ending) => `deltamoe-${what}-layer${app.store.get().layer}-token${app.store.get().token}.${ending}`;
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
        figure("A picture of the opened block", null, h("div", { class: "controls" },
          button("SVG", run(async () => [name("block", "svg"), svgBlob(toSvg(block()))])),
          button("PNG", run(async () => [name("block", "png"), await toPng(toSvg(block()))])))),
        figure("The trace", null, h("p", { class: "note" }, `${trace.numTokens} tokens, ${bytes(trace.summary.arrays.reduce((/** @type {number} */ sum, /** @type {any} */ one) => sum + one.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, one.dtype === "u16" ? 2 : 4), 0))} of numbers.`),
          h("div", { class: "controls" },
            button("Trace file", run(async () => ["trace.safetensors", new Blob([await file()], { type: "application/octet-stream" })])),
            button("One HTML file", run(async () => ["trace.html", new Blob([await toHtml(await file())], { type: "text/html" })])),
            button("Summary as JSON", run(async () => ["trace.json", new Blob([JSON.stringify(trace.summary, null, 1)], { type: "application/json" })])))),
        said,
      ],
    };
  },
};
