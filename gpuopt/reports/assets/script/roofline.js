// Points on logarithmic axes under the ceilings; a panel of its own for ops without FLOPs, which have no intensity.
const RADIUS = 18;
const listeners = {filter: [], pick: []};
const shown = {picture: 0, by: "op", query: "", bounds: new Set(BOUNDS), points: [], total: 0, pinned: null};
const tell = (what, value) => listeners[what].forEach(listener => listener(value));

function aggregated(points, key, name) {
  const groups = d3.group(points, key);
  return [...groups].map(([, members]) => {
    if (members.length === 1 && name === "op") return members[0];
    const sum = field => members.some(m => m[field] !== null) ? d3.sum(members, m => m[field] ?? 0) : null;
    const longest = d3.greatest(members, m => m.time ?? 0);
    const time = sum("time"), priced = members.filter(m => m.floor !== null && m.time);
    const floor = priced.length ? d3.sum(priced, m => m.floor) : null, covered = d3.sum(priced, m => m.time);
    const modules = new Set(members.map(m => m.module));
    return {...longest, count: d3.sum(members, m => m.count), time, flops: sum("flops"), bytes: sum("bytes"), floor,
      name: name === "module" ? longest.module || "(root)" : longest.name,
      module: name === "module" ? plural(members.length, "op") : modules.size === 1 ? longest.module : plural(modules.size, "module"),
      pct: floor !== null && covered ? 100 * floor / covered : null, note: ""};
  });
}

function chosen() {
  const {points, isRuns} = scene.rooflines[shown.picture];
  const all = points.map(pointOf).filter(p => p.time > 0).map(p => ({...p, isRun: isRuns}));
  const words = shown.query.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = p => shown.bounds.has(p.bound) && words.every(w => p.module.toLowerCase().includes(w) || p.name.toLowerCase().includes(w) || p.dtype.includes(w));
  const kept = all.filter(fits);
  const merged = isRuns ? kept
    : shown.by === "name" ? aggregated(kept, p => `${p.name}\n${p.bound}\n${p.dtype}\n${p.flops === 0}`, "name")
    : shown.by === "module" ? aggregated(kept, p => p.module, "module") : kept;
  shown.total = d3.sum(all, p => p.time);
  shown.points = merged.sort((a, b) => b.time - a.time);
  shown.kept = kept.length;
  shown.all = all.length;
  shown.keptTime = d3.sum(kept, p => p.time);
}

function drawRoofline(host) {
  const tools = element("div", {class: "tools"});
  const status = element("span", {class: "status", role: "status"});
  const panels = element("div", {class: "panels"});
  let width = 0, zooms = [];
  const change = () => { shown.pinned = null; chosen(); paint(); tell("filter"); };
  if (scene.rooflines.length > 1) {
    const select = element("select", {onchange: event => { shown.picture = Number(event.target.value); change(); }});
    scene.rooflines.forEach((r, index) => select.append(element("option", {value: index}, r.title)));
    tools.append(element("label", {}, "run", select));
  }
  if (!scene.rooflines[0].isRuns) {
    const select = element("select", {onchange: event => { shown.by = event.target.value; change(); }},
      element("option", {value: "op"}, "each op of each module"), element("option", {value: "name"}, "each op name"), element("option", {value: "module"}, "each module"));
    tools.append(element("label", {}, "points", select));
  }
  const search = element("input", {type: "search", placeholder: "module, op or dtype", "aria-label": "Filter by module, op or dtype", spellcheck: "false",
    oninput: () => { shown.query = search.value; change(); }});
  tools.append(element("label", {class: "wide"}, "filter", search));
  listeners.query = text => { search.value = text; shown.query = text; change(); };
  for (const bound of BOUNDS) {
    if (!scene.rooflines.some(r => r.points.some(p => pointOf(p).bound === bound))) continue;
    const chip = element("button", {type: "button", class: "chip", "aria-pressed": "true", onclick: () => {
      shown.bounds.has(bound) ? shown.bounds.delete(bound) : shown.bounds.add(bound);
      chip.setAttribute("aria-pressed", shown.bounds.has(bound));
      change();
    }}, element("i", {class: `dot t-${bound}`}), bound === "unknown" ? "unknown" : `${bound}-bound`);
    tools.append(chip);
  }
  const zoomBy = factor => zooms.forEach(({svg, zoom}) => svg.call(zoom.scaleBy, factor));
  tools.append(element("span", {class: "push"},
    element("button", {type: "button", "aria-label": "Zoom in", onclick: () => zoomBy(1.5)}, "+"), " ",
    element("button", {type: "button", "aria-label": "Zoom out", onclick: () => zoomBy(1 / 1.5)}, "−"), " ",
    element("button", {type: "button", onclick: () => zooms.forEach(({svg, zoom}) => svg.call(zoom.transform, d3.zoomIdentity))}, "Reset view")));
  const key = element("p", {class: "key"},
    ...(scene.rooflines[0].isRuns ? [] : [element("span", {}, "area: share of time")]),
    element("span", {class: "hint"}, "drag to move, Ctrl and wheel or pinch to zoom, arrow keys to walk, click to hold"));
  host.replaceChildren(tools, status, panels, key);
  const plain = host.parentNode.querySelector(".plain");
  chosen();

  function paint() {
    const {compute, bandwidth, isRuns} = scene.rooflines[shown.picture];
    const computing = shown.points.filter(p => p.flops > 0 && p.bytes > 0), moving = shown.points.filter(p => p.flops === 0 && p.bytes > 0);
    const placed = d3.sum(computing, p => p.time) + d3.sum(moving, p => p.time);
    status.textContent = isRuns ? plural(shown.points.length, "run")
      : (shown.kept === shown.all ? plural(shown.all, "op") : `${shown.kept.toLocaleString("en")} of ${plural(shown.all, "op")}, ${pct(100 * shown.keptTime / (shown.total || 1))} of the time`)
        + (shown.keptTime > placed * 1.0005 ? `; ${pct(100 * (1 - placed / shown.keptTime))} of that has no known FLOPs or bytes and no place here` : "");
    const everything = scene.rooflines[shown.picture].points.map(pointOf).filter(p => p.time > 0);
    const longest = d3.max(shown.points, p => p.time) || 1;
    const radius = p => isRuns ? 7 : Math.max(2.5, RADIUS * Math.sqrt(p.time / longest) * (width < 560 ? 0.7 : 1));
    const hasMoving = everything.some(p => p.flops === 0 && p.bytes > 0), hasComputing = compute.length > 0 || everything.some(p => p.flops > 0);
    const wide = width >= 860 && hasMoving && hasComputing;
    zooms = [];
    panels.replaceChildren();
    const common = {radius, longest, compute, bandwidth, names: isRuns ? 40 : 8};
    if (hasMoving) addPanel({...common, points: moving, width: wide ? Math.round(width * 0.32) : width, height: wide ? 460 : 300,
      x: p => p.bytes, y: p => p.bytes / p.time * 1e9, heading: "ops without FLOPs: bytes a second", foot: "bytes moved",
      xText: v => short(si(v, "B")), yText: v => short(si(v, "B/s")), flat: bandwidth, slopes: [], roofs: [], margin: 12});
    if (hasComputing) addPanel({...common, points: computing, width: wide ? width - Math.round(width * 0.32) - 8 : width, height: wide || width > 560 ? 460 : 360,
      x: p => p.flops / p.bytes, y: p => p.flops / p.time * 1e9, heading: isRuns ? "each run: FLOP/s" : "ops with FLOPs: FLOP/s", foot: "FLOPs a byte",
      xText: v => v >= 1e-3 && v < 1e5 ? `${+v.toPrecision(3)}` : v.toExponential(0), yText: v => short(si(v, "FLOP/s")),
      flat: [], slopes: bandwidth, roofs: compute, margin: width > 720 ? 196 : 12});
    plain.hidden = true;
  }

  function addPanel(panel) {
    const box = element("div", {});
    panels.append(box);
    zooms.push(drawPanel(box, panel));
  }

  return newWidth => { width = newWidth; paint(); };
}

function drawPanel(box, panel) {
  const {width, height} = panel, left = 88, right = width - panel.margin, top = 30, bottom = height - 44;
  const span = (values, margin) => {
    const logs = values.filter(v => v > 0).map(Math.log10);
    const [low, high] = logs.length ? d3.extent(logs) : [0, 3];
    return [10 ** (low - margin), 10 ** (high + margin)];
  };
  const ridges = panel.roofs.flatMap(roof => panel.slopes.map(slope => roof.value / slope.value));
  const x0 = d3.scaleLog(span([...panel.points.map(panel.x), ...ridges], 0.35), [left, right]);
  const y0 = d3.scaleLog(span([...panel.points.map(panel.y), ...panel.roofs.map(r => r.value), ...panel.flat.map(r => r.value)], 0.25), [bottom, top]);
  box.style.width = `${width}px`;
  const svg = d3.select(box).append("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("tabindex", 0).attr("role", "group")
    .attr("aria-label", `${panel.heading}, over ${panel.foot}, logarithmic; ${plural(panel.points.length, "point")}. Arrow keys walk through them by time.`);
  svg.append("text").attr("class", "heading").attr("x", left).attr("y", 15).text(panel.heading);
  svg.append("text").attr("x", (left + right) / 2).attr("y", height - 6).attr("text-anchor", "middle").text(panel.foot);
  const clip = `clip-${drawPanel.count = (drawPanel.count || 0) + 1}`;
  svg.append("clipPath").attr("id", clip).append("rect").attr("x", left).attr("y", top).attr("width", right - left).attr("height", bottom - top);
  panel.beside = svg.append("g");
  const grid = svg.append("g"), inside = svg.append("g").attr("clip-path", `url(#${clip})`);
  const lines = inside.append("g"), dots = inside.append("g"), texts = inside.append("g");
  let x = x0, y = y0, current = null;
  const circles = dots.selectAll("circle").data(panel.points).join("circle").attr("class", p => `point t-${p.bound}`).attr("r", panel.radius);

  function frame() {
    circles.attr("cx", p => x(panel.x(p))).attr("cy", p => y(panel.y(p)));
    grid.selectAll("*").remove();
    for (const value of ticks(x.domain(), (right - left) / 66)) {
      grid.append("line").attr("class", "grid").attr("x1", x(value)).attr("x2", x(value)).attr("y1", top).attr("y2", bottom);
      grid.append("text").attr("x", x(value)).attr("y", bottom + 17).attr("text-anchor", "middle").text(panel.xText(value));
    }
    for (const value of ticks(y.domain(), (bottom - top) / 34)) {
      grid.append("line").attr("class", "grid").attr("x1", left).attr("x2", right).attr("y1", y(value)).attr("y2", y(value));
      grid.append("text").attr("x", left - 7).attr("y", y(value) + 4).attr("text-anchor", "end").text(panel.yText(value));
    }
    drawCeilings(lines, texts, panel, x, y, {left, right, top, bottom});
    label(texts, panel, x, y, {left, right, top, bottom});
  }

  const zoom = d3.zoom().scaleExtent([0.7, 60]).extent([[left, top], [right, bottom]])
    .filter(event => event.type === "wheel" ? event.ctrlKey || event.metaKey : event.touches ? event.touches.length > 1 : !event.button)
    .on("zoom", event => { x = event.transform.rescaleX(x0); y = event.transform.rescaleY(y0); frame(); });
  svg.call(zoom);

  function nearest(event) {
    const [px, py] = d3.pointer(event);
    let found = null, best = 26;
    for (const p of panel.points) {
      const cx = x(panel.x(p)), cy = y(panel.y(p));
      const away = Math.max(0, Math.hypot(cx - px, cy - py) - panel.radius(p) * 0.5);
      if (away < best && cx >= left - 4 && cx <= right + 4) { best = away; found = p; }
    }
    return found;
  }
  const mark = p => { circles.classed("here", q => q === p || q === shown.pinned); if (p) circles.filter(q => q === p).raise(); };
  const place = p => { const at = svg.node().getBoundingClientRect(), k = at.width / width; return [at.left + x(panel.x(p)) * k, at.top + y(panel.y(p)) * k]; };
  svg.on("pointermove", event => {
    if (event.buttons || (shown.pinned && !tip.hidden)) return;
    const p = nearest(event);
    svg.style("cursor", p ? "pointer" : "grab");
    mark(p);
    p ? pointTip(p, shown.total, event.clientX, event.clientY) : hideTip();
  }).on("pointerleave", () => { if (!shown.pinned) { mark(null); hideTip(); } })
    .on("click", event => {
      const p = nearest(event);
      shown.pinned = p === shown.pinned ? null : p;
      mark(p);
      p && shown.pinned ? pointTip(p, shown.total, event.clientX, event.clientY) : hideTip();
      tell("pick", shown.pinned);
    })
    .on("keydown", event => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (!step || !panel.points.length) return;
      event.preventDefault();
      const index = current === null ? 0 : (panel.points.indexOf(current) + step + panel.points.length) % panel.points.length;
      current = panel.points[index];
      mark(current);
      pointTip(current, shown.total, ...place(current));
      say(pointWords(current));
    })
    .on("blur", () => { current = null; mark(null); hideTip(); });
  listeners.pick.push(p => { if (svg.node().isConnected) mark(p); });
  frame();
  return {svg, zoom};
}

// Powers of ten; with 2 and 5 where they are few, every second or third where they are many.
function ticks([low, high], room) {
  const from = Math.ceil(Math.log10(low) - 1e-9), to = Math.floor(Math.log10(high) + 1e-9), count = to - from + 1;
  const step = Math.max(1, Math.ceil(count / Math.max(2, room)));
  const whole = d3.range(from, to + 1).filter(power => power % step === 0).map(power => Number(`1e${power}`));
  const finer = d3.range(from - 1, to + 1).flatMap(power => [2, 5].map(factor => Number(`${factor}e${power}`))).filter(v => v >= low && v <= high);
  return count < 4 && whole.length + finer.length <= room ? [...whole, ...finer] : whole.length ? whole : finer.slice(0, 2);
}

function drawCeilings(lines, texts, panel, x, y, frame) {
  const segments = [], [lowX, highX] = x.domain(), [lowY] = y.domain();
  for (const slope of panel.slopes) {
    const kind = panel.roofs.filter(r => r.kind === slope.kind), tops = (kind.length ? kind : panel.roofs).map(r => r.value);
    const knee = tops.length ? Math.min(highX, d3.max(tops) / slope.value) : highX, start = Math.min(lowX, lowY / slope.value);
    segments.push({row: slope, x1: x(start), y1: y(start * slope.value), x2: x(knee), y2: y(knee * slope.value), slope: true});
  }
  for (const roof of panel.roofs) {
    const slope = panel.slopes.find(s => s.kind === roof.kind) ?? panel.slopes[0];
    const start = slope ? Math.max(lowX, roof.value / slope.value) : lowX;
    segments.push({row: roof, x1: x(start), y1: y(roof.value), x2: frame.right, y2: y(roof.value)});
  }
  for (const row of panel.flat) segments.push({row, x1: frame.left, y1: y(row.value), x2: frame.right, y2: y(row.value)});
  lines.selectAll("line").data(segments).join("line").attr("class", s => `roof ${s.row.kind}`)
    .attr("x1", s => s.x1).attr("x2", s => s.x2).attr("y1", s => s.y1).attr("y2", s => s.y2)
    .selectAll("title").data(s => [s.row]).join("title").text(row => `${ceilingName(row)}: ${row.source}`);
  // Where the lines run, as small boxes: names of points keep off them where they can.
  panel.strokes = segments.flatMap(s => s.slope ? d3.range(0, 1.001, 1 / 50).map(k => [s.x1 + (s.x2 - s.x1) * k, s.y1 + (s.y2 - s.y1) * k]).map(([cx, cy]) => [cx - 9, cy - 9, cx + 9, cy + 9])
    : [[s.x1, s.y1 - 3, s.x2, s.y1 + 3]]);
  const names = [];
  const level = segments.filter(s => !s.slope && s.y1 > frame.top && s.y1 < frame.bottom && s.x1 < frame.right).sort((a, b) => a.y1 - b.y1);
  let last = -Infinity;
  level.forEach((s, index) => {
    const below = index > 0 && s.y1 - level[index - 1].y1 < 26;
    // Beside the frame where there is room; else within it, where points are fewest: left of bandwidths, right of peaks.
    if (panel.margin > 100) names.push({text: ceilingName(s.row), x: frame.right + 7, y: last = Math.max(last + 15, s.y1 + 4), anchor: "start", outside: true});
    else if (panel.flat.length) names.push({text: ceilingName(s.row), x: frame.left + 4, y: s.y1 + (below ? 14 : -6), anchor: "start"});
    else names.push({text: ceilingName(s.row), x: frame.right - 4, y: s.y1 + (below ? 14 : -6), anchor: "end"});
  });
  const first = segments.find(s => s.slope);
  if (first) {
    const angle = Math.atan2(first.y2 - first.y1, first.x2 - first.x1), visible = [Math.max(first.x1, frame.left), Math.min(first.x2, frame.right)];
    if (visible[1] - visible[0] > 120) {
      const at = visible[0] + (visible[1] - visible[0]) * 0.42, up = first.y1 + (at - first.x1) * Math.tan(angle);
      names.push({text: ceilingName(first.row), x: at, y: up - 9, anchor: "middle", turn: angle * 180 / Math.PI});
    }
  }
  panel.beside.selectAll("text").data(names.filter(n => n.outside)).join("text").attr("class", "name").attr("x", n => n.x).attr("y", n => n.y).text(n => n.text);
  texts.selectAll("text.ceiling").data(names.filter(n => !n.outside)).join("text").attr("class", "name ceiling").attr("text-anchor", n => n.anchor)
    .attr("x", n => n.x).attr("y", n => n.y).attr("transform", n => n.turn ? `rotate(${n.turn} ${n.x} ${n.y + 9})` : null).text(n => n.text);
  panel.taken = names.filter(n => !n.turn && !n.outside).map(n => {
    const wide = n.text.length * 6.8, from = n.anchor === "end" ? n.x - wide : n.x;
    return [from, n.y - 11, from + wide, n.y + 4];
  });
}

// The largest point of each name carries it, where that hides no other text.
function label(texts, panel, x, y, frame) {
  const taken = [...panel.taken], seen = new Set(), placed = [];
  const crowd = panel.points.slice(0, 40).map(p => [p, x(panel.x(p)), y(panel.y(p)), panel.radius(p)]);
  const free = box => box[0] >= frame.left && box[2] <= frame.right && box[1] >= frame.top && box[3] <= frame.bottom
    && !taken.some(b => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3]);
  for (const p of panel.points.slice(0, 400)) {
    if (placed.length >= panel.names) break;
    const text = clip(p.name, 30);
    if (seen.has(text)) continue;
    const cx = x(panel.x(p)), cy = y(panel.y(p)), away = panel.radius(p) + 5, w = text.length * 6.7;
    const at = [[cx + away, cy], [cx - away - w, cy], [cx - w / 2, cy - away - 6], [cx - w / 2, cy + away + 6]];
    const boxes = at.map(([l, m]) => [l, m - 8, l + w, m + 8]);
    const clear = box => !panel.strokes.some(b => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3]) && !crowd.some(([q, qx, qy, r]) => q !== p && box[0] < qx + r && qx - r < box[2] && box[1] < qy + r && qy - r < box[3]);
    const box = boxes.find(b => free(b) && clear(b)) ?? boxes.find(free);
    if (!box) continue;
    seen.add(text);
    taken.push(box);
    placed.push({text, x: box[0], y: box[3] - 4});
  }
  texts.selectAll("text.label").data(placed).join("text").attr("class", "name label").attr("x", l => l.x).attr("y", l => l.y).text(l => l.text);
}
