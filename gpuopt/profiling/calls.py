"""The ranges of a foreign trace -> its calls, as steps: ProfilerStep annotations, else a range of the user's that repeats and holds most of it, else the trace as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from gpuopt.profiling.rows import MarkRow

MIN_SHARE = 0.6
"""Of the trace's length that the repeated range of a name must hold to be its calls: a range around attention alone holds less."""
_NOT_CALLS = (
    "module::",
    "enumerate(DataLoader)",
    "Torch-Compiled Region",
    "## Call CompiledFxGraph",
    "Optimizer.",
    "nccl:",
    "TorchDynamo",
    "PyTorch",
)
"""Names that libraries give: parts of a call, or none."""


def of_profiler(steps: dict[str, list[MarkRow]], name: str) -> tuple[list[MarkRow], list[str]]:
    """(calls, notes) of the thread with most ProfilerStep annotations, by thread."""
    thread = max(steps, key=lambda t: (len(steps[t]), -min(m.ts for m in steps[t])))
    marks = sorted(steps[thread], key=lambda m: m.ts)
    apart = [marks[0]]
    for mark in marks[1:]:
        if mark.ts >= apart[-1].ts + apart[-1].dur - 0.001:
            apart.append(mark)
    notes = [f"{len(apart)} calls by their ProfilerStep annotations"]
    if len(apart) < len(marks):
        notes.append(f"{len(marks) - len(apart)} ProfilerStep annotations lie inside others and were left out")
    if len(steps) > 1:
        notes.append(f"{len(steps)} threads have steps of their own (several ranks in one file?): those of thread {thread} are explained")
    return [mark._replace(name=name) for mark in apart], notes


def guessed(marks: Sequence[MarkRow], first_us: float, last_us: float, name: str) -> tuple[list[MarkRow], list[str]]:
    """The same without them. A call lasts from the start of its range to the start of the next."""
    by_name: dict[tuple[str, str], list[MarkRow]] = {}
    for mark in marks:
        if not mark.name.startswith(_NOT_CALLS):
            by_name.setdefault((mark.thread, mark.name), []).append(mark)
    found: list[MarkRow] = []
    for group in by_name.values():
        group.sort(key=lambda m: m.ts)
        is_apart = all(a.ts + a.dur <= b.ts for a, b in pairwise(group))
        share = sum(m.dur for m in group) / max(last_us - first_us, 1e-3)
        if len(group) > 1 and is_apart and share >= MIN_SHARE and (not found or group[0].dur > found[0].dur):
            found = group
    if not found:
        # One more nanosecond: an event at the very end is inside.
        return [MarkRow(first_us, last_us - first_us + 0.001, name, "")], [
            "no ProfilerStep annotations: the whole trace is explained as one call, whatever it ran (schedule=… and prof.step() mark the calls)"
        ]
    lengths = [b.ts - a.ts for a, b in pairwise(found)]
    end = max(found[-1].ts + found[-1].dur, min(last_us + 0.001, found[-1].ts + median(lengths)))
    lengths.append(end - found[-1].ts)
    return [MarkRow(m.ts, length, name, m.thread) for m, length in zip(found, lengths, strict=True)], [
        f"no ProfilerStep annotations: the {len(found)} ranges {found[0].name[:60]!r} are taken as its calls, each from its start to the next one's"
    ]
