/** A KDA head's memory: what is in it, what the token changed, how large it grows, what can still be read. */

import { choice, h, show } from "../draw/dom.js";
import { heatmap } from "../draw/heatmap.js";
import { legend } from "../draw/legend.js";
import { lineChart } from "../draw/line.js";
import { exact, visible } from "../draw/number.js";
import { scale, symmetric } from "../draw/scale.js";
import { norm, walk } from "../derive.js";
import { facts, figure } from "../panel.js";

let shown = "memory"; // what the reader looked at last

/** @type {import("../panel.js").View} */
export const memory = {
  id: "memory",
  title: "Memory",
  explain: "A head keeps a matrix of K key channels by V value channels. A token lets it forget, asks what it recalls under the token's key, writes the correction delta = beta (v − recalled), and reads it with the query. Its size never grows.",
  docs: "docs/kda.md, One token",
  needs: "trace",
  over: "kda.memory_norm",
  hasHeads: true,
  async draw({ trace, store, layer, head, width, app }) {
    const [norms, changes] = await trace.arrays(["kda.memory_norm", "kda.change_norm"], layer);
    const heads = norms.shape[1];
    const series = (/** @type {import("../trace.js").Numbers} */ of) => Array.from({ length: heads }, (_, r) => ({ name: `head ${r}`, y: of.column(r), className: r === head ? "is-lit" : "is-faint" }));
    const options = { width, height: 135, xTitle: "token", pick: (/** @type {number} */ t) => store.set({ token: t }), hasNames: false };
    const charts = [
      lineChart(series(norms), { ...options, yTitle: "Frobenius norm of the memory", yDomain: [0, Math.max(...norms.data)] }),
      lineChart(series(changes), { ...options, yTitle: "Frobenius norm of its change", yDomain: [0, Math.max(...changes.data)] }),
    ];
    const place = h("div", {});
    const probe = h("div", {});
    const canDerive = trace.has("kda.key", layer) && trace.has("kda.log_decay", layer);
    const steps = canDerive ? await walk(trace, layer, head) : null;
    /** @type {ReturnType<typeof lineChart> | null} */
    let recalled = null;
    let probed = -1;
    const lowest = () => (steps ? steps.token(store.shown()) : null);

    /** @param {number} token */
    function drawMemory(token) {
      const found = lowest();
      if (!steps || !found) {
        show(place, h("p", { class: "note" }, trace.reason("kda.key", layer)));
        return;
      }
      const { K, V } = steps;
      const change = found.after.map((value, i) => value - found.before[i]);
      const matrix = shown === "change" ? change : found.after;
      const colour = scale("diverging", symmetric(matrix), "root");
      const map = heatmap({
        rows: K, columns: V, value: (r, c) => matrix[r * V + c], scale: colour, width: Math.min(width - 60, 460), height: 300, least: 2, leastRow: 2, most: 8, mostRow: 8,
        label: `${shown} of head ${head} after token ${token}`, rowTitle: "key channel", columnTitle: "value channel →",
        lines: (r, c) => [`Key channel ${r}, value channel ${c}`, ["after the token", exact(found.after[r * V + c])], ["before", exact(found.before[r * V + c])], ["change", exact(change[r * V + c])]],
      });
      show(place,
        figure(`${shown === "change" ? "What token" : "Memory after token"} ${token} “${visible(trace.tokens[token].text)}”${shown === "change" ? " changed" : ""}`,
          [choice("show", [["memory", "memory"], ["change", "change"]], shown, (v) => { shown = v; app.panel.draw(); }), legend(colour, shown, "value × key")], map.element),
        facts([["norm", exact(norm(found.after))], ["norm of the change", exact(norm(change))], ["recalled, norm", exact(norm(found.recalled))], ["value, norm", exact(norm(steps.value(token)))],
          ["delta written, norm", exact(norm(found.delta))], ["beta", exact(steps.beta(token))]]));
    }

    /** @param {number} token */
    function drawProbe(token) {
      if (!steps || token === probed) return;
      probed = token;
      const { recalled: still, retained } = steps.recall(token);
      const x = Array.from(still, (_, i) => token + i);
      recalled = lineChart([
        { name: "recalled: what its key brings back of its value", x, y: still, className: "is-lit", colour: "var(--accent)" },
        { name: "retained: what forgetting alone would leave", x, y: retained, className: "is-dashed" },
      ], { ...options, hasNames: true, height: 150, yTitle: "fraction", yDomain: [Math.min(0, ...still), Math.max(1, ...still)] });
      show(probe, figure(`Recall probe: what token ${token} “${visible(trace.tokens[token].text)}” wrote, read again later`, null, recalled.element));
    }

    return {
      element: [place, probe, figure("Memory over the tokens", `head ${head} is lit, the others faint`, charts[0].element), figure("Change at each token", null, charts[1].element)],
      step(token) {
        drawMemory(token);
        drawProbe(store.get().token);
        for (const chart of charts) chart.mark(token);
        recalled?.mark(token >= probed ? token : null);
      },
    };
  },
};
