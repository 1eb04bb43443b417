"""A runner and its inputs -> the call that is timed; and what is read off it besides its times: memory, energy, throttling."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpuopt.accuracy import compare
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs, Runner
from gpuopt.core.result import Samples
from gpuopt.core.spec import BenchSpec
from gpuopt.devices import info
from gpuopt.pipeline import facts
from gpuopt.profiling import memory
from gpuopt.programs import feeding
from gpuopt.timing import clocks


def timed(runner: Runner, given: Inputs, *, mode: str, device: str) -> Callable[[], Any]:
    """The runner alone (`device`); with its inputs copied in and its outputs copied out (`host`); or so that the next call's inputs are copied meanwhile, from locked memory
    (`overlapped`), each call taking the longer of the two. Raises UsageError for another mode."""
    if mode == "device" or (mode == "overlapped" and torch.device(device).type == "cpu"):
        args, kwargs = given.args, dict(given.kwargs)
        return lambda: runner(*args, **kwargs)
    held = given.map(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t)
    if mode == "overlapped":
        return _overlapped(runner, held, device)
    if mode != "host":
        raise UsageError(f"input mode {mode!r} is not known", fix="--input-mode device|host|overlapped")

    def with_copies() -> Any:
        moved = held.map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t)
        return move(runner(*moved.args, **moved.kwargs), "cpu")

    return with_copies


def _overlapped(runner: Runner, held: Inputs, device: str, cuda: Any = torch.cuda) -> Callable[[], Any]:
    """What a service reaches that feeds the device as `gpuopt.feed` does: batches lie in locked memory, as a loader that pins them leaves them."""
    here = held.map(lambda t: feeding.locked(t).copy_(t) if isinstance(t, torch.Tensor) else t)
    batches = feeding.Feed(itertools.repeat((here.args, dict(here.kwargs))), torch.device(device), cuda=cuda)
    results: dict[int, torch.Tensor] = {}

    def out(number: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if number not in results or (results[number].shape, results[number].dtype) != (value.shape, value.dtype):
            results[number] = feeding.locked(value)
        return results[number].copy_(value, non_blocking=True)

    def while_the_next_is_copied() -> Any:
        args, kwargs = next(batches)
        found = [out(number, value) for number, (_, value) in enumerate(compare.flatten(runner(*args, **kwargs)))]
        # The next batch began to be copied before this one was computed with: a call ends when both have, so that no copy is timed nowhere.
        batches.join()
        return found

    return while_the_next_is_copied


def metered(
    call: Callable[[], Any],
    clock: clocks.Clock,
    device: str,
    *,
    samples: Samples,
    spec: BenchSpec,
    throttled_ms: Mapping[str, float],
    batch: int,
) -> facts.Measured:
    """`samples` with peak memory, and energy where the device counts it: a run of its own of `spec.energy_s` seconds. `batch`: samples in a call."""
    joules = info.energy_counter(device)
    energy, power = None, None
    start = joules() if spec.energy_s > 0 else None
    if start is not None:
        began, calls = time.monotonic(), 0
        while time.monotonic() - began < spec.energy_s:
            # In batches: a synchronisation after each call would let the device idle between them.
            clock.time_calls(call, 3)
            calls += 3
        seconds, end = time.monotonic() - began, joules()
        if end is not None and end > start:
            energy, power = (end - start) / (calls * batch), (end - start) / seconds
    peak_bytes = memory.peak(call, device)
    return facts.Measured(
        samples=samples,
        peak_bytes=peak_bytes,
        energy_j_per_sample=energy,
        mean_power_w=power,
        throttled_ms=dict(throttled_ms),
    )


def move(value: Any, device: str) -> Any:
    """Every tensor of an output nesting, copied to `device`; the nesting becomes plain tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [v.to(device) if isinstance(v, torch.Tensor) else v for _, v in compare.flatten(value)]


def lost(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by reason between two readings of the throttle counters."""
    return {reason: value - before.get(reason, 0.0) for reason, value in after.items() if value > before.get(reason, 0.0)}
