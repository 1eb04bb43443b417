"""A runner and its call -> the profile: a trace in a run of its own, set against the untraced wall time, the count and the ceilings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpuopt.core.errors import Unavailable
from gpuopt.core.launches import Launch
from gpuopt.core.live import Inputs, Runner
from gpuopt.core.result import Count, Device
from gpuopt.core.trace import Trace
from gpuopt.pipeline import diagnosis, facts, figures
from gpuopt.pipeline.facts import ProgressCall
from gpuopt.profiling import attribute, bounds, count, filling, roofline, trace, useful, waterfall, waves


def profile(
    runner: Runner,
    call: Callable[[], Any],
    *,
    where: str,
    given: Inputs,
    source: Any,
    has_modules: bool,
    counted: Count,
    device: Device,
    wall_ms: float,
    depth: int,
    seen: diagnosis.Seen,
    progress: ProgressCall,
) -> facts.Profiled:
    """Trace `call` and hold it against `wall_ms`, its time without a tracer. What the doctor reads goes into `seen` as it is found.

    Parameters
    ----------
    where: the device it runs on; `device` describes it, with the ceilings. given: the inputs of `call`.
    source: the nn.Module behind the runner, None where there is none. has_modules: whether the call runs that module's own forwards.
    depth: levels of the module tree that are kept.

    Raises
    ------
    ImpossibleFigure for a figure that cannot be; Unavailable where the device shows nothing to a profiler.
    """
    progress(None, "tracing")
    own = getattr(runner, "trace", None) if where == "cpu" else None  # what torch.profiler cannot see there, a runner may tell itself
    traced = own() if own is not None else trace.record(call, where, with_modules=source if has_modules else None)
    told: Callable[[], tuple[Launch, ...]] | None = getattr(runner, "launches", None)
    twin, notes = _twin(runner, where, progress)
    records = attribute.attribute(traced, counted, launches=told() if told is not None else (), twin=twin)
    timed_ns = sum(r.time_ns or 0.0 for r in records)
    placed_ns = sum(r.time_ns or 0.0 for r in records if r.module != "?")
    seen.trace, seen.records, seen.wall_ms = traced, records, wall_ms
    parameters = count.module_parameters(source) if source is not None else None
    classes = count.module_classes(source) if source is not None else None
    seen.waterfall = waterfall.build(traced, wall_ms, device.ceilings, records)
    points = roofline.points(records, device.ceilings, cache_bytes=device.cache_bytes, slack=figures.slack(device))
    lost = waves.losses(traced, records, num_sms=device.num_sms, capability=device.capability)
    outside = None
    if source is not None:
        outside = bounds.external(source, given, call(), counted)
    return facts.Profiled(
        waterfall=seen.waterfall,
        roofline=waves.annotate(points, records, lost),
        bounds=bounds.build(counted, device.ceilings, outside),
        useful=useful.of_call(counted, source, given),
        unfilled=filling.unfilled(traced, device.num_sms),
        modules=tuple(
            row
            for row in attribute.modules(records, counted, wall_ms, ceilings=device.ceilings, parameters=parameters, classes=classes)
            if row.depth <= depth
        ),
        coverage=attribute.coverage(records),
        attributed=placed_ns / timed_ns if timed_ns else None,
        notes=notes,
    )


def _twin(runner: Runner, where: str, progress: ProgressCall) -> tuple[Trace | None, tuple[str, ...]]:
    """The call a CUDA graph was recorded from, traced with its modules; None for what is no graph of a module. And what there is to say about it."""
    found = getattr(runner, "ungraphed", lambda: None)()
    if found is None:
        return None, ()
    progress(None, "tracing without the CUDA graph")
    try:
        return trace.record(found[1], where, steps=1, warmup=1, with_modules=found[0]), ()
    except torch.OutOfMemoryError:
        return None, ("no memory to run the model beside its CUDA graph: the graph's kernels belong to no module",)
    except Unavailable as error:
        return None, (f"the model beside its CUDA graph could not be traced ({error.message}): the graph's kernels belong to no module",)
