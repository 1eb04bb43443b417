"""A Kineto trace (Chrome JSON) -> Trace: kernels, copies, runtime calls, ops, module ranges and steps, linked to each other. Pure: plain dicts in, plain values out (core/trace.py).

The exported JSON is read rather than the profiler's objects: it alone carries graph ids, copy kinds and byte counts, and it has kept its form from torch 2.11 to 2.13.
All times are nanoseconds from the first event.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping
from typing import Any

from gpuopt.core.trace import Copy, CpuOp, Fetch, Kernel, ModuleRange, RuntimeCall, Step, Trace

STEP = "gpuopt::step"
MODULE = "module::"
LOADER = "enumerate(DataLoader)#"
"""torch.utils.data names each fetch `enumerate(DataLoader)#<class of the iterator>.__next__`: a user annotation, or an op in older traces."""

_COPY = re.compile(r"Memcpy (?P<kind>[A-Za-z]+)(?: \((?P<source>\w+) -> (?P<target>\w+)\))?")
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
    ("launch", re.compile(r"LaunchKernel|LaunchCooperative|ModuleLaunch")),
    ("copy", re.compile(r"[Mm]emcpy|[Mm]emset")),
    ("sync", re.compile(r"Synchronize|StreamWaitEvent|EventQuery|StreamQuery")),
    ("alloc", re.compile(r"cudaMalloc|cudaFree|cuMem(Alloc|Free|Create|Map|Unmap|Release)|cudaHost(Alloc|Register)")),
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
    events = [e for e in data.get("traceEvents", ()) if e.get("ph") == "X" and "ts" in e]
    # Timestamps are microseconds with three decimals: subtract first, or the float loses the nanoseconds.
    origin = min((float(e["ts"]) for e in events), default=0.0)
    by_category: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
    for event in events:
        start = round((float(event["ts"]) - origin) * 1000)
        by_category.setdefault(str(event.get("cat", "")).lower(), []).append((start, round(float(event.get("dur", 0)) * 1000), event))

    marks = by_category.get("user_annotation", [])
    steps = tuple(Step(start_ns=s, dur_ns=d) for s, d, e in sorted(marks, key=lambda m: m[0]) if e["name"] == STEP)
    step_of = _Steps(steps)
    ranges = [(s, d, e) for s, d, e in marks if str(e["name"]).startswith(MODULE)]
    calls = by_category.get("cpu_op", [])
    fetched = [(s, d, e) for s, d, e in (*marks, *calls) if str(e["name"]).startswith(LOADER)]
    raw_ops = [(s, d, e) for s, d, e in calls if not str(e["name"]).startswith(LOADER)] if fetched else calls
    ops, modules, by_thread = _nest(raw_ops, ranges, step_of)
    locate = _Locator(ops, by_thread)
    by_external = {op.external_id: op.index for op in ops if op.external_id is not None}

    runtime: list[RuntimeCall] = []
    launches: dict[int, RuntimeCall] = {}
    for category in ("cuda_runtime", "cuda_driver"):
        for start, dur, event in by_category.get(category, []):
            args = event.get("args", {})
            call = RuntimeCall(
                name=event["name"],
                kind=runtime_kind(event["name"]),
                start_ns=start,
                dur_ns=dur,
                thread=_thread(event),
                correlation=_int(args.get("correlation")),
                op=locate(_thread(event), start),
                step=step_of(start),
            )
            runtime.append(call)
            if call.correlation:
                # A driver call nested in a runtime call shares no correlation with it; where two do, the one that launches wins.
                known = launches.get(call.correlation)
                if known is None or known.kind == "other":
                    launches[call.correlation] = call

    def launched_by(args: Mapping[str, Any]) -> tuple[int | None, int | None, RuntimeCall | None]:
        """(correlation, op, launch) of a device event: by its launch, else by the op id Kineto copied onto it."""
        correlation = _int(args.get("correlation"))
        launch = launches.get(correlation) if correlation else None
        op = launch.op if launch is not None else None
        external = _int(args.get("External id"))
        if op is None and external:
            op = by_external.get(external)
        return correlation, op, launch

    kernels: list[Kernel] = []
    copies: list[Copy] = []
    for category in ("kernel", "gpu_memset", "gpu_memcpy"):
        for start, dur, event in by_category.get(category, []):
            args = event.get("args", {})
            correlation, op, launch = launched_by(args)
            step = launch.step if launch is not None and launch.step is not None else step_of(start)
            is_replay = launch is not None and launch.kind == "graph"
            stream = _int(args.get("stream")) or 0
            if category == "gpu_memcpy":
                kind, memory = copy_kind(event["name"])
                size = _int(args.get("bytes")) or 0
                copies.append(
                    Copy(
                        kind=kind,
                        memory=memory,
                        bytes=size,
                        start_ns=start,
                        dur_ns=dur,
                        stream=stream,
                        correlation=correlation,
                        op=op,
                        step=step,
                    )
                )
                continue
            kernels.append(
                Kernel(
                    name=event["name"],
                    start_ns=start,
                    dur_ns=dur,
                    stream=stream,
                    correlation=correlation,
                    op=op,
                    step=step,
                    graph_id=_int(args.get("graph id")) or (correlation if is_replay else None),
                    is_memset=category == "gpu_memset",
                    grid=_triple(args.get("grid")),
                    block=_triple(args.get("block")),
                    registers=_int(args.get("registers per thread")),
                    shared_bytes=_int(args.get("shared memory")),
                    blocks_per_sm=_positive(args.get("blocks per SM")),
                )
            )
    return Trace(
        device=device,
        steps=steps,
        kernels=tuple(sorted(kernels, key=lambda k: (k.start_ns, k.stream))),
        copies=tuple(sorted(copies, key=lambda c: (c.start_ns, c.stream))),
        runtime=tuple(sorted(runtime, key=lambda r: (r.start_ns, r.thread))),
        ops=ops,
        modules=modules,
        fetches=tuple(
            Fetch(name=str(e["name"]), start_ns=s, dur_ns=d, thread=_thread(e)) for s, d, e in sorted(fetched, key=lambda f: f[0])
        ),
        num_lost=sum(k.step is None for k in kernels) + sum(c.step is None for c in copies),
        notes=notes,
    )


class _Steps:
    """Time -> number of the step around it."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.starts = [s.start_ns for s in steps]

    def __call__(self, time_ns: int) -> int | None:
        at = bisect.bisect_right(self.starts, time_ns) - 1
        if at < 0 or time_ns > self.steps[at].start_ns + self.steps[at].dur_ns:
            return None
        return at


class _Locator:
    """(thread, time) -> innermost op running then."""

    def __init__(self, ops: tuple[CpuOp, ...], by_thread: dict[str, list[int]]) -> None:
        self.ops = ops
        self.by_thread = by_thread
        self.starts = {thread: [ops[i].start_ns for i in indices] for thread, indices in by_thread.items()}

    def __call__(self, thread: str, time_ns: int) -> int | None:
        indices = self.by_thread.get(thread)
        if not indices:
            return None
        at = bisect.bisect_right(self.starts[thread], time_ns) - 1
        # The last op to start before then is the innermost one or a finished one below it: climb until one still runs.
        op: int | None = indices[at] if at >= 0 else None
        while op is not None and time_ns > self.ops[op].start_ns + self.ops[op].dur_ns:
            op = self.ops[op].parent
        return op


def _nest(
    raw_ops: list[tuple[int, int, dict[str, Any]]], raw_ranges: list[tuple[int, int, dict[str, Any]]], step_of: _Steps
) -> tuple[tuple[CpuOp, ...], tuple[ModuleRange, ...], dict[str, list[int]]]:
    """Ops and module ranges of each thread, nested by time: parents, modules, self times."""
    threads: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
    for item in (*raw_ops, *raw_ranges):
        threads.setdefault(_thread(item[2]), []).append(item)
    drafts: list[dict[str, Any]] = []
    modules: list[ModuleRange] = []
    by_thread: dict[str, list[int]] = {}
    for thread, items in threads.items():
        # Ties: the longer encloses the shorter; between equals, the one recorded first (its external id is lower).
        items.sort(key=lambda i: (i[0], -i[1], _int(i[2].get("args", {}).get("External id")) or 0))
        stack: list[tuple[int, int | None, tuple[str, str] | None]] = []  # (end, op index or None, module)
        for start, dur, event in items:
            while stack and stack[-1][0] <= start and not (dur == 0 and stack[-1][0] == start):
                stack.pop()
            parent = next((op for _, op, _ in reversed(stack) if op is not None), None)
            module = stack[-1][2] if stack else None
            end = min(start + dur, stack[-1][0]) if stack else start + dur  # rounding may push a child past its parent's end
            if stack and stack[-1][1] is not None:
                drafts[stack[-1][1]]["children_ns"] += end - start
                drafts[stack[-1][1]]["num_children"] += 1
            name = str(event["name"])
            if name.startswith(MODULE):
                path, _, module_class = name.removeprefix(MODULE).partition("|")
                modules.append(ModuleRange(name=path, module_class=module_class, start_ns=start, dur_ns=dur, thread=thread))
                # A module called inside an op (a scripted one) still hangs below that op.
                stack.append((end, stack[-1][1] if stack else None, (path, module_class)))
                continue
            index = len(drafts)
            args = event.get("args", {})
            drafts.append(
                {
                    "index": index,
                    "name": name,
                    "start_ns": start,
                    "dur_ns": end - start,
                    "children_ns": 0,
                    "num_children": 0,
                    "thread": thread,
                    "parent": parent,
                    "module": module[0] if module else None,
                    "module_class": module[1] if module else "",
                    "step": step_of(start),
                    "external_id": _int(args.get("External id")),
                    "shapes": _shapes(args.get("Input Dims", ())),
                    "dtypes": tuple(str(t) for t in args.get("Input type", ()) if t),
                }
            )
            by_thread.setdefault(thread, []).append(index)
            stack.append((end, index, module))
    ops = []
    for draft in drafts:
        children = draft.pop("children_ns")
        ops.append(CpuOp(self_ns=max(0, draft["dur_ns"] - children), **draft))
    return tuple(ops), tuple(sorted(modules, key=lambda m: m.start_ns)), by_thread


def _shapes(dims: Any) -> tuple[tuple[int, ...], ...]:
    """Kineto's `Input Dims`: one list an argument, a list of lists for a tensor list, [] for what has no dimensions."""
    found: list[tuple[int, ...]] = []
    for item in dims:
        if isinstance(item, list) and item:
            if isinstance(item[0], list):
                found.extend(tuple(int(n) for n in inner) for inner in item if inner)
            else:
                found.append(tuple(int(n) for n in item))
    return tuple(found)


def _thread(event: Mapping[str, Any]) -> str:
    return f"{event.get('pid', '')}/{event.get('tid', '')}"


def _int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _triple(value: Any) -> tuple[int, int, int] | None:
    """`[132, 1, 1]`; None for anything else."""
    if not isinstance(value, list) or len(value) != 3:
        return None
    x, y, z = (_int(n) for n in value)
    return None if x is None or y is None or z is None else (x, y, z)


def _positive(value: Any) -> float | None:
    """A figure above 0. Kineto writes "inf" or a negative number where it could not ask the device for its SMs."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None
