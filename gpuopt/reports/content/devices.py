"""Sweep -> who wins from which batch on and why, in a sentence each; a table a comparison; and how far each device can go."""

from __future__ import annotations

from collections.abc import Sequence

from gpuopt.core.result import Report
from gpuopt.core.sweep import Cause, Crossover, Curve, Memory, Sweep, Versus
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Facts, Message, Table
from gpuopt.reports.figures import clean

TITLE = "Over batch"


def headline(report: Report) -> list[Message]:
    """The answer of a comparison of devices, before anything else."""
    sweep = report.sweep
    if sweep is None:
        return []
    lines = []
    for row in sweep.crossovers:
        told = f"{clean(row.what, 120)}: " if len(sweep.crossovers) > 1 else ""
        lines.append(Message("good" if row.winner else "info", told + sentence(row, report)))
    for curve in sweep.curves:
        memory = curve.memory
        if memory is not None and memory.largest_batch is not None and _kind(report, curve.device) == "cuda":
            which = f" as {clean(curve.what, 80)}" if _several(sweep, curve.device) else ""
            lines.append(
                Message(
                    "info",
                    f"{name(report, curve.device)} is full at about batch {memory.largest_batch}{which} ({clean(memory.note) or 'not checked'})",
                )
            )
    return lines


def sentence(row: Crossover, report: Report) -> str:
    """`the GPU wins from batch 4 on (…); at batch 1 the CPU is 1.8× faster because 91% of the GPU's time lies between launches`."""
    first, second = name(report, row.first), name(report, row.second)
    decided = [point for point in row.points if point.verdict in ("faster", "slower")]
    span = _span([point.batch for point in row.points])
    if row.verdict == "same":
        return f"{first} and {second} are equally fast at {span}"
    if not decided:
        return f"the pairs did not decide between {first} and {second} at {span}: measure longer (--max-time)"
    if row.verdict == "several":
        wins = [(device, [p.batch for p in decided if p.verdict == verdict]) for device, verdict in ((first, "slower"), (second, "faster"))]
        told = ", ".join(f"{device} wins at {', '.join(map(str, batches))}" for device, batches in wins)
        return f"no single batch divides them: {told}"
    winner = name(report, row.winner or "")
    smallest, largest = decided[0], decided[-1]
    if row.verdict == "crosses":
        assert row.between is not None
        how = (
            f"interpolated between {row.between[0]} and {row.between[1]}" if row.interpolated else f"measured; at {row.between[0]} it loses"
        )
        return f"{winner} wins from batch {row.from_batch} on ({how}); {_beaten(smallest, row, report)}"
    loser = second if row.winner == row.first else first
    if len(row.points) == 1:
        return f"at batch {smallest.batch} {winner} is {_times(smallest)} faster than {loser}{_because(row.cause, report)}"
    all_decided = len(decided) == len(row.points)
    where = f"at every batch measured, {span}" if all_decided else f"wherever the pairs decided, {_span([p.batch for p in decided])}"
    more = f", {_times(largest)} at {largest.batch}" if largest is not smallest else ""
    why = f"; at {smallest.batch} that is{_because(row.cause, report)}" if row.cause else ""
    return f"{winner} wins {where}: {_times(smallest)} faster at {smallest.batch}{more}{why}"


def _beaten(point: Versus, row: Crossover, report: Report) -> str:
    ahead = row.second if point.verdict == "faster" else row.first
    return f"at batch {point.batch} {name(report, ahead)} is {_times(point)} faster{_because(row.cause, report)}"


def _because(cause: Cause | None, report: Report) -> str:
    """Empty where nothing was measured that would turn the result round."""
    if cause is None:
        return ""
    who = name(report, cause.device)
    what = {
        "launches": f"of {who}'s time lies between launches",
        "waits": f"of the time {who} waits for the host",
        "copies": f"of {who}'s time are copies from and to the host",
    }.get(cause.kind, clean(cause.kind, 40))
    return (
        f" because {f.share(cause.share)} {what} (without that a call would take {f.ms(cause.without_ms)} instead of {f.ms(_whole(cause))})"
    )


def _whole(cause: Cause) -> float:
    return cause.without_ms / (1 - cause.share) if cause.share < 1 else cause.other_ms


def _times(point: Versus) -> str:
    return f.ratio(max(point.ratio, 1 / point.ratio))


def _span(batches: Sequence[int]) -> str:
    return f"batch {batches[0]}" if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"


def name(report: Report, device: str) -> str:
    """`the GPU` where there is one of a kind, else its id."""
    kind = _kind(report, device)
    alone = sum(other.kind == kind for other in report.devices) == 1
    return {"cpu": "the CPU", "cuda": "the GPU"}.get(kind, clean(device)) if alone else clean(device)


def _kind(report: Report, device: str) -> str:
    return next((other.kind for other in report.devices if other.id == device), "")


def _several(sweep: Sweep, device: str) -> bool:
    return len({curve.what for curve in sweep.curves if curve.device == device}) > 1


def build(report: Report) -> list[Block]:
    """A table a comparison, and how far each curve goes."""
    sweep = report.sweep
    if sweep is None:
        return []
    blocks: list[Block] = [_table(row, report, sweep) for row in sweep.crossovers]
    rows = tuple((f"{clean(c.device)} {clean(c.what, 60)}", Cell(_reach(c))) for c in sweep.curves if c.points or c.stopped)
    if rows:
        blocks.append(Facts(title=f"{TITLE}: how far it goes", rows=rows, notes=tuple(clean(note, 300) for note in sweep.notes)))
    return blocks


def _table(row: Crossover, report: Report, sweep: Sweep) -> Table:
    """One row a batch; bars are samples/s on one scale."""
    sides = (name(report, row.first).removeprefix("the "), name(report, row.second).removeprefix("the "))
    best = max((_rates(point) for point in row.points), key=max, default=(1.0, 1.0))
    shares = {
        point.batch: point
        for curve in sweep.curves
        if (curve.device, curve.what) == (row.second, row.what)
        for point in curve.points
        if point.waits is not None
    }
    columns = [Column("batch", right=True)]
    for side in sides:
        columns += [Column(f"{side} a call", right=True), Column("samples/s", right=True, spare=2)]
    columns.append(Column("faster"))
    if shares:
        columns += [Column(f"{sides[1]} waits", right=True, spare=1), Column("copies", right=True, spare=3)]
    rows = []
    for point in row.points:
        rates = _rates(point)
        cells = [Cell(str(point.batch))]
        for ms, rate in zip((point.first_ms, point.second_ms), rates, strict=True):
            cells += [Cell(f.ms(ms)), Cell(f.rate(rate), "", rate / max(best))]
        ahead = {"faster": f"{sides[1]} {_times(point)}", "slower": f"{sides[0]} {_times(point)}", "same": "the same"}
        cells.append(Cell(ahead.get(point.verdict, "undecided"), "strong" if point.verdict in ("faster", "slower") else "dim"))
        if shares:
            known = shares.get(point.batch)
            cells += [Cell(f.share(known.waits if known else None)), Cell(f.share(known.copies if known else None))]
        rows.append(tuple(cells))
    notes = ["who is faster, by the median of interleaved pairs of blocks; the devices were never busy at the same time"]
    if row.from_batch is not None and row.interpolated:
        notes.append(f"batch {row.from_batch} lies where a straight line between two batches measured crosses 1×, both axes logarithmic")
    if shares:
        notes.append("waits: share of a call in which the device has nothing to do, from a trace of its own")
    return Table(title=TITLE, beside=clean(row.what, 120), columns=tuple(columns), rows=tuple(rows), notes=tuple(notes))


def _rates(point: Versus) -> tuple[float, float]:
    first, second = (point.batch / ms * 1e3 if ms > 0 else 0.0 for ms in (point.first_ms, point.second_ms))
    return first, second


def _reach(curve: Curve) -> str:
    parts = [_span([point.batch for point in curve.points])] if curve.points else ["nothing was timed"]
    if curve.stopped:
        parts.append(f"then {clean(curve.stopped, 200)}")
    if curve.memory is not None:
        parts.append(_memory(curve.memory))
    return "; ".join(parts)


def _memory(memory: Memory) -> str:
    told = f"{f.memory(max(0.0, memory.fixed_bytes))} and {f.memory(max(0.0, memory.bytes_per_sample))} a sample"
    if memory.largest_batch is not None and memory.limit_bytes is not None:
        told += f": {f.memory(memory.limit_bytes)} are full at about batch {memory.largest_batch}"
    told += f", by a straight line that misses no batch by more than {f.share(memory.misfit)}"
    return told + (f" ({clean(memory.note, 200)})" if memory.note else "")
