"""A trace -> tables of what ran and for whom: kernels, source lines, devices, communication, compiled regions. Times are of one call, the mean over the traced ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gpuopt.core import kernels as names
from gpuopt.core.trace import Copy, Kernel, Trace
from gpuopt.profiling import gaps

NUM_KERNELS = 200
"""Rows of the kernels table; the rest is summed in its last row."""
NUM_LINES = 100
REGION = "Torch-Compiled Region"
"""What torch.compile calls each graph it runs, with its number: `Torch-Compiled Region: 0/0`."""


@dataclass(slots=True)
class _Sum:
    count: int = 0
    ns: int = 0
    ops: Counter[int | None] = field(default_factory=Counter)
    """Time by the op that launched it."""


def kernels(trace: Trace, top: int = NUM_KERNELS) -> list[dict[str, Any]]:
    """What ran on the device in the steps, by name: `{kernel, short, is_op, op, line, count, time_ms, pct}`, longest first; where nothing did, ops by their own time.

    `op`: what launched most of it, `line`: the user's function that called that; "" where the trace does not say. `pct` is of the summed times.
    What is beyond `top` rows is one row at the end.
    """
    sums: dict[str, _Sum] = {}

    def add(name: str, dur_ns: int, op: int | None) -> None:
        row = sums.get(name)
        if row is None:
            row = sums[name] = _Sum()
        row.count += 1
        row.ns += dur_ns
        row.ops[op] += dur_ns

    for kernel in trace.kernels:
        if kernel.step is not None:
            add(kernel.name, kernel.dur_ns, None if kernel.graph_id is not None else kernel.op)
    for copy in trace.copies:
        if copy.step is not None:
            add(_copy_name(copy), copy.dur_ns, copy.op)
    if not trace.on_device:
        for op in trace.ops:
            if op.step is not None:
                add(op.name, op.self_ns, op.index)
    steps = max(1, len(trace.steps))
    total = sum(row.ns for row in sums.values()) or 1
    order = sorted(sums, key=lambda name: (-sums[name].ns, name))

    def row_of(name: str, rows: Iterable[_Sum], op: str, line: str) -> dict[str, Any]:
        found = list(rows)
        ns = sum(row.ns for row in found)
        return {
            "kernel": name,
            "short": names.short(name) if trace.on_device and not name.startswith("memcpy ") else name,
            "is_op": not trace.on_device,
            "op": op,
            "line": line,
            "count": sum(row.count for row in found) / steps,
            "time_ms": ns / steps / 1e6,
            "pct": 100.0 * ns / total,
        }

    found = [row_of(name, [sums[name]], *_origin(trace, name, sums[name].ops)) for name in order[:top]]
    if rest := order[top:]:
        found.append(row_of(f"{len(rest)} others", [sums[name] for name in rest], "", ""))
    return found


def _copy_name(copy: Copy) -> str:
    return f"memcpy {copy.kind}" + (f" ({copy.memory})" if copy.memory else "")


def _origin(trace: Trace, kernel: str, ops: Counter[int | None]) -> tuple[str, str]:
    """(name, line) of the op most of a kernel's time was launched by; a generated kernel's is the compiled region around it."""
    by_name: Counter[tuple[str, str]] = Counter()
    for op, ns in ops.items():
        chain = [o for o in trace.chain(op) if o.name != kernel]
        if chain:
            by_name[chain[0].name, chain[0].line] += ns
    return by_name.most_common(1)[0][0] if by_name else ("", "")


def lines(trace: Trace, top: int = NUM_LINES) -> list[dict[str, Any]]:
    """Time by the user's functions, where stacks were recorded: `{line, count, time_ms, pct}`, longest first; what no line launched is not in it."""
    sums: dict[str, list[int]] = {}
    total = 0

    def add(op: int | None, ns: int) -> None:
        nonlocal total
        total += ns
        line = trace.ops[op].line if op is not None else ""
        if line:
            row = sums.setdefault(line, [0, 0])
            row[0] += 1
            row[1] += ns

    if trace.on_device:
        for work in _works(trace):
            add(work.op, work.dur_ns)
    else:
        for op in trace.ops:
            if op.step is not None:
                add(op.index, op.self_ns)
    steps = max(1, len(trace.steps))
    order = sorted(sums, key=lambda line: (-sums[line][1], line))[:top]
    return [
        {"line": line, "count": sums[line][0] / steps, "time_ms": sums[line][1] / steps / 1e6, "pct": 100.0 * sums[line][1] / max(1, total)}
        for line in order
    ]


def devices(trace: Trace) -> list[dict[str, Any]]:
    """`{device, busy_ms, kernels}` of each that ran something in the steps: its own union over streams."""
    by_device: dict[int, list[Kernel | Copy]] = {}
    for work in _works(trace):
        by_device.setdefault(work.device, []).append(work)
    steps = max(1, len(trace.steps))
    return [
        {"device": device, "busy_ms": _busy_ns(works) / steps / 1e6, "kernels": sum(isinstance(w, Kernel) for w in works) / steps}
        for device, works in sorted(by_device.items())
    ]


def communication(trace: Trace) -> dict[str, Any] | None:
    """`{kernels, time_ms, exposed_ms}` of collectives (NCCL, RCCL); None where none ran. Exposed: nothing else ran on that device meanwhile.

    A collective waits for the slowest rank inside its kernel: its time is not the wire's.
    """
    if not any(names.kind(name) == "collective" for name in {k.name for k in trace.kernels}):
        return None
    steps = max(1, len(trace.steps))
    count = total = exposed = 0
    for device in {k.device for k in trace.kernels}:
        mine = [k for k in trace.kernels if k.step is not None and k.device == device]
        ours = [k for k in mine if names.kind(k.name) == "collective"]
        others = [k for k in mine if names.kind(k.name) != "collective"]
        count += len(ours)
        total += _busy_ns(ours)
        exposed += _busy_ns(mine) - _busy_ns(others)
    return {"kernels": count / steps, "time_ms": total / steps / 1e6, "exposed_ms": exposed / steps / 1e6}


def compiled(trace: Trace) -> dict[str, Any] | None:
    """`{regions, pct}`: regions of torch.compile a call, and their share of the device's time; None where there are none."""
    regions = {op.index for op in trace.ops if op.step is not None and op.name.startswith(REGION)}
    if not regions or not trace.on_device:
        return None
    inside = total = 0
    held: dict[int, bool] = {}
    for kernel in trace.kernels:
        if kernel.step is None:
            continue
        total += kernel.dur_ns
        if kernel.op is not None:
            if kernel.op not in held:
                held[kernel.op] = any(op.index in regions for op in trace.chain(kernel.op))
            inside += kernel.dur_ns if held[kernel.op] else 0
    return {"regions": len(regions) / max(1, len(trace.steps)), "pct": 100.0 * inside / max(1, total)}


def replayed(trace: Trace) -> float:
    """Share of the kernels' time that CUDA graphs replayed, 0..1."""
    total = sum(k.dur_ns for k in trace.kernels if k.step is not None)
    return sum(k.dur_ns for k in trace.kernels if k.step is not None and k.graph_id is not None) / total if total else 0.0


def _works(trace: Trace) -> list[Kernel | Copy]:
    found: list[Kernel | Copy] = [k for k in trace.kernels if k.step is not None]
    found += [c for c in trace.copies if c.step is not None]
    return found


def _busy_ns(works: Iterable[Kernel | Copy]) -> int:
    return sum(end - start for start, end in gaps.merged((w.start_ns, w.start_ns + w.dur_ns) for w in works))
