/* Small helpers: elements made of text, never of markup; numbers as people read them. */

const SVG = "http://www.w3.org/2000/svg";
const report = JSON.parse(document.getElementById("report").textContent);
const COLOURS = JSON.parse(document.getElementById("colours").textContent);

/** An element. Attributes are set as such; "on" has listeners, "style" CSS properties. Children are nodes or text. */
function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
const sv = (tag, attributes, ...children) => make(SVG, tag, attributes, children);

/** Bytes in binary units, as Keepless prints them. */
function bytes(count) {
  let size = count;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024) return unit === "B" ? `${Math.round(size)} B` : `${size.toFixed(2)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(2)} TiB`;
}

function seconds(time) {
  if (time >= 1) return `${time.toFixed(2)} s`;
  if (time >= 1e-4) return `${(time * 1e3).toFixed(time < 0.01 ? 2 : 1)} ms`;
  return `${(time * 1e6).toFixed(0)} \u00b5s`;
}

/** 0.042 as "+4.2 %". */
function percent(share, digits = 1) {
  const text = (share * 100).toFixed(digits);
  return `${Number(text) >= 0 ? "+" : "\u2212"}${text.replace("-", "")} %`;
}

const share = (part) => `${(part * 100).toFixed(1)} %`;
const took = (time) => (time > 0 ? `takes ${seconds(time)}` : "takes no time");

/** A count; millions and more in short. */
function count(number) {
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6]]) {
    if (number >= size) return `${(number / size).toPrecision(4)} ${unit}`;
  }
  return whole(number);
}
const whole = (number) => Math.round(number).toLocaleString("en-US");
const named = (name) => name || "(model)";

/** A number with its unit, as in `Metric` and `AccuracyRow`. */
function shown(value, unit) {
  if (unit === "bytes") return bytes(value);
  if (unit === "seconds") return seconds(value);
  if (unit === "share") return share(value);
  if (unit === "count") return count(value);
  return `${Number(value.toPrecision(3))} ${unit}`.trim();
}

/** About `count` round numbers from 0 (or `low`) to `high`. */
function ticks(low, high, count) {
  const span = high - low || 1;
  const raw = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= raw) || raw;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

/** The binary unit in which an axis up to `most` bytes is labelled. */
function unitOf(most) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (most >= 1.2 * size) return { unit, size };
  }
  return { unit: "bytes", size: 1 };
}

const trimmed = (number) => String(Number(number.toPrecision(6)));

/** The last index whose start is not behind `x`. */
function indexAt(starts, x) {
  let low = 0;
  let high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Calls `draw(width)` now and whenever the element's width changes. */
function whenWide(node, draw) {
  let last = 0;
  const look = () => {
    const width = Math.floor(node.clientWidth);
    if (width && width !== last) draw((last = width));
  };
  new ResizeObserver(look).observe(node);
  look();
}

/** A section of the page, with its place in the navigation. */
function section(id, title, sub, ...children) {
  const head = [el("h2", { id: `${id}-title` }, title)];
  if (sub) head.push(el("p", { class: "sub" }, sub));
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  return el("section", { id, "aria-labelledby": `${id}-title` }, head, ...children);
}
