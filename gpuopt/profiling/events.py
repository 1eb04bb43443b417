"""A Kineto trace (Chrome JSON) -> Trace: kernels, copies, runtime calls, ops, module ranges and steps, linked to each other. Pure: plain dicts in, plain values out (core/trace.py).

The exported JSON is read rather than the profiler's objects: it alone carries graph ids, copy kinds and byte counts, and it has kept its form from torch 2.11 to 2.13.
All times are nanoseconds from the first event.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from typing import Any

from gpuopt.core.trace import Copy, Fetch, Kernel, RuntimeCall, Step, Trace
from gpuopt.profiling.nest import MODULE as MODULE
from gpuopt.profiling.nest import Locator, nested
from gpuopt.profiling.rows import READ, WORK, Maker, MarkRow, OpRow, Rows, WorkRow

STEP = "gpuopt::step"
LOADER = "enumerate(DataLoader)#"
"""torch.utils.data names each fetch `enumerate(DataLoader)#<class of the iterator>.__next__`: a user annotation, or an op in older traces."""

_COPY = re.compile(r"(?:[Mm]emcpy |Copy)(?P<kind>[A-Za-z]+)(?: \((?P<source>\w+) -> (?P<target>\w+)\))?")
_COPY_KINDS = {
    "htod": "h2d",
    "dtoh": "d2h",
    "dtod": "d2d",
    "ptop": "p2p",
    "htoh": "h2h",
    "hosttodevice": "h2d",
    "devicetohost": "d2h",
    "devicetodevice": "d2d",
}
_HOST = {"h2d": "source", "d2h": "target"}
_RUNTIME_KINDS = (
    ("graph", re.compile(r"GraphLaunch")),
    ("launch", re.compile(r"LaunchKernel|LaunchCooperative|ModuleLaunch|KernelLaunch")),
    ("copy", re.compile(r"[Mm]emcpy|[Mm]emset")),
    ("sync", re.compile(r"Synchronize|StreamWaitEvent|EventQuery|StreamQuery|urQueueFinish|urEventWait")),
    (
        "alloc",
        re.compile(
            r"(?:cuda|hip)(?:Malloc|Free)|urUSM\w*(?:Alloc|Free)|cuMem(Alloc|Free|Create|Map|Unmap|Release)|(?:cuda|hip)Host(Alloc|Register)"
        ),
    ),
)


def runtime_kind(name: str) -> str:
    """`cudaLaunchKernelExC` -> `launch`."""
    for kind, pattern in _RUNTIME_KINDS:
        if pattern.search(name):
            return kind
    return "other"


def copy_kind(name: str) -> tuple[str, str]:
    """`Memcpy HtoD (Pageable -> Device)` -> (`h2d`, `pageable`)."""
    match = _COPY.search(name)
    if match is None:
        return "d2d", ""
    kind = _COPY_KINDS.get(match["kind"].lower(), "d2d")
    side = _HOST.get(kind)
    return kind, (match[side] or "").lower() if side else ""


def from_chrome(data: Mapping[str, Any], *, device: str, notes: tuple[str, ...] = ()) -> Trace:
    """Parse `prof.export_chrome_trace`'s JSON, already loaded. Unknown events are passed over; events outside the steps are kept out of every sum."""
    rows, make = Rows(), Maker()
    for event in data.get("traceEvents", ()):
        if event.get("ph") != "X" or "ts" not in event:
            continue
        category = str(event.get("cat", "")).lower()
        if category not in READ:
            continue
        into = rows.of(category)
        args = event.get("args") or {}
        ts, dur = float(event["ts"]), float(event.get("dur", 0))
        if category in WORK:
            into.append(make.work(event, args, ts, dur))
        elif category == "cpu_op":
            into.append(make.op(event, args, ts, dur))
        elif category == "user_annotation":
            into.append(make.mark(event, ts, dur))
        else:
            into.append(make.call(event, args, ts, dur))
    return from_rows(rows, device=device, notes=notes)


def from_rows(rows: Rows, *, device: str, notes: tuple[str, ...] = ()) -> Trace:
    """Nest, link and order the rows. They are taken out of `rows` as they are read, so that both never lie in memory whole."""
    kinds = (rows.ops, rows.calls, rows.kernels, rows.memsets, rows.copies, rows.marks)
    # Timestamps are microseconds with three decimals: subtract first, or the float loses the nanoseconds.
    origin = min((row.ts for kind in kinds for row in kind), default=0.0)
    marks, rows.marks = rows.marks, []
    steps = tuple(Step(start_ns=_ns(m.ts - origin), dur_ns=_ns(m.dur)) for m in sorted(marks, key=lambda m: m.ts) if m.name == STEP)
    step_of = _Steps(steps)
    fetched: list[MarkRow | OpRow] = [row for kind in (marks, rows.ops) for row in kind if row.name.startswith(LOADER)]
    raw_ops = [op for op in rows.ops if not op.name.startswith(LOADER)] if fetched else rows.ops
    ops, modules, by_thread = nested(raw_ops, [m for m in marks if m.name.startswith(MODULE)], rows.frames, origin, step_of)
    rows.ops, rows.frames = [], []
    del raw_ops
    locate = Locator(ops, by_thread)
    by_external = {op.external_id: op.index for op in ops if op.external_id is not None}

    runtime: list[RuntimeCall] = []
    launches: dict[int, RuntimeCall] = {}
    kinds_of: dict[str, str] = {}
    for row in rows.calls:
        start = _ns(row.ts - origin)
        kind = kinds_of.get(row.name)
        if kind is None:
            kind = kinds_of[row.name] = runtime_kind(row.name)
        call = RuntimeCall(
            name=row.name,
            kind=kind,
            start_ns=start,
            dur_ns=_ns(row.dur),
            thread=row.thread,
            correlation=row.correlation,
            op=locate(row.thread, start),
            step=step_of(start),
        )
        runtime.append(call)
        if row.correlation:
            # A driver call nested in a runtime call shares no correlation with it; where two do, the one that launches wins.
            known = launches.get(row.correlation)
            if known is None or known.kind == "other":
                launches[row.correlation] = call
    rows.calls = []

    def launched_by(row: WorkRow, start: int) -> tuple[int | None, int | None, RuntimeCall | None]:
        """(op, step, launch) of a device event: by its launch, else by the op id Kineto copied onto it, and by its own time."""
        launch = launches.get(row.correlation) if row.correlation else None
        op = launch.op if launch is not None else None
        if op is None and row.external_id:
            op = by_external.get(row.external_id)
        return op, launch.step if launch is not None and launch.step is not None else step_of(start), launch

    kernels: list[Kernel] = []
    for is_memset, works in ((False, rows.kernels), (True, rows.memsets)):
        for work in works:
            start = _ns(work.ts - origin)
            op, step, launch = launched_by(work, start)
            kernels.append(
                Kernel(
                    name=work.name,
                    start_ns=start,
                    dur_ns=_ns(work.dur),
                    stream=work.stream,
                    correlation=work.correlation,
                    op=op,
                    step=step,
                    graph_id=work.graph_id or (work.correlation if launch is not None and launch.kind == "graph" else None),
                    is_memset=is_memset,
                    grid=work.grid,
                    block=work.block,
                    registers=work.registers,
                    shared_bytes=work.shared_bytes,
                    blocks_per_sm=work.blocks_per_sm,
                    device=work.device,
                )
            )
    copies: list[Copy] = []
    for work in rows.copies:
        start = _ns(work.ts - origin)
        op, step, _ = launched_by(work, start)
        way, memory = copy_kind(work.name)
        copies.append(
            Copy(
                kind=way,
                memory=memory,
                bytes=work.bytes,
                start_ns=start,
                dur_ns=_ns(work.dur),
                stream=work.stream,
                correlation=work.correlation,
                op=op,
                step=step,
                device=work.device,
            )
        )
    rows.kernels, rows.memsets, rows.copies = [], [], []
    return Trace(
        device=device,
        steps=steps,
        kernels=tuple(sorted(kernels, key=lambda k: (k.start_ns, k.stream))),
        copies=tuple(sorted(copies, key=lambda c: (c.start_ns, c.stream))),
        runtime=tuple(sorted(runtime, key=lambda r: (r.start_ns, r.thread))),
        ops=ops,
        modules=modules,
        fetches=tuple(
            Fetch(name=f.name, start_ns=_ns(f.ts - origin), dur_ns=_ns(f.dur), thread=f.thread) for f in sorted(fetched, key=lambda f: f.ts)
        ),
        num_lost=sum(k.step is None for k in kernels) + sum(c.step is None for c in copies),
        notes=notes,
    )


def _ns(us: float) -> int:
    return round(us * 1000)


class _Steps:
    """Time -> number of the step around it."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self._steps = steps
        self._starts = [s.start_ns for s in steps]
        self._last = (0, -1, 0)
        """(first, last) nanosecond of the step found last, and its number: the next event is in it most likely."""

    def __call__(self, time_ns: int) -> int | None:
        first, last, at = self._last
        if first <= time_ns <= last:
            return at
        at = bisect.bisect_right(self._starts, time_ns) - 1
        if at < 0:
            return None
        step = self._steps[at]
        end = step.start_ns + step.dur_ns
        if time_ns > end:
            return None
        # Where two steps touch, the later one has the nanosecond they share.
        self._last = (step.start_ns, min(end, self._starts[at + 1] - 1) if at + 1 < len(self._starts) else end, at)
        return at
