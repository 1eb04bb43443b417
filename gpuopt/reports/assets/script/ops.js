// The roofline's points as a table: the same filter, any order; a row and its point point at each other.
const PAGE = 15;
const ALL = [
  ["op", p => p.name, p => p.name + (p.count > 1 && !p.isRun ? ` ×${p.count}` : "")],
  ["module", p => p.module, p => p.module || "(root)", "module"],
  ["dtype", p => p.dtype, p => p.dtype || DASH],
  ["time", p => p.time, p => ns(p.time), "r"],
  ["of time", p => p.time, p => pct(100 * p.time / (shown.total || 1)), "r"],
  ["FLOPs", p => p.flops, p => si(p.flops, "FLOP"), "r"],
  ["bytes", p => p.bytes, p => si(p.bytes, "B"), "r"],
  ["FLOP/B", p => p.flops !== null && p.bytes ? p.flops / p.bytes : null, p => p.flops !== null && p.bytes ? digits(p.flops / p.bytes) : DASH, "r"],
  ["bound", p => p.bound, p => p.bound],
  ["reaches", p => p.pct, p => pct(p.pct), "r"],
  ["of ceiling", p => p.ceiling, p => p.ceiling || DASH],
  ["to win", p => p.floor === null ? null : Math.max(0, p.time - p.floor), p => p.floor === null ? DASH : ns(Math.max(0, p.time - p.floor)), "r"],
];

const isRuns = Boolean(scene.rooflines[0]?.isRuns);
const NOT_OF_RUNS = new Set(["module", "of time", "to win"]);
const COLUMNS = isRuns ? ALL.filter(([title]) => !NOT_OF_RUNS.has(title)).map(([title, ...rest]) => [title === "op" ? "run" : title, ...rest]) : ALL;

// A long name breaks after its dots.
const breakable = text => text.split(/(?<=\.)/).flatMap((part, index) => index ? [element("wbr"), part] : [part]);

function opsTable(after) {
  let order = COLUMNS.findIndex(([title]) => title === "time"), falling = true, limit = PAGE;
  const body = element("tbody"), more = element("button", {type: "button", onclick: () => { limit += 100; fill(); }});
  const heads = COLUMNS.map(([title, , , kind], index) => {
    const button = element("button", {type: "button", class: "plainly", onclick: () => {
      falling = order === index ? !falling : kind === "r";
      order = index;
      fill();
    }}, title);
    return element("th", {scope: "col", class: kind === "r" ? "r" : null}, button);
  });
  const box = element("div", {class: "scroll", role: "region", "aria-label": "Points of the roofline", tabindex: "0"},
    element("table", {class: "ops"}, element("thead", {}, element("tr", {}, ...heads)), body));
  const rows = new Map();
  function fill() {
    const value = COLUMNS[order][1];
    const compare = (a, b) => {
      const u = value(a), v = value(b);
      if (u === null || v === null) return (u === null) - (v === null);
      return (falling ? -1 : 1) * d3.ascending(u, v);
    };
    const sorted = [...shown.points].sort(compare);
    rows.clear();
    body.replaceChildren(...sorted.slice(0, limit).map(p => {
      const row = element("tr", {onmouseenter: () => tell("pick", p), onmouseleave: () => tell("pick", shown.pinned)},
        ...COLUMNS.map(([title, , text, kind]) => {
          const cell = element("td", {class: kind}, ...(kind === "module" ? breakable(text(p)) : [text(p)]));
          if (title === "bound" && p.bound !== "unknown") cell.prepend(element("i", {class: `dot t-${p.bound}`}));
          return cell;
        }));
      rows.set(p, row);
      return row;
    }));
    heads.forEach((head, index) => {
      head.firstChild.className = "plainly" + (index === order ? ` sorted${falling ? "" : " up"}` : "");
      index === order ? head.setAttribute("aria-sort", falling ? "descending" : "ascending") : head.removeAttribute("aria-sort");
    });
    const left = sorted.length - limit;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(100, left)} of ${left.toLocaleString("en")} more`;
  }
  listeners.filter.push(() => { limit = PAGE; fill(); });
  listeners.pick.push(p => rows.forEach((row, q) => row.classList.toggle("here", q === p)));
  after.append(element("h3", {}, isRuns ? "Runs" : "Ops"), box, more);
  fill();
}
