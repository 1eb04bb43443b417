"""A call -> Trace, by torch.profiler, in a run of its own: nothing traced is ever timed, nothing timed is ever traced."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from gpuopt.core.errors import Unavailable
from gpuopt.core.trace import Trace
from gpuopt.profiling.count import module_events
from gpuopt.profiling.events import MODULE, STEP, from_chrome

__all__ = ["Trace", "record"]


def record(call: Callable[[], Any], device: str, *, steps: int = 3, warmup: int = 2, with_modules: nn.Module | None = None) -> Trace:
    """Trace `steps` runs of `call`, synchronised after each.

    Parameters
    ----------
    call: runs the model once. device: `cpu` or `cuda[:n]`, where it runs.
    warmup: runs before the profiler starts; one more runs inside it, unrecorded, because the first traced launch pays for setting up CUPTI.
    with_modules: mark the forward of each of its submodules. Costs host time (three times the host side of a small model), so its durations are shares, not latencies.
        Leave it out for compiled runners: hooks would not run, or would break the graph.

    Raises
    ------
    Unavailable: nothing at all was recorded on a device that ran (CUPTI missing, or taken by another profiler).
    """
    is_cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    synchronize: Callable[[], object] = (lambda: torch.cuda.synchronize(device)) if is_cuda else (lambda: None)
    for _ in range(warmup):
        call()
    synchronize()
    with _marked(with_modules), profile(activities=activities, record_shapes=True) as profiler:
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
    trace = from_chrome(data, device=device)
    if is_cuda and not trace.on_device:
        raise Unavailable(
            "the profiler recorded no kernel on a CUDA device",
            fix="stop other profilers (nsys, ncu, DCGM profiling), or check that libcupti of this torch build loads",
        )
    return trace


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
