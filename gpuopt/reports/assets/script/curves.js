// One candidate at several sizes: samples/s and FLOP/s over the size, with the error of each point, what was lost, and the ceilings.
const LINES = ["#1f77b4", "#e8710a", "#2f9e44", "#ae3ec9", "#d6336c", "#0c8599", "#8a6d3b", "#6c757d"];

function drawCurves(host) {
  const dims = d3.group(scene.curves, c => c.dim);
  return width => {
    host.replaceChildren();
    for (const [dim, curves] of dims) {
      const wide = width >= 820, each = wide ? Math.floor((width - 20) / 2) : width;
      const panels = element("div", {class: "panels"});
      host.append(panels);
      const rate = {title: "samples a second", at: 1, low: 3, high: 4, scale: 1, text: v => short(si(v)), ceilings: []};
      const known = curves.some(c => c.rows.some(r => r[2] !== null));
      const ceilings = [...new Map(curves.flatMap(c => c.ceilings).map(row => [`${row.quantity} ${row.kind}`, row])).values()];
      const speed = {title: "FLOP/s", at: 2, low: 3, high: 4, scale: 1e12, text: v => short(si(v, "FLOP/s")), ceilings};
      for (const measure of known ? [rate, speed] : [rate]) {
        const box = element("div", {});
        box.style.width = `${each}px`;
        panels.append(box);
        drawCurve(box, dim, curves, measure, each);
      }
      const key = element("p", {class: "key"});
      curves.forEach((curve, index) => {
        const dot = element("i", {class: "dot"});
        dot.style.background = LINES[index % LINES.length];
        key.append(element("span", {}, dot, curve.label));
      });
      host.append(key);
    }
  };
}

function drawCurve(box, dim, curves, measure, width) {
  const height = 300, left = 88, right = width - 14, top = 30, bottom = height - 44;
  const value = row => row[measure.at] === null ? null : row[measure.at] * measure.scale;
  const spread = row => row[measure.low] === null || value(row) === null || !row[1] ? null : [row[measure.low], row[measure.high]].map(v => v / row[1] * value(row));
  const sizes = [...new Set(curves.flatMap(c => [...c.rows, ...c.lost].map(r => r[0])))].sort((a, b) => a - b);
  const values = curves.flatMap(c => c.rows.map(value)).filter(v => v !== null && v > 0);
  const most = d3.max([...values, ...measure.ceilings.map(c => c.value)]);
  const far = most / d3.min(values) > 30;
  const x = d3.scaleLog([sizes[0] / 1.25, sizes.at(-1) * 1.25], [left, right]).base(2);
  const y = far ? d3.scaleLog([d3.min(values) / 1.6, most * 1.6], [bottom, top]) : d3.scaleLinear([0, most * 1.1], [bottom, top]);
  const svg = d3.select(box).append("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img")
    .attr("aria-label", `${measure.title} over ${dim}: ${curves.map(c => `${c.label}: ${c.rows.map(r => `${r[0]}: ${value(r) === null ? "unknown" : measure.text(value(r))}`).join(", ")}`).join("; ")}`);
  svg.append("text").attr("class", "heading").attr("x", left).attr("y", 15).text(measure.title + (far ? ", logarithmic" : ""));
  svg.append("text").attr("x", (left + right) / 2).attr("y", height - 6).attr("text-anchor", "middle").text(dim === "N" ? "batch" : dim);
  let last = -Infinity;
  for (const size of sizes) {
    svg.append("line").attr("class", "grid").attr("x1", x(size)).attr("x2", x(size)).attr("y1", top).attr("y2", bottom);
    if (x(size) - last < 26) continue;
    last = x(size);
    svg.append("text").attr("x", x(size)).attr("y", bottom + 17).attr("text-anchor", "middle").text(size);
  }
  for (const tick of far ? ticks(y.domain(), (bottom - top) / 34) : y.ticks(6)) {
    svg.append("line").attr("class", "grid").attr("x1", left).attr("x2", right).attr("y1", y(tick)).attr("y2", y(tick));
    svg.append("text").attr("x", left - 7).attr("y", y(tick) + 4).attr("text-anchor", "end").text(measure.text(tick));
  }
  for (const ceiling of measure.ceilings) {
    const at = y(ceiling.value);
    svg.append("line").attr("class", `roof ${ceiling.kind}`).attr("x1", left).attr("x2", right).attr("y1", at).attr("y2", at)
      .append("title").text(`${ceilingName(ceiling)}: ${ceiling.source}`);
    svg.append("text").attr("class", "name").attr("x", right - 4).attr("y", at + (ceiling.kind === "spec" ? -6 : 14)).attr("text-anchor", "end").text(ceilingName(ceiling));
  }
  curves.forEach((curve, index) => {
    const colour = LINES[index % LINES.length], rows = curve.rows.filter(r => value(r) !== null);
    svg.append("path").attr("class", "curveline").attr("stroke", colour).attr("d", d3.line(r => x(r[0]), r => y(value(r)))(rows));
    for (const row of rows) {
      const range = spread(row);
      if (range) svg.append("line").attr("stroke", colour).attr("stroke-width", 2).attr("x1", x(row[0])).attr("x2", x(row[0])).attr("y1", y(range[0])).attr("y2", y(range[1]));
      svg.append("circle").attr("class", "point").attr("cx", x(row[0])).attr("cy", y(value(row))).attr("r", 4.5).attr("fill", colour)
        .on("pointermove", event => showTip(curve.label, `${dim} = ${row[0]}`, [[measure.title, measure.text(value(row))],
          ["95% interval", range ? `${measure.text(range[0])} to ${measure.text(range[1])}` : DASH]], event.clientX, event.clientY))
        .on("pointerleave", hideTip);
    }
    for (const [size, why] of curve.lost) {
      svg.append("text").attr("x", x(size) + 9 * (index - (curves.length - 1) / 2)).attr("y", bottom - 5).attr("text-anchor", "middle").style("fill", colour).style("font-weight", 700).text("×")
        .append("title").text(`${curve.label}, ${dim} = ${size}: ${why.replaceAll("_", " ")}`);
    }
  });
}
