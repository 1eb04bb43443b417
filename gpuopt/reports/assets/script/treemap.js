// Modules and the ops in them as nested rectangles: area is time, colour how much of the ceiling it reaches. Click or Enter zooms in, Escape or Backspace out.
const DEEP = 5;
const SMALL = 7;
const UNKNOWN = "not attributed";

// Rows of the module tree and the ops' own module names -> one tree. A module's time is its row's; what its children do not hold is a leaf of its own.
function moduleTree({root, modules, ops}) {
  const top = {name: "", label: root, children: new Map(), ops: []};
  const find = name => {
    if (!name) return top;
    if (name === "?") return child(top, "?", UNKNOWN);
    let node = top, path = "";
    for (const step of name.split(".")) {
      path = path ? `${path}.${step}` : step;
      node = child(node, path, step);
    }
    return node;
  };
  const child = (node, name, label) => {
    if (!node.children.has(name)) node.children.set(name, {name, label, children: new Map(), ops: []});
    return node.children.get(name);
  };
  for (const row of modules.map(moduleOf)) Object.assign(find(row.name), {row});
  for (const op of ops.map(pointOf)) find(op.module).ops.push(op);
  const settle = node => {
    const children = [...node.children.values()].map(settle);
    for (const [name, members] of d3.group(node.ops, op => op.name)) {
      const time = d3.sum(members, m => m.time), priced = members.filter(m => m.floor !== null), covered = d3.sum(priced, m => m.time);
      children.push({name: node.name, label: name, isOp: true, time, flops: d3.sum(members, m => m.flops ?? 0), bytes: d3.sum(members, m => m.bytes ?? 0),
        floor: priced.length ? d3.sum(priced, m => m.floor) : null, covered, count: d3.sum(members, m => m.count), children: []});
    }
    const inside = d3.sum(children, c => c.time), own = node.row?.time ?? 0, rest = own - inside;
    if (children.length && rest > 0.01 * own) children.push({name: node.name, label: "not broken down", isOp: true, isRest: true, time: rest, floor: null, covered: 0, count: 1, children: []});
    const priced = children.filter(c => c.floor !== null);
    const floor = priced.length ? d3.sum(priced, c => c.floor) : null, covered = d3.sum(priced, c => c.covered);
    return {name: node.name, label: node.label, class: node.row?.class ?? "", time: Math.max(own, inside), row: node.row, floor, covered,
      flops: node.row?.flops ?? d3.sum(children, c => c.flops ?? 0), bytes: node.row?.bytes ?? d3.sum(children, c => c.bytes ?? 0),
      parameters: node.row?.parameters ?? null, children: children.filter(c => c.time > 0)};
  };
  return settle(top);
}
const reach = d => d.row?.pct ?? (d.floor !== null && d.covered > 0 ? 100 * d.floor / d.covered : null);

// A chain of modules that each hold one other is one step: `encoder.layer`.
function shortened(node) {
  let label = node.label, inner = node;
  while (inner.children.length === 1 && !inner.children[0].isOp) {
    inner = inner.children[0];
    label += `.${inner.label}`;
  }
  // One op alone in a module is that module: a rectangle of its own would say nothing more.
  if (inner.children.length === 1) return {...inner.children[0], label, name: inner.name, class: inner.class, parameters: inner.parameters, op: inner.children[0].label};
  return {...inner, label, children: inner.children.map(shortened)};
}

function drawTreemap(host) {
  const crumbs = element("div", {class: "tools", role: "navigation", "aria-label": "Module path"});
  const canvas = element("div", {});
  const key = element("p", {class: "key"});
  const hue = d3.scaleSequential(d3.interpolateRdYlBu).domain([0, 100]).clamp(true);
  const legend = element("span", {});
  const swatch = d3.select(legend).append("svg").attr("width", 120).attr("height", 10).attr("aria-hidden", "true");
  swatch.selectAll("rect").data(d3.range(24)).join("rect").attr("x", i => i * 5).attr("width", 5).attr("height", 10).attr("fill", i => hue(i / 23 * 100));
  key.append(element("span", {}, "area: time"), element("span", {}, "0% ", legend, " 100% of its ceiling"),
    element("span", {}, "grey: no ceiling known"), element("span", {class: "hint"}, "click to zoom in, Escape to go back"));
  let width = 0, tree = 0, path = [], nodes = [];
  const load = index => { tree = index; path = [shortened(moduleTree(scene.trees[index]))]; };
  load(0);
  host.replaceChildren(crumbs, canvas, key);

  function go(next, focus) {
    path = next;
    paint();
    say(`${path.at(-1).label}, ${ns(path.at(-1).time)}`);
    if (focus) canvas.querySelector("[tabindex='0']")?.focus();
  }
  function paintCrumbs() {
    crumbs.replaceChildren();
    if (scene.trees.length > 1) {
      const select = element("select", {"aria-label": "Run", onchange: event => { load(Number(event.target.value)); paint(); }});
      scene.trees.forEach((t, index) => select.append(element("option", {value: index, selected: index === tree}, t.title)));
      crumbs.append(select);
    }
    const trail = element("span", {});
    path.forEach((node, index) => {
      if (index) trail.append(" › ");
      trail.append(element("button", {type: "button", class: "crumb", "aria-current": index === path.length - 1 ? "true" : null,
        onclick: () => go(path.slice(0, index + 1), true)}, node.label));
    });
    const here = path.at(-1);
    crumbs.append(trail, element("span", {class: "status"}, [ns(here.time), pct(100 * here.time / (path[0].time || 1)) + " of the time",
      reach(here) === null ? "" : `${pct(reach(here))} of its ceiling`].filter(Boolean).join(" · ")));
    if (path.length > 1 && here.name && listeners.query && !scene.rooflines[0]?.isRuns) {
      crumbs.append(element("button", {type: "button", class: "push", onclick: () => {
        listeners.query(here.name);
        document.getElementById("roofline")?.scrollIntoView();
      }}, "These ops on the roofline"));
    }
  }

  function paint() {
    paintCrumbs();
    const height = width < 560 ? 420 : Math.min(560, Math.max(380, width * 0.42));
    const root = d3.hierarchy(path.at(-1), d => d.children).eachAfter(node => { node.value = node.children ? Math.max(d3.sum(node.children, c => c.value), 0) : node.data.time; });
    root.sort((a, b) => b.value - a.value);
    d3.treemap().size([width, height]).tile(d3.treemapSquarify.ratio(1.35)).paddingInner(1).paddingOuter(2)
      .paddingTop(node => node.depth && node.x1 - node.x0 > 44 && node.y1 - node.y0 > 34 ? 19 : 2)(root);
    nodes = [];
    const collect = node => {
      const w = node.x1 - node.x0, h = node.y1 - node.y0;
      if (w < 1.5 || h < 1.5) return;
      const open = node.children && node.depth < DEEP && (node.depth === 0 || Math.min(w, h) > 3 * SMALL);
      if (node.depth) nodes.push({node, w, h, open});
      if (open) node.children.forEach(collect);
    };
    collect(root);
    const whole = path[0].time || 1;
    const svg = d3.create("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("role", "group")
      .attr("aria-label", `Modules of ${path.at(-1).label} by time`);
    const tiles = svg.selectAll("g").data(nodes).join("g").attr("transform", ({node}) => `translate(${node.x0},${node.y0})`);
    const colour = d => { const value = reach(d); return value === null ? null : hue(value); };
    tiles.append("rect").attr("class", ({node}) => `tile${node.data.isOp ? " leaf" : ""}${reach(node.data) === null ? " missing" : ""}`)
      .attr("width", t => Math.max(0, t.w)).attr("height", t => Math.max(0, t.h)).attr("rx", 2)
      .attr("fill", ({node}) => colour(node.data))
      .attr("tabindex", ({node, w, h}) => node.depth <= 2 && w * h > 500 ? 0 : null).attr("role", ({node}) => node.data.isOp ? "img" : "button")
      .attr("aria-label", ({node}) => `${node.data.label}${node.data.class ? `, ${node.data.class}` : ""}, ${ns(node.data.time)}, ${pct(100 * node.data.time / whole)} of the time, ${reach(node.data) === null ? "ceiling unknown" : `${pct(reach(node.data))} of its ceiling`}`)
      .on("click", (event, t) => enter(t.node, false))
      .on("keydown", (event, t) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enter(t.node, true); }
        if ((event.key === "Escape" || event.key === "Backspace") && path.length > 1) { event.preventDefault(); go(path.slice(0, -1), true); }
      })
      .on("pointermove", (event, t) => tileTip(t.node.data, event.clientX, event.clientY))
      .on("pointerleave", hideTip)
      .on("focus", (event, t) => { const at = event.target.getBoundingClientRect(); if (event.target.matches(":focus-visible")) tileTip(t.node.data, at.left + 10, at.top + 10); })
      .on("blur", hideTip);
    tiles.each(function ({node, w, h, open}) {
      if (w < 40 || h < 17) return;
      const fill = colour(node.data), room = Math.floor((w - 9) / 7.2);
      if (room < 3) return;
      const ink = fill === null ? "var(--fg)" : d3.lab(fill).l > 58 ? "#14181d" : "#fff";
      const write = (text, y, small) => d3.select(this).append("text").attr("class", `ontile${small ? " small" : ""}`).attr("x", 5).attr("y", y).style("fill", ink).text(text);
      const share = pct(100 * node.data.time / whole);
      const text = node.data.label + (node.data.count > 1 ? ` ×${node.data.count}` : "");
      write(room > text.length + 6 && (open || h < 34) ? `${text}  ${share}` : clip(text, room), 14, false);
      if (!open && h >= 34) write(`${ns(node.data.time)}, ${share}`.length <= room ? `${ns(node.data.time)}, ${share}` : share, 29, true);
    });
    canvas.replaceChildren(svg.node());
  }
  function enter(node, focus) {
    const steps = node.ancestors().reverse().slice(1).map(n => n.data).filter(d => !d.isOp && d.children.length);
    if (steps.length) go([...path, ...steps], focus);
  }
  function tileTip(d, x, y) {
    showTip(d.label + (d.count > 1 ? ` ×${d.count}` : ""), d.isOp && !d.op ? d.name || "(root)" : [d.name, d.class, d.op].filter(Boolean).join(" · "), [
      ["time", `${ns(d.time)} (${pct(100 * d.time / (path[0].time || 1))})`],
      ["reaches", reach(d) === null ? DASH : `${pct(reach(d))} of its ceiling`],
      ["to win", d.floor === null ? DASH : ns(Math.max(0, d.covered - d.floor))],
      ["FLOPs", d.isRest ? DASH : si(d.flops ?? null, "FLOP")], ["bytes", d.isRest ? DASH : si(d.bytes ?? null, "B")],
      ["parameters", d.parameters ? si(d.parameters) : DASH],
    ], x, y);
  }
  return newWidth => { width = newWidth; paint(); };
}
