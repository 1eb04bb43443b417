"""What `gpuopt stream` found -> the answer in a sentence, the frontier, where the device's bytes go, a picture of a forward, rivals and checks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuopt.core.result import Report
from gpuopt.core.streamed import Ratio, StreamArm, StreamReport, StreamRow, StreamSpan
from gpuopt.core.streaming import Plan, Streamed
from gpuopt.reports import figures as f
from gpuopt.reports import frontier
from gpuopt.reports.content.blocks import Bar, Bars, Block, Cell, Column, Facts, Message, Messages, Table
from gpuopt.reports.figures import clean

PICTURE_COLUMNS = 72
CHART_COLUMNS = 48
CLOSE_PCT = 95.0
"""Of the bound: what streaming well reaches."""
TRUE_PCT = 10.0
"""Off the prediction: more is worth saying."""
_PARTS = (
    ("fixed", "always resident", "compute"),
    ("residents", "resident blocks", "good"),
    ("slots", "slots", "copy"),
    ("activations", "activations", "memory"),
    ("cache", "keys and values", "memory"),
    ("context", "context and workspaces", "other"),
    ("reserve", "reserve", "gap"),
)
"""Field of the ledger, in words, tone."""


def headline(report: Report) -> tuple[Message, ...]:
    """The answer of each action."""
    told = report.streamed
    if told is None:
        return ()
    if told.action == "pack":
        return ()
    if told.action == "verify":
        bad = [check for check in told.checks if check.passed is False]
        if bad:
            return (Message("error", f"{clean(told.model, 60)} streamed is not the model: {', '.join(clean(c.name) for c in bad)} differ"),)
        looked = sum(check.passed is True for check in told.checks)
        return (
            Message("good", f"{clean(told.model, 60)} streamed is equal to everything resident, bit for bit: {f.plural(looked, 'check')}"),
        )
    lines = [_answer(told, row) for row in told.rows if row.planned is not None]
    refused = [Message("warning", clean(row.reason, 600), clean(row.fix, 300)) for row in told.rows if row.planned is None]
    return (*lines[:3], *refused)


def _answer(told: StreamReport, row: StreamRow) -> Message:
    plan, seen = row.planned, row.measured
    assert plan is not None
    name, budget = clean(told.model, 60), budget_of(plan)
    limit = "compute" if plan.compute_ms >= plan.link_ms else "the link" if "disk" not in plan.homes.values() else "the link or the disk"
    if plan.streamed_bytes == 0:
        text = f"{name} fits into {budget}: nothing is streamed, a forward takes {f.ms(plan.predicted_ms)}"
    else:
        text = (
            f"{name} within {budget}: {f.memory(plan.streamed_bytes)} of weights are copied a forward, which takes at least {f.ms(plan.bound_ms)} ({limit} is the limit);"
            f" predicted {f.ms(plan.predicted_ms)}"
        )
    if seen is None:
        return Message("info", text)
    if seen.exact is False:
        text = f"{name} within {budget} is not the model: its outputs differ from everything resident, so its time says nothing"
        return Message(
            "error",
            text,
            "gpuopt stream verify with the same options says more: is a block's weight read, or a part of it called, outside the block's forward?",
        )
    off = 100 * (seen.median_ms / plan.predicted_ms - 1) if plan.predicted_ms else 0.0
    text += f", measured {f.ms(seen.median_ms)}: {f.percent(seen.pct_of_bound)} of the bound, {f.change(off / 100)} against the prediction"
    if seen.simulated:
        text += " (simulated)"
    good = seen.pct_of_bound >= CLOSE_PCT and abs(off) <= TRUE_PCT
    return Message("good" if good else "warning", text)


def build(report: Report) -> list[Block]:
    """Everything else, in the order of the questions."""
    told = report.streamed
    if told is None:
        return []
    rows = [row for row in told.rows if row.planned is not None]
    several = len(rows) > 1
    blocks: list[Block] = [_facts(told, rows)]
    if told.checks:
        blocks.append(_checks(told))
    if len(rows) > 1 or any(row.measured for row in rows):
        blocks.append(_frontier(told, rows))
    if told.action == "bench" and (drawn := _chart(report)) is not None:
        blocks.append(drawn)
    if any(row.over_eager is not None for row in rows):
        blocks.append(_eager(rows, several=several))
    if any(arm.rival for arm in told.arms):
        blocks.append(_rivals(told))
    for row in rows:
        plan = row.planned
        if plan is not None and told.action != "verify":
            blocks.append(_ledger(plan, several=several))
            if row.spans:
                blocks.append(picture(plan, row.spans, several=several))
    advice = [
        f"{_short(row.planned)}: {line}" if several else line for row in rows if row.planned is not None for line in row.planned.advice
    ]
    items = [Message("info", clean(line, 600)) for line in dict.fromkeys(advice)]
    items += [Message("info", clean(line, 600)) for row in rows if row.measured for line in row.measured.notes]
    items += [Message("info", clean(line, 600)) for line in told.notes]
    if items:
        blocks.append(Messages(title="Worth knowing", items=tuple(items)))
    return blocks


def budget_of(plan: Plan) -> str:
    """`50% of the weights`, `8.00 GiB of device memory`."""
    if plan.spec.budget_share is not None:
        return f"{100 * plan.spec.budget_share:g}% of the weights on the device"
    return f"{f.memory(plan.spec.budget_bytes)} of device memory"


def _facts(told: StreamReport, rows: Sequence[StreamRow]) -> Facts:
    lines: list[tuple[str, Cell]] = []
    if told.device:
        lines.append(("device", Cell(clean(told.device, 300))))
    if rows and (plan := rows[0].planned) is not None:
        units, known = plan.anatomy.units, plan.calibration
        sizes = sorted({unit.num_bytes for unit in units})
        each = f.memory(sizes[0]) if len(sizes) == 1 else f"{f.memory(sizes[0])} to {f.memory(sizes[-1])}" if sizes else "none"
        lines += [
            ("weights", Cell(f"{f.memory(plan.anatomy.weight_bytes)} in {f.plural(len(units), 'unit')} ({each}), {f.memory(sum(plan.anatomy.fixed.values()))} always resident")),
            ("workload", Cell(clean(known.workload, 120))),
            ("everything resident", Cell(f"{f.ms(plan.compute_ms)} a forward")),
            ("link", Cell(f"{f.digits(known.link_bytes_per_s / 1e9)} GB/s from locked memory, {f.digits(known.pageable_bytes_per_s / 1e9)} GB/s from pageable")),
            ("source", Cell(clean(known.source, 200), "dim")),
        ]  # fmt: skip
    if told.packed is not None:
        lines.append(("packed", Cell(f"{clean(told.packed, 200)}: {f.memory(told.packed_bytes)}")))
    if told.tokens:
        shown = " ".join(str(t) for t in told.tokens[:16])
        lines.append(("tokens", Cell(shown + (" …" if len(told.tokens) > 16 else ""))))
    if told.load_s is not None:
        lines.append(("loading", Cell(f.seconds(told.load_s), "dim")))
    return Facts(title=f"Streaming {clean(told.model, 60)}", rows=tuple(lines))


def _frontier(told: StreamReport, rows: Sequence[StreamRow]) -> Table:
    columns = (
        Column("run"),
        Column("budget"),
        Column("weights there", right=True),
        Column("streamed", right=True),
        Column("bound", right=True),
        Column("predicted", right=True),
        Column("measured", right=True),
        Column("p10..p90", right=True, spare=3),
        Column("of bound", right=True),
        Column("link", right=True, spare=2),
        Column("stalled", right=True, spare=1),
        Column("peak", right=True, spare=4),
        Column("same bits"),
    )
    cells: list[tuple[Cell, ...]] = []
    dash = Cell(f.MISSING, "dim")
    for arm in told.arms:
        if arm.rival is None:
            weights = next((row.planned.anatomy.weight_bytes for row in rows if row.planned is not None), None)
            cells.append(_resident(arm, weights))
    for row in told.rows:
        plan, seen = row.planned, row.measured
        if plan is None:
            continue
        held = plan.ledger.fixed + plan.ledger.residents + plan.ledger.slots
        cells.append(
            (
                Cell("streamed", "strong"),
                Cell(_short(plan)),
                Cell(f.memory(held)),
                Cell(f.memory(plan.streamed_bytes)),
                Cell(f.ms(plan.bound_ms)),
                Cell(f.ms(plan.predicted_ms)),
                Cell(f.ms(seen.median_ms)) if seen else dash,
                Cell(f"{f.ms(seen.p10_ms)}..{f.ms(seen.p90_ms)}") if seen else dash,
                _of_bound(seen) if seen else Cell(f.percent(100 * plan.bound_ms / plan.predicted_ms) if plan.predicted_ms else f.MISSING, "dim"),
                Cell(f"{f.digits(seen.link_bytes_per_s / 1e9)} GB/s") if seen else dash,
                Cell(f.ms(seen.stall_ms if seen else plan.stall_ms)),
                Cell(f.memory(seen.peak_device_bytes)) if seen and seen.peak_device_bytes else dash,
                dash if seen is None or seen.exact is None else Cell("yes", "good") if seen.exact else Cell("no", "bad"),
            )
        )  # fmt: skip
    notes = [
        "bound: max(compute, streamed bytes / link), which nothing beats. weights there: bytes of them on the device at once; streamed: copied there in each forward. "
        "link: streamed bytes over the median. stalled: the device waits for copies. same bits: outputs equal to everything resident"
    ]
    if any(row.measured and row.measured.simulated for row in rows):
        notes.append("simulated: the protocol ran on real bytes, its times are arithmetic on the rates above")
    notes += [
        f"{clean(arm.name)}: {clean(arm.reason, 300)}" for arm in told.arms if arm.rival is None and arm.reason and arm.median_ms is None
    ]
    notes += [
        f"{_short(row.planned)}: {row.measured.demand_fetches} units fetched on demand"
        for row in rows
        if row.planned and row.measured and row.measured.demand_fetches
    ]
    title = "Frontier" if len(rows) > 1 or told.action == "bench" else "A forward"
    return Table(title=title, columns=columns, rows=tuple(cells), notes=tuple(dict.fromkeys(notes)))


def _resident(arm: StreamArm, weight_bytes: int | None) -> tuple[Cell, ...]:
    dash = Cell(f.MISSING, "dim")
    measured = Cell(f.ms(arm.median_ms)) if arm.median_ms is not None else Cell("not run", "dim")
    peak = Cell(f.memory(arm.peak_device_bytes)) if arm.peak_device_bytes else dash
    return (
        Cell(clean(arm.name)), Cell("none"), Cell(f.memory(weight_bytes)), Cell("0 B"), dash, dash, measured, _spread(arm), dash, dash, dash, peak, dash,
    )  # fmt: skip


def _spread(arm: StreamArm) -> Cell:
    if arm.p10_ms is None or arm.p90_ms is None:
        return Cell(f.MISSING, "dim")
    return Cell(f"{f.ms(arm.p10_ms)}..{f.ms(arm.p90_ms)}")


def _eager(rows: Sequence[StreamRow], *, several: bool) -> Table:
    """Where nothing is streamed: what streaming adds to plain eager, and how far processes differ that run the same."""
    columns = (
        Column("run"),
        Column("process"),
        Column("median", right=True),
        Column("over plain eager here", right=True),
        Column("95% interval", right=True),
        Column("pairs", right=True, spare=1),
    )
    dash = Cell(f.MISSING, "dim")
    cells: list[tuple[Cell, ...]] = []
    notes = [
        "here: one process and one module object, bound and not bound by turns. Elsewhere plain eager runs in a process of its own: what differs there is the process"
    ]
    for row in rows:
        told, plan = row.over_eager, row.planned
        if told is None or plan is None:
            continue
        if told.over is None:
            notes.append(f"{_short(plan)}: not timed beside plain eager: {clean(told.reason, 300)}")
            continue
        name = f"streamed, {_short(plan)}" if several else "streamed"
        cells.append((Cell("plain eager"), Cell("here"), Cell(f.ms(told.eager_ms)), dash, dash, dash))
        cells.append((Cell(name, "strong"), Cell("here"), Cell(f.ms(told.streamed_ms)), *_over(told.over)))
        cells += [(Cell("plain eager"), Cell(clean(one.name, 60)), Cell(f.ms(one.median_ms)), *_over(one.over)) for one in told.others]
        if not told.apart:
            notes.append("plain eager reads the weights where the plan laid them: there was no room for its own")
    return Table(title="Beside plain eager", columns=columns, rows=tuple(cells), notes=tuple(dict.fromkeys(notes)))  # fmt: skip


def _over(over: Ratio) -> tuple[Cell, Cell, Cell]:
    known = over.percents
    interval = f"{known[0]:+.2f}..{known[1]:+.2f}%" if known is not None else "too few pairs"
    return Cell(f"{over.percent:+.2f}%"), Cell(interval), Cell(str(over.num_pairs))


def _rivals(told: StreamReport) -> Table:
    """Other libraries, each beside the budget it was given."""
    columns = (
        Column("library"),
        Column("budget"),
        Column("measured", right=True),
        Column("p10..p90", right=True, spare=3),
        Column("forwards", right=True, spare=2),
        Column("streamed, same turns", right=True),
        Column("streamed is", right=True),
        Column("peak", right=True, spare=1),
        Column("setting up", right=True, spare=4),
        Column("same bits"),
    )
    dash = Cell(f.MISSING, "dim")
    cells = []
    for arm in (arm for arm in told.arms if arm.rival is not None):
        plan = told.rows[arm.row].planned if arm.row is not None else None
        speedup = arm.speedup
        cells.append(
            (
                Cell(clean(arm.name)),
                Cell(_short(plan) if plan is not None and arm.budgeted else "takes none"),
                Cell(f.ms(arm.median_ms)) if arm.median_ms is not None else Cell("not run", "dim"),
                _spread(arm),
                Cell(str(arm.num_calls)) if arm.num_calls else dash,
                Cell(f.ms(arm.streamed_ms)) if arm.streamed_ms is not None else dash,
                _faster(speedup) if speedup is not None else dash,
                Cell(f.memory(arm.peak_device_bytes)) if arm.peak_device_bytes else dash,
                Cell(f.seconds(arm.setup_s)) if arm.setup_s is not None else dash,
                dash if arm.exact is None else Cell("yes", "good") if arm.exact else Cell("no", "bad"),
            )
        )
    notes = [
        "each has as many bytes of weights on the device as the plan of that budget; its blocks of calls are timed in turns with the streamed model's"
    ]
    notes += [f"{clean(arm.name)}: {clean(arm.setting, 200)}" for arm in told.arms if arm.rival and arm.setting]
    notes += [f"{clean(arm.name)}: {clean(arm.reason, 300)}" for arm in told.arms if arm.rival and arm.reason and arm.median_ms is None]
    return Table(title="Beside other libraries", columns=columns, rows=tuple(cells), notes=tuple(dict.fromkeys(notes)))


def _faster(speedup: float) -> Cell:
    return Cell(f"{f.digits(speedup)}× faster", "good") if speedup >= 1 else Cell(f"{f.digits(1 / speedup)}× slower", "bad")


def _chart(report: Report) -> Table | None:
    """The frontier as bars, for where nothing can be drawn; None where there is nothing to compare."""
    found = frontier.picture([report])
    if found is None:
        return None
    marks = sorted((mark for mark in found.marks if mark.series != frontier.BOUND), key=lambda mark: (mark.num_bytes, -mark.ms))
    bounds = {mark.num_bytes: mark.ms for mark in found.marks if mark.series == frontier.BOUND}
    longest = max(mark.ms for mark in marks)
    rows = []
    for mark in marks:
        width = max(1, round(CHART_COLUMNS * mark.ms / longest))
        ours = mark.series == frontier.STREAMED
        least = min(width, round(CHART_COLUMNS * bounds[mark.num_bytes] / longest)) if ours and mark.num_bytes in bounds else 0
        name = f"{mark.series} {mark.label}" if mark.label != "all" else mark.series
        rows.append(
            (
                Cell(f.memory(mark.num_bytes)),
                Cell(name, "strong" if ours else ""),
                Cell("█" * least + "▒" * (width - least)),
                Cell(f.ms(mark.ms)),
            )
        )
    axis = "device, at its peak" if found.of_peaks else "weights there"
    return Table(
        title=f"Frontier, drawn: {found.per}",
        columns=(Column(axis, right=True), Column("run"), Column("time"), Column("", right=True)),
        rows=tuple(rows),
        notes=("█ the bound, ▒ what is above it, or of a run that has none",),
    )


def _of_bound(seen: Streamed) -> Cell:
    return Cell(f.percent(seen.pct_of_bound), "good" if seen.pct_of_bound >= CLOSE_PCT else "warn")


def _short(plan: Plan) -> str:
    if plan.spec.budget_share is not None:
        return f"{100 * plan.spec.budget_share:g}%"
    return f.memory(plan.spec.budget_bytes)


def _ledger(plan: Plan, *, several: bool) -> Bars:
    whole = max(plan.budget_bytes, plan.ledger.total, 1)
    bars = [Bar(label, f.memory(size), size / whole, tone) for field, label, tone in _PARTS if (size := getattr(plan.ledger, field)) > 0]
    if plan.budget_bytes > plan.ledger.total:
        left = plan.budget_bytes - plan.ledger.total
        bars.append(Bar("left over", f.memory(left), left / whole, "other"))
    homes = sorted({home for home in plan.homes.values()})
    where = ", ".join(f"{sum(h == home for h in plan.homes.values())} {home}" for home in homes)
    slots = ", ".join(
        f"{len(sizes)} of {f.memory(max(sizes))}" + (f" for {clean(ring, 60)}" if len(plan.slots) > 1 else "")
        for ring, sizes in plan.slots.items()
    )
    notes = [
        f"{len(plan.resident)} of {f.plural(len(plan.anatomy.units), 'unit')} stay"
        + (f"; slots: {slots}" if slots else "")
        + (f"; streamed from: {where}" if where else "")
    ]
    largest = sorted(plan.anatomy.fixed.items(), key=lambda item: -item[1])[:3]
    told = [
        f"{clean(name, 80)} {f.memory(size)} ({clean(plan.anatomy.reasons[name], 80)})"
        for name, size in largest
        if name in plan.anatomy.reasons
    ]
    if told:
        notes.append("always resident: " + "; ".join(told))
    title = f"The device's bytes: budget {f.memory(plan.budget_bytes)}" + (f" ({_short(plan)})" if several else "")
    return Bars(title=title, bars=tuple(bars), notes=tuple(notes))


def picture(plan: Plan, spans: Sequence[StreamSpan], *, several: bool = False) -> Table:
    """A forward of the steady state: what each queue does, left to right."""
    total = max(plan.predicted_ms, 1e-9)
    moved = [unit.name for unit in plan.anatomy.units if unit.name in plan.binding]
    glyphs = {"": "░", **dict.fromkeys(plan.resident, "█"), **{name: "▓▒"[number % 2] for number, name in enumerate(moved)}}
    rows = []
    for queue in ("compute", "copy", "disk"):
        mine = [span for span in spans if span.queue == queue]
        if mine:
            busy = 100 * min(1.0, sum(s.end_ms - s.start_ms for s in mine) / total)
            rows.append((Cell(queue), Cell(drawn(mine, total, glyphs)), Cell(f.percent(busy))))
    title = "A forward, left to right" + (f" ({_short(plan)})" if several else "")
    notes = (
        f"{f.ms(total)} across. █ a block that stays, ▓▒ one that is streamed (in turns), ░ outside blocks, · nothing: computing waits for a copy, or the link for a slot",
    )
    return Table(title=title, columns=(Column("queue"), Column("time"), Column("busy", right=True)), rows=tuple(rows), notes=notes)


def drawn(spans: Sequence[StreamSpan], total_ms: float, glyphs: Mapping[str, str], columns: int = PICTURE_COLUMNS) -> str:
    """One queue as `columns` characters. What runs past the end of a forward runs at the start of the next one, which looks the same."""
    weight: list[dict[str, float]] = [{} for _ in range(columns)]
    step = total_ms / columns
    for span in spans:
        glyph = glyphs.get(span.unit, "?")
        start, stop = span.start_ms, min(span.end_ms, span.start_ms + total_ms)
        for begin, end in _folded(start, stop, total_ms):
            first, last = int(begin / step), min(columns - 1, int(end / step))
            for at in range(first, last + 1):
                covered = min(end, (at + 1) * step) - max(begin, at * step)
                if covered > 0:
                    weight[at][glyph] = weight[at].get(glyph, 0.0) + covered
    # What fills less than half of a column is not drawn, unless there is nothing else to show of it.
    return "".join(max(w, key=lambda g: w[g]) if w and sum(w.values()) >= step / 2 else "·" for w in weight)


def _folded(start: float, stop: float, total: float) -> list[tuple[float, float]]:
    """[start, stop) modulo a forward."""
    start, stop = start % total, start % total + (stop - start)
    return [(start, stop)] if stop <= total else [(start, total), (0.0, stop - total)]


def _checks(told: StreamReport) -> Table:
    marks = {True: Cell("equal", "good"), False: Cell("differs", "bad"), None: Cell("not looked at", "dim")}
    rows = tuple((Cell(clean(check.name)), marks[check.passed], Cell(clean(check.detail, 400))) for check in told.checks)
    return Table(title="Checks", columns=(Column("check"), Column(""), Column("what")), rows=rows)
