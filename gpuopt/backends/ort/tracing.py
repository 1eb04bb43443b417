"""A profile of ONNX Runtime + the origins of its nodes -> Trace on a CPU, or the launches of a CUDA device's kernels. Pure.

Both carry what the run itself tells: FLOPs and bytes of each node from the shapes it was given, so no count needs to be matched.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from gpuopt.backends.ort.flops import node_flops
from gpuopt.backends.ort.origins import Origin, Origins
from gpuopt.backends.ort.profile import Call, NodeRun, Profile
from gpuopt.core.launches import Launch
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.core.trace import KINETO_DTYPES, CpuOp, Step, Trace

UNKNOWN_MODULE = "?"
THREAD = "onnxruntime"

_KINETO = {dtype: written for written, dtype in KINETO_DTYPES.items()}
_FREE = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant", "Dropout"})
"""They move nothing: ONNX Runtime lets the output share the input's memory, or makes a handful of numbers."""
_CONTROL = frozenset({"If", "Loop", "Scan"})
"""What they do is done by nodes of their own."""

LayerFlops = Mapping[str, tuple[float | None, str]]


def trace_of(profile: Profile, origins: Origins, layer_flops: LayerFlops, *, device: str, calls: int, warmup: int = 0) -> Trace:
    """The `calls` calls after the warm-up that took nearest to their median, in their order, as a Trace: a step a call, an op a node.

    A CPU has other users, whose turns land on any node. The untraced time this is set against is a median, too.
    """
    ops: list[CpuOp] = []
    steps: list[Step] = []
    run = profile.calls[warmup:]
    usual = median([call.dur_ns for call in run]) if run else 0.0
    chosen = sorted(sorted(run, key=lambda call: abs(call.dur_ns - usual))[:calls], key=lambda call: call.start_ns)
    origin_ns = chosen[0].start_ns if chosen else 0
    for number, call in enumerate(chosen):
        steps.append(Step(start_ns=call.start_ns - origin_ns, dur_ns=call.dur_ns))
        _add_ops(ops, call, number, origin_ns, origins, layer_flops)
    notes = ("ops are the nodes ONNX Runtime ran, timed by its own profiler in whole microseconds",)
    return Trace(device=device, steps=tuple(steps), ops=tuple(ops), notes=(*notes, *([profile.note] if profile.note else [])))


def _add_ops(ops: list[CpuOp], call: Call, step: int, origin_ns: int, origins: Origins, layer_flops: LayerFlops) -> None:
    parents: list[int | None] = []
    inside: list[tuple[int, int]] = []  # (end, place in call.nodes) of the nodes around
    children: dict[int, list[int]] = {}
    for at, run in enumerate(call.nodes):
        while inside and run.start_ns + run.dur_ns > inside[-1][0]:
            inside.pop()
        holder = inside[-1][1] if inside else None
        parents.append(holder)
        if holder is not None:
            children.setdefault(holder, []).append(at)
        if run.op in _CONTROL:  # no other node has nodes inside: two that share a microsecond are not nested
            inside.append((run.start_ns + run.dur_ns, at))
    base = len(ops)
    for at, bare in enumerate(call.nodes):
        run, origin, holder = origins.filled(bare), origins.of(bare.name), parents[at]
        spent = sum(call.nodes[child].dur_ns for child in children.get(at, ()))
        ops.append(
            CpuOp(
                index=base + at,
                name=f"onnx::{run.op}",
                start_ns=run.start_ns - origin_ns,
                dur_ns=run.dur_ns,
                self_ns=max(0, run.dur_ns - spent),
                num_children=len(children.get(at, ())),
                thread=THREAD,
                parent=base + holder if holder is not None else None,
                module=origin.module if origin.module is not None else UNKNOWN_MODULE,
                module_class=origin.module_class,
                step=step,
                shapes=tuple(shape for _, shape in run.inputs if shape),
                dtypes=_kineto(run),
                flops=flops_of(run, origin, layer_flops),
                bytes=bytes_of(run),
                line=origin.line,
            )
        )


def _kineto(run: NodeRun) -> tuple[str, ...]:
    """Kineto's names, that of the dtype computed in first: a reader takes the first it knows."""
    names = [run.dtype, *(name for name, _ in run.inputs)]
    return tuple(dict.fromkeys(_KINETO[name] for name in names if name in _KINETO))


def flops_of(run: NodeRun, origin: Origin, layer_flops: LayerFlops) -> float | None:
    """FLOPs of one run: from its shapes, else those of the nodes of the file that it stems from; None where neither is known."""
    if run.op in _CONTROL:
        return 0.0
    found = node_flops(run)
    if found is not None:
        return found
    known = [layer_flops[name][0] for name in origin.nodes if name in layer_flops]
    return math.fsum(f or 0.0 for f in known) if known and None not in known else None


def bytes_of(run: NodeRun) -> float:
    """Compulsory traffic: each input read once, each output written once; a gather reads what it returns."""
    if run.op in _FREE or run.op in _CONTROL:
        return 0.0
    read = [_bytes(*tensor) for tensor in run.inputs]
    written = math.fsum(_bytes(*tensor) for tensor in run.outputs)
    if run.op in ("Gather", "GatherElements", "GatherND", "Slice") and read:
        read[0] = min(read[0], written)
    return math.fsum(read) + written


def _bytes(dtype: str, shape: tuple[int, ...]) -> float:
    return float(math.prod(shape) * DTYPE_BYTES.get(dtype, 4))


# -- on a device ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernel:
    """A kernel (or memset) and when the host launched it."""

    name: str
    launched_ns: int
    """On CLOCK_REALTIME, as ONNX Runtime's profile is."""
    dur_ns: int


def kernels_of(chrome: Mapping[str, Any]) -> tuple[DeviceKernel, ...]:
    """`prof.export_chrome_trace`'s JSON -> its kernels and memsets, in the order of their launches. Kineto's times are microseconds from `baseTimeNanoseconds`."""
    base = int(chrome.get("baseTimeNanoseconds", 0))
    launched: dict[int, int] = {}
    ran: list[tuple[str, int, int]] = []
    for event in chrome.get("traceEvents", ()):
        category, number = event.get("cat"), event.get("args", {}).get("correlation")
        if event.get("ph") != "X" or not number:
            continue
        if category in ("cuda_runtime", "cuda_driver"):
            # One launch, two records: a runtime call that goes through the driver. The driver's, which is inside, comes with the kernel's number.
            launched[number] = base + round(float(event["ts"]) * 1000)
        elif category in ("kernel", "gpu_memset"):
            ran.append((str(event["name"]), number, round(float(event.get("dur", 0)) * 1000)))
    found = [DeviceKernel(name=name, launched_ns=launched[number], dur_ns=dur) for name, number, dur in ran if number in launched]
    return tuple(sorted(found, key=lambda k: k.launched_ns))


def launches_of(profile: Profile, kernels: tuple[DeviceKernel, ...], origins: Origins, layer_flops: LayerFlops) -> tuple[Launch, ...]:
    """What the last call's nodes launched, in order: a kernel each, so that a trace's kernels can be held against it one by one. The node's work is its longest kernel's.

    A kernel launched between two nodes (a copy of an input) belongs to none and is left out.
    """
    call = profile.calls[-1] if profile.calls else None
    if call is None:
        return ()
    nodes = [n for n in call.nodes if n.op not in _CONTROL]
    starts = [profile.began_ns + n.start_ns for n in nodes]
    held: dict[int, list[DeviceKernel]] = {}
    for kernel in kernels:
        at = bisect.bisect_right(starts, kernel.launched_ns) - 1
        if at >= 0 and kernel.launched_ns <= starts[at] + nodes[at].dur_ns + 999:  # both ends are cut to whole microseconds
            held.setdefault(at, []).append(kernel)
    return tuple(
        launch for at in sorted(held) for launch in _launches(origins.filled(nodes[at]), origins.of(nodes[at].name), held[at], layer_flops)
    )


def _launches(run: NodeRun, origin: Origin, kernels: list[DeviceKernel], layer_flops: LayerFlops) -> list[Launch]:
    main = max(range(len(kernels)), key=lambda i: kernels[i].dur_ns)
    return [
        Launch(
            name=run.name,
            kind="node",
            modules=origin.modules,
            home=origin.module,
            lines=origin.lines,
            ops=(f"onnx.{run.op}",),
            kernels=(kernel.name,),
            flops=flops_of(run, origin, layer_flops) if at == main else 0.0,
            bytes=bytes_of(run) if at == main else 0.0,
            dtype=run.dtype or None,
        )
        for at, kernel in enumerate(kernels)
    ]
