"""GPU109: the key-value cache is copied whole to append one token."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import kernels
from gpuopt.core.result import Finding
from gpuopt.core.trace import CpuOp, Trace
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

CATS = frozenset({"aten::cat", "aten::_cat", "aten::concat", "aten::hstack", "aten::vstack", "aten::concatenate"})
MIN_CACHED = 32
"""Positions already there: a shorter tensor is cheap to copy, and is often a class token put before its patches."""
MIN_TIMES = 4
"""What is there against what is added: joining two halves is no cache."""
MIN_PLACES = 2
"""A cache is kept by every layer, for keys and for values: one such cat alone is something else."""


def appended(op: CpuOp) -> tuple[int, int, int] | None:
    """(dimension, positions there, positions added) where a cat joins a long tensor and a short one that agree in every other dimension, three dimensions or more."""
    if len(op.shapes) != 2 or len(op.shapes[0]) != len(op.shapes[1]) or len(op.shapes[0]) < 3:
        return None
    there, added = op.shapes
    differ = [d for d, (a, b) in enumerate(zip(there, added, strict=True)) if a != b]
    if len(differ) != 1 or there[differ[0]] < MIN_CACHED or added[differ[0]] < 1:
        return None
    dim = differ[0]
    if dim == 1 and added[dim] > 1:  # channels of a dense block grow too
        return None
    return (dim, there[dim], added[dim]) if there[dim] >= MIN_TIMES * added[dim] else None


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all such cats: a cat whose output is the next one's first input has been seen to grow; else at least two places append a position."""
    trace = evidence.trace
    assert trace is not None
    found = {op.index: how for op in trace.ops if op.step is not None and op.name in CATS and (how := appended(op)) is not None}
    if not found:
        return
    chains = _growing(trace, found)
    first = trace.ops[min(found)].step
    places = sum(trace.ops[i].step == first for i in found)
    single = [i for i, (dim, _, added) in found.items() if added == 1 and dim != 1]
    if not chains and not (len(single) == len(found) and places >= MIN_PLACES):
        return
    steps = timeline.num_steps(trace)
    times = timeline.time_below(trace, CATS)
    time_ms = sum(times.get(i, 0.0) for i in found) / steps / 1e6
    if not trace.on_device:
        time_ms = sum(trace.ops[i].dur_ns for i in found) / steps / 1e6
    elif not any(times.get(i) for i in found):  # replayed from a graph: the kernels' names are all there is
        time_ms = sum(k.dur_ns for k in trace.kernels if k.step is not None and kernels.kind(k.name) == "cat") / steps / 1e6
    dim, there, added = max(found.values(), key=lambda h: h[1])
    where = list(dict.fromkeys(m for i in found if (m := timeline.module_of(trace, i))))
    growth = f", seen to grow over {chains + 1} calls" if chains else ""
    finding = Finding(
        code="",
        severity="info",
        message=f"cat copies {there} positions to append {added} along dimension {dim}, {words.times(len(found) / steps)} a call{growth}: {words.ms(time_ms)}"
        + (f", in {words.listed(where)}" if where else ""),
        fix="a static cache written in place: cache_implementation='static', or k_cache.index_copy_(2, position, k) into a tensor of the longest length",
        module=where[0] if len(where) == 1 else None,
        op="aten::cat",
        count=max(1, round(len(found) / steps)),
        time_ms=time_ms or None,
    )
    yield priced(finding, time_ms * (1 - added / there), low=0.8, high=1.1, wall_ms=evidence.wall_ms)


def _growing(trace: Trace, found: dict[int, tuple[int, int, int]]) -> int:
    """How often in a row, at most, a cat's output has the shape of a later cat's first input in the same module."""
    lengths: dict[tuple[str | None, tuple[int, ...]], int] = {}
    best = 0
    for index in sorted(found, key=lambda i: trace.ops[i].start_ns):
        op, (dim, there, added) = trace.ops[index], found[index]
        result = tuple(there + added if d == dim else n for d, n in enumerate(op.shapes[0]))
        run = lengths.get((op.module, op.shapes[0]), -1) + 1
        lengths[op.module, result] = max(run, lengths.get((op.module, result), 0))
        best = max(best, run)
    return best


RULE = Rule(
    code="GPU109",
    name="kv-concat",
    what="Each new token makes a new, longer key-value cache by torch.cat.",
    why="The whole cache is read and written to add one position, the allocator sees a new size each time, and no graph or compiled code fits two steps.",
    before="k = torch.cat([past_k, k], dim=2)",
    after="past_k.index_copy_(2, position, k)",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="kernel times under aten::cat in the trace",
)
