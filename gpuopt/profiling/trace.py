"""A call -> Trace, by torch.profiler, in a run of its own: nothing traced is ever timed, nothing timed is ever traced.

Module ranges and shapes cost host time: with them the host side of BERT-large takes twice as long, and a device that never waited for it seems to. So times come from a light run
without them, and what ran where, with which shapes, from a second one whose ops are the same.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from gpuopt.core.errors import Unavailable
from gpuopt.core.trace import CpuOp, Trace
from gpuopt.profiling.count import module_events
from gpuopt.profiling.events import MODULE, STEP, from_chrome

__all__ = ["Trace", "grafted", "record"]


def record(call: Callable[[], Any], device: str, *, steps: int = 3, warmup: int = 2, with_modules: nn.Module | None = None) -> Trace:
    """Trace `steps` runs of `call`, synchronised after each.

    Parameters
    ----------
    call: runs the model once. device: `cpu` or `cuda[:n]`, where it runs.
    warmup: runs before the profiler starts; one more runs inside it, unrecorded, because the first traced launch pays for setting up CUPTI.
    with_modules: mark the forward of each of its submodules. Leave it out for compiled runners: hooks would not run, or would break the graph.

    Raises
    ------
    Unavailable: in one of the runs nothing at all was recorded on a device that ran (CUPTI missing, or taken by another profiler).
    """
    is_cuda = device.startswith("cuda")
    # On a CPU the ops are the work, and their own times hold no ranges. Compiled code and graph replays have few ops to slow down, and no ranges at all.
    light = (
        _run(call, device, steps=steps, warmup=warmup, with_modules=None, with_shapes=False)
        if is_cuda and with_modules is not None
        else None
    )
    full = _run(call, device, steps=steps, warmup=1 if light is not None else warmup, with_modules=with_modules, with_shapes=True)
    if is_cuda and not all(found.on_device for found in (full, light) if found is not None):
        raise Unavailable(
            "the profiler recorded no kernel on a CUDA device",
            fix="stop other profilers (nsys, ncu, DCGM profiling), or check that libcupti of this torch build loads",
        )
    return grafted(light, full) if light is not None else full


def grafted(light: Trace, full: Trace) -> Trace:
    """The times of `light` with the modules and shapes of `full`, op by op. `full` alone, with a note, where the two runs did not dispatch the same ops in the same order."""
    pairs: list[tuple[list[CpuOp], list[CpuOp]]] = []
    for step in range(len(light.steps)):
        ours, theirs = _ordered(light, step), _ordered(full, step)
        if [o.name for o in ours] != [o.name for o in theirs]:
            note = "the traced calls did not dispatch the same ops twice: idle times are those of a run with module ranges, which stretch the host"
            return replace(full, notes=(*full.notes, note))
        pairs.append((ours, theirs))
    ops = list(light.ops)
    for ours, theirs in pairs:
        for mine, other in zip(ours, theirs, strict=True):
            ops[mine.index] = replace(mine, module=other.module, module_class=other.module_class, shapes=other.shapes, dtypes=other.dtypes)
    return replace(light, ops=tuple(ops))


def _ordered(trace: Trace, step: int) -> list[CpuOp]:
    """Ops of a step by thread, the busiest first, in the order they began: thread ids differ from run to run."""
    threads: dict[str, list[CpuOp]] = {}
    for op in trace.ops:
        if op.step == step:
            threads.setdefault(op.thread, []).append(op)
    return [op for ops in sorted(threads.values(), key=lambda ops: (-len(ops), ops[0].name)) for op in sorted(ops, key=lambda o: o.index)]


def _run(call: Callable[[], Any], device: str, *, steps: int, warmup: int, with_modules: nn.Module | None, with_shapes: bool) -> Trace:
    is_cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    synchronize: Callable[[], object] = (lambda: torch.cuda.synchronize(device)) if is_cuda else (lambda: None)
    for _ in range(warmup):
        call()
    synchronize()
    with _marked(with_modules), profile(activities=activities, record_shapes=with_shapes) as profiler:
        call()
        synchronize()
        for _ in range(steps):
            with record_function(STEP):
                call()
                synchronize()
    with tempfile.TemporaryDirectory(prefix="gpuopt-trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        # Names come from user code and drivers: Kineto does not promise that they are clean UTF-8 without control characters.
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    return from_chrome(data, device=device)


@contextmanager
def _marked(module: nn.Module | None) -> Iterator[None]:
    """A range `module::<qualified name>|<class>` around every forward."""
    if module is None:
        yield
        return
    open_ranges: list[tuple[str, Any]] = []

    def enter(name: str, child: nn.Module) -> None:
        mark = record_function(f"{MODULE}{name}|{type(child).__name__}")
        mark.__enter__()
        open_ranges.append((name, mark))

    def leave(name: str, child: nn.Module) -> None:
        while open_ranges:
            opened, mark = open_ranges.pop()
            mark.__exit__(None, None, None)
            if opened == name:
                break

    with module_events(module, enter, leave):
        yield
