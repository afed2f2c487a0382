/**
 * Any part of the page as one SVG, and that as a PNG: boxes become rectangles, text stays text,
 * canvases become images, drawings are taken over with the style they have on the page.
 */

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity", "visibility", "font-family", "font-size", "font-weight", "font-style", "text-anchor"];

/** @param {string} name @param {Record<string, any>} attributes */
function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  return element;
}

const NOT_XML = /[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]/g; // what a text may hold and no XML file

/** @type {Record<string, string>} */
const DASHES = { dashed: "5 4", dotted: "1.5 3" };

/** A rectangle whose stroke lies within a place, as a border does. @param {{x: number, y: number, width: number, height: number}} place @param {number} line */
const within = ({ x, y, width, height }, line) => ({ x: x + line / 2, y: y + line / 2, width: Math.max(0, width - line), height: Math.max(0, height - line) });

const isClear = (/** @type {string} */ colour) => colour === "transparent" || /^rgba\(.*, 0\)$/.test(colour);

/** A drawing with its style written into it. @param {SVGElement} drawing @param {DOMRect} at @param {DOMRect} origin */
function takeOver(drawing, at, origin) {
  const copy = /** @type {SVGElement} */ (drawing.cloneNode(true));
  const from = [drawing, ...drawing.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, i) => {
    const style = getComputedStyle(from[i]);
    for (const name of DRAWN) element.setAttribute(name, style.getPropertyValue(name));
    element.removeAttribute("class");
    element.removeAttribute("tabindex");
  });
  for (const [key, value] of Object.entries({ x: at.left - origin.left, y: at.top - origin.top, width: at.width, height: at.height, overflow: "visible" })) copy.setAttribute(key, String(value));
  return copy;
}

/** @param {string} line @param {CSSStyleDeclaration} style @param {number} x @param {number} y of its foot */
function write(line, style, x, y) {
  const { color: fill, fontFamily, fontSize, fontWeight, fontStyle } = style;
  const written = make("text", { x, y, fill, "font-family": fontFamily, "font-size": fontSize, "font-weight": fontWeight, "font-style": fontStyle, "xml:space": "preserve" });
  written.textContent = line.replaceAll("\n", " ");
  return written;
}

/** @param {Text} text @param {DOMRect} origin @param {Element} into */
function copyText(text, origin, into) {
  const content = text.data;
  if (!content.trim() || !text.parentElement) return;
  const style = getComputedStyle(text.parentElement);
  const range = document.createRange();
  let line = "";
  /** @type {DOMRect | null} */
  let place = null;
  const flush = () => {
    if (line.trim() && place) {
      const written = write(line, style, place.left - origin.left, place.top - origin.top + place.height * 0.78);
      if (style.writingMode === "vertical-rl") {
        const [x, y] = [place.left - origin.left + place.width * 0.75, place.top - origin.top + place.height / 2];
        written.setAttribute("transform", `rotate(-90 ${x} ${y})`);
        written.setAttribute("x", String(x));
        written.setAttribute("y", String(y));
        written.setAttribute("text-anchor", "middle");
      }
      into.append(written);
    }
    line = "";
    place = null;
  };
  const isVertical = style.writingMode === "vertical-rl";
  for (let i = 0; i < content.length; i++) {
    range.setStart(text, i);
    range.setEnd(text, i + 1);
    const [bounds] = range.getClientRects();
    if (!bounds) continue;
    if (place && !isVertical && Math.abs(bounds.top - place.top) > 3) flush();
    if (isVertical) place = text.parentElement.getBoundingClientRect();
    else place ??= bounds;
    line += content[i];
  }
  flush();
}

/** @param {Element} element @param {DOMRect} origin @param {Element} into */
function copy(element, origin, into) {
  const style = getComputedStyle(element);
  if (style.display === "none" || style.visibility === "hidden" || element.matches("label.choice, button.quiet, input[type=range]")) return;
  const at = element.getBoundingClientRect();
  if (!at.width && !at.height) return;
  const place = { x: at.left - origin.left, y: at.top - origin.top, width: at.width, height: at.height };
  if (element instanceof SVGElement) {
    into.append(takeOver(element, at, origin));
    return;
  }
  if (element instanceof HTMLCanvasElement) {
    into.append(make("image", { ...place, href: element.toDataURL("image/png"), preserveAspectRatio: "none" }));
    return;
  }
  const line = parseFloat(style.borderTopWidth);
  if (!line && parseFloat(style.borderBottomWidth)) {
    const y = place.y + place.height - 0.5;
    into.append(make("line", { x1: place.x, x2: place.x + place.width, y1: y, y2: y, stroke: style.borderBottomColor }));
  }
  const isRule = line > 0 && place.height <= line; // nothing but an upper border
  const hasOutline = style.outlineStyle !== "none" && element.matches(".heatmap-column, .heatmap-row");
  if (!isClear(style.backgroundColor) || (line && !isClear(style.borderTopColor)) || hasOutline) {
    into.append(make(isRule ? "line" : "rect", {
      ...(isRule ? { x1: place.x, x2: place.x + place.width, y1: place.y + line / 2, y2: place.y + line / 2, "stroke-dasharray": DASHES[style.borderTopStyle] ?? "none" } : within(place, hasOutline ? 0 : line)), rx: parseFloat(style.borderTopLeftRadius) || 0, fill: isClear(style.backgroundColor) ? "none" : style.backgroundColor,
      stroke: hasOutline ? style.outlineColor : line ? style.borderTopColor : "none", "stroke-width": hasOutline ? 1.5 : line || 0,
    }));
  }
  if (element instanceof HTMLInputElement) into.append(write(element.value || element.placeholder, style, place.x + parseFloat(style.paddingLeft), place.y + place.height * 0.7));
  for (const child of element.childNodes) {
    if (child instanceof Text) copyText(child, origin, into);
    else if (child instanceof Element) copy(child, origin, into);
  }
}

/** A part of the page as SVG text. @param {Element} element */
export function toSvg(element) {
  const origin = element.getBoundingClientRect();
  const [width, height] = [Math.ceil(element.scrollWidth || origin.width), Math.ceil(element.scrollHeight || origin.height)];
  const root = make("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` });
  const ground = getComputedStyle(document.body).backgroundColor;
  root.append(make("rect", { width, height, fill: ground }));
  const top = new DOMRect(origin.left - element.scrollLeft, origin.top - element.scrollTop, width, height);
  for (const child of element.children) copy(child, top, root);
  return new XMLSerializer().serializeToString(root).replace(NOT_XML, "\ufffd");
}

/** @param {string} svg @param {number} [ratio] pixels of the picture for one of the page @returns {Promise<Blob>} */
export async function toPng(svg, ratio = 2) {
  const image = new Image();
  image.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  try {
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth * ratio;
    canvas.height = image.naturalHeight * ratio;
    const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    pen.scale(ratio, ratio);
    pen.drawImage(image, 0, 0);
    return await new Promise((done, fail) => canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("The browser could not make a PNG of this view; SVG works without it."))), "image/png"));
  } finally {
    URL.revokeObjectURL(image.src);
  }
}
