/**
 * The page and a trace in one HTML file that opens without a server: every module becomes a data: URL
 * under a name of its own, an import map joins them, style and trace lie beside. It asks nobody for anything.
 */

const PREFIX = "deltamoe/";
const POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:";
const IMPORT = /(\bfrom\s*|\bimport\s*)(["'])(\.{1,2}\/[^"']+)\2/g;

/** @param {string} text in UTF-8 */
const base64 = (text) => toBase64(new TextEncoder().encode(text));

/** @param {Uint8Array} bytes */
function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

/** Every module that app.js needs, by its path; imports are rewritten to names. @param {URL} root @returns {Promise<Map<string, string>>} */
async function modules(root) {
  /** @type {Map<string, string>} */
  const found = new Map();
  const waiting = [new URL("app.js", root)];
  while (waiting.length) {
    const url = /** @type {URL} */ (waiting.pop());
    const path = url.pathname.slice(root.pathname.length);
    if (found.has(path)) continue;
    found.set(path, "");
    const source = await (await fetch(url)).text();
    found.set(path, source.replace(IMPORT, (_, before, quote, to) => {
      const target = new URL(to, url);
      waiting.push(target);
      return `${before}${quote}${PREFIX}${target.pathname.slice(root.pathname.length)}${quote}`;
    }));
  }
  return found;
}

/** A page made by this function, opened from a file, hands itself on. @param {ArrayBuffer} trace @returns {Promise<string>} */
export async function toHtml(trace) {
  if (document.getElementById("deltamoe-trace")) return `<!doctype html>\n${pristine()}`;
  const root = new URL("static/", document.baseURI);
  const [page, style, scripts] = await Promise.all([
    fetch(document.baseURI.split("#")[0]).then((answer) => answer.text()), fetch(new URL("style.css", root)).then((answer) => answer.text()), modules(root)]);
  const imports = Object.fromEntries([...scripts].map(([path, source]) => [PREFIX + path, `data:text/javascript;base64,${base64(source)}`]));
  const head = [
    `<meta http-equiv="Content-Security-Policy" content="${POLICY}">`,
    `<style>${style}</style>`,
    `<script type="importmap">${JSON.stringify({ imports })}</script>`,
    `<script type="application/octet-stream;base64" id="deltamoe-trace">${toBase64(new Uint8Array(trace))}</script>`,
    `<script type="module">import "${PREFIX}app.js";</script>`,
  ];
  const bare = page.replace(/<script[^>]*src=[^>]*><\/script>|<link[^>]*>/g, "");
  return bare.replace("</head>", () => `${head.join("\n")}\n</head>`);
}

/** The page as it was before anything was drawn into it. */
function pristine() {
  const copy = /** @type {HTMLElement} */ (document.documentElement.cloneNode(true));
  for (const id of ["meters", "buttons", "ask", "tokens", "tabs", "stack", "block", "panel", "said"]) copy.querySelector(`#${id}`)?.replaceChildren();
  for (const element of copy.querySelectorAll("dialog, .tooltip")) element.remove();
  const body = /** @type {HTMLElement} */ (copy.querySelector("body"));
  for (const name of body.getAttributeNames()) body.removeAttribute(name);
  return copy.outerHTML;
}
