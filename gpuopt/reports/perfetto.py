"""Report -> a timeline in the Chrome trace format, which ui.perfetto.dev opens.

A report holds sums and samples, no trace. So nothing here is a recording: the waterfall's parts stand one after another, modules inside their parents in the
order of the model, ops after one another in theirs, samples in the order they were taken. Every track says so, and so does the file's `otherData`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpuopt.core.result import ModuleRow, Report, Run
from gpuopt.reports.content import naming
from gpuopt.reports.content.breakdown import part_tone
from gpuopt.reports.figures import clean

MADE_FROM = (
    "Made by gpuopt from a report, not recorded: lengths are measured, positions are not. Parts and modules are laid one after another."
)
COLOURS = {"compute": "good", "memory": "rail_animation", "copy": "bad", "gap": "terrible", "other": "generic_work", "unknown": "grey"}
"""Tone -> reserved colour name of the Chrome trace format; viewers without it choose their own."""

Event = dict[str, Any]


def render(report: Report) -> str:
    """One process a run, one thread a view of it. Times in microseconds, as the format wants."""
    name = naming.labels(report.runs)
    events: list[Event] = []
    for index, run in enumerate(report.runs, start=1):
        events += _process(index, run, f"{clean(run.model, 60)}: {name(run)}")
    other = {
        "note": MADE_FROM,
        "command": clean(report.command, 1000),
        "gpuopt": clean(report.environment.gpuopt),
        "device": clean(report.device.name) if report.device else "",
    }
    body = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
    return json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n"


def _process(pid: int, run: Run, label: str) -> Iterator[Event]:
    yield {
        "ph": "M",
        "pid": pid,
        "name": "process_name",
        "args": {"name": label if run.status == "ok" else f"{label} ({run.status.value})"},
    }
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    tracks = (
        ("waterfall of one call, parts in a row (not recorded)", _waterfall(run)),
        ("modules of one call, in a row (not recorded)", _modules(run.modules)),
        ("ops of one call, longest first (not recorded)", _ops(run)),
        ("counted calls, in the order taken, without the pauses between", _calls("call", run.samples_ns)),
        ("warm-up calls", _calls("warm-up", run.warmup_ns)),
    )
    for tid, (title, slices) in enumerate(tracks, start=1):
        rows = list(slices)
        if rows:
            yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": title}}
            yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
            yield from ({**row.event(), "pid": pid, "tid": tid} for row in rows)
    start = 0
    for ns in run.samples_ns:
        yield {"ph": "C", "pid": pid, "name": "ms a call", "ts": start / 1e3, "args": {"ms": ns / 1e6}}
        start += max(0, ns)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Whole nanoseconds, so that slices which touch do not overlap by a rounding."""

    name: str
    start_ns: int
    dur_ns: int
    args: dict[str, Any]
    tone: str = ""

    def event(self) -> Event:
        told = {key: value for key, value in self.args.items() if value not in (None, "")}
        event: Event = {
            "ph": "X",
            "name": self.name,
            "ts": self.start_ns / 1e3,
            "dur": self.dur_ns / 1e3,
            "cat": self.tone or "gpuopt",
            "args": told,
        }
        return {**event, "cname": COLOURS[self.tone]} if self.tone in COLOURS else event


def _waterfall(run: Run) -> Iterator[_Slice]:
    if run.waterfall is None:
        return
    start = 0
    yield _Slice(
        "one call, traced" if run.backend == "trace" else "one call, untraced",
        0,
        max(0, round(run.waterfall.wall_ms * 1e6)),
        {"method": clean(run.waterfall.method)},
    )
    limit = round(run.waterfall.wall_ms * 1e6)
    for part in run.waterfall.parts:
        length = min(max(0, round(part.ms * 1e6)), max(0, limit - start))
        if length:
            yield _Slice(clean(part.name), start, length, {"detail": clean(part.detail)}, part_tone(part.name))
        start += length


def _modules(rows: Sequence[ModuleRow]) -> Iterator[_Slice]:
    """Children begin where their parent does and end where it ends at the latest."""
    ends: list[tuple[int, int, int]] = []  # (depth, where the next child begins, where the module ends), outermost first
    top = 0
    for row in rows:
        if not row.time_ns or row.time_ns <= 0:
            continue
        while ends and ends[-1][0] >= row.depth:
            ends.pop()
        if ends:
            depth, start, end = ends[-1]
            length = min(round(row.time_ns), end - start)
            ends[-1] = (depth, start + length, end)
        else:
            start, length = top, round(row.time_ns)
            top += length
        if length <= 0:
            continue
        ends.append((row.depth, start, start + length))
        args = {
            "module": clean(row.name) or "(root)",
            "class": clean(row.module_class),
            "FLOPs": row.flops,
            "bytes": row.bytes,
            "percent of ceiling": row.pct_of_ceiling,
        }
        yield _Slice(clean(row.name.rpartition(".")[2]) or "(root)", start, length, args)


def _ops(run: Run) -> Iterator[_Slice]:
    start = 0
    for point in sorted(run.roofline, key=lambda p: -(p.time_ns or 0.0)):
        length = round(point.time_ns or 0.0)
        if length > 0:
            args = {
                "module": clean(point.module) or "(root)",
                "count": point.count,
                "dtype": clean(point.dtype or ""),
                "FLOPs": point.flops,
                "bytes": point.bytes,
                "percent of ceiling": point.pct_of_ceiling,
                "ceiling": clean(point.ceiling),
            }
            yield _Slice(clean(point.name), start, length, args, point.bound if point.bound in ("compute", "memory") else "unknown")
            start += length


def _calls(name: str, samples_ns: Iterable[int]) -> Iterator[_Slice]:
    start = 0
    for number, ns in enumerate(samples_ns, start=1):
        if ns > 0:
            yield _Slice(f"{name} {number}", start, ns, {})
            start += ns
