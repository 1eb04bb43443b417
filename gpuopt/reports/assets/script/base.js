// The data of the page, texts for numbers, and the small things every picture needs. Nothing here writes HTML: text enters by textContent alone.
const scene = JSON.parse(document.getElementById("scene").textContent);
const DASH = "—";
const BOUNDS = ["compute", "memory", "unknown"];
const TONES = {compute: "#2f9e44", memory: "#3987e5", unknown: "#98a2ad"};
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

// Rows of the data are arrays: names of their fields stand once, texts are indices.
function named(fields, texts) {
  const at = Object.fromEntries(fields.map((name, index) => [name, index]));
  return row => Object.fromEntries(fields.map(name => {
    const value = row[at[name]];
    return [name, texts.has(name) ? scene.words[value] : value];
  }));
}
const pointOf = named(scene.pointFields, new Set(["name", "module", "dtype", "bound", "ceiling", "note"]));
const moduleOf = named(scene.moduleFields, new Set(["name", "class"]));

function digits(value, significant = 3) {
  if (value === 0) return "0";
  const rounded = Number(value.toPrecision(significant));
  const magnitude = Math.floor(Math.log10(Math.abs(rounded)) + 1e-12);
  return rounded.toFixed(Math.min(100, Math.max(0, significant - 1 - magnitude)));
}
const SI = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
function si(value, unit = "") {
  if (value === null || value === undefined) return DASH;
  for (const [scale, prefix] of SI) if (Math.abs(value) >= scale * 0.9995) return `${digits(value / scale)} ${prefix}${unit}`.trimEnd();
  return `${digits(value)} ${unit}`.trimEnd();
}
function ns(value) {
  if (value === null || value === undefined) return DASH;
  for (const [scale, unit] of [[1e9, "s"], [1e6, "ms"], [1e3, "µs"]]) if (Math.abs(value) >= scale * 0.9995) return `${digits(value / scale)} ${unit}`;
  return value ? `${digits(value)} ns` : "0 ms";
}
function pct(value) {
  if (value === null || value === undefined) return DASH;
  if (value > 0 && value < 0.1) return "<0.1%";
  return Math.abs(value) >= 9.95 || value === 0 ? `${value.toFixed(0)}%` : `${value.toFixed(1)}%`;
}
const short = text => text.replace(/(\.\d*?)0+(?= |$)/, "$1").replace(/\.(?= |$)/, "");
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const clip = (text, length) => text.length > length ? text.slice(0, length - 1) + "…" : text;
const ceilingName = row => `${row.quantity} ${row.quantity === "memory" ? `${digits(row.value / 1e9, row.value >= 1e12 ? 4 : 3)} GB/s` : si(row.value, "FLOP/s")}, ${row.kind === "spec" ? "data sheet" : row.kind}`;

// element("div", {class: "x"}, child, "text"): children are nodes or text.
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

const tip = element("div", {class: "tip", hidden: true, "aria-hidden": "true"});
const voice = element("div", {class: "sr", role: "status", "aria-live": "polite"});
document.body.append(tip, voice);

// title, line below it, rows of [name, text]; near x, y of the window.
function showTip(title, below, rows, x, y) {
  const list = element("dl", {});
  for (const [name, text] of rows) if (text && text !== DASH) list.append(element("dt", {}, name), element("dd", {}, text));
  tip.replaceChildren(element("b", {}, title), element("span", {class: "dim"}, below), list);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? Math.max(8, x - box.width - 16) : x + 16;
  const top = Math.max(8, Math.min(y + 14, innerHeight - box.height - 8));
  tip.style.transform = `translate(${left}px,${top}px)`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, {passive: true});
function say(text) { voice.textContent = text; }

function pointTip(p, total, x, y) {
  showTip(p.name + (p.count > 1 && !p.isRun ? ` ×${p.count}` : ""), p.module || (p.isRun ? "" : "(root)"), [
    ["time", ns(p.time) + (total && !p.isRun ? ` (${pct(100 * p.time / total)})` : "")],
    ["FLOPs", p.flops === null ? DASH : si(p.flops, "FLOP")],
    ["bytes", p.bytes === null ? DASH : si(p.bytes, "B")],
    ["intensity", p.flops && p.bytes ? `${digits(p.flops / p.bytes)} FLOP/B` : DASH],
    ["speed", p.flops ? si(p.flops / p.time * 1e9, "FLOP/s") : p.bytes ? si(p.bytes / p.time * 1e9, "B/s") : DASH],
    ["reaches", p.pct === null ? DASH : `${pct(p.pct)} of ${p.ceiling || "its ceiling"}`],
    ["to win", p.floor === null || p.floor === undefined ? DASH : ns(Math.max(0, p.time - p.floor))],
    ["bound", p.bound === "unknown" ? DASH : p.bound], ["dtype", p.dtype || DASH], ["note", p.note || DASH],
  ], x, y);
}
const pointWords = p => `${p.name} in ${p.module || "root"}, ${ns(p.time)}, ${p.pct === null ? "ceiling unknown" : `${pct(p.pct)} of ${p.ceiling}`}`;

// Draws again where the width has changed; a picture that fails leaves the tables, which need no script.
function picture(name, draw) {
  const host = document.querySelector(`[data-picture="${name}"]`);
  if (!host) return;
  host.hidden = false;
  let width = 0;
  const again = () => {
    if (!host.clientWidth || host.clientWidth === width) return;
    width = host.clientWidth;
    redraw(width);
  };
  let redraw;
  try {
    redraw = draw(host);
    again();
  } catch (error) {
    host.hidden = true;
    throw error;
  }
  new ResizeObserver(again).observe(host);
}
