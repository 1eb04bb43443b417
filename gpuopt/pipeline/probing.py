"""A session's model at other sizes -> what the doctor alone asks: how long larger batches take, and what torch.compile compiles again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from gpuopt.core.live import Inputs
from gpuopt.core.result import Device
from gpuopt.core.spec import BenchSpec
from gpuopt.timing import loop
from gpuopt.timing.clocks import Clock

FACTORS = (2, 4)
"""Batches tried, in multiples of the one asked for: whether throughput still rises shows in the first doubling, by how much in the second."""
CURVE_S = 3.0
"""All of them together, at most."""
POINT = BenchSpec(
    min_time_s=0.1, max_time_s=0.5, min_iterations=5, warmup_s=0.05, max_warmup_s=0.3, block_ms=20.0, energy_s=0.0, target_noise=0.02
)
MIN_CALLS = 8
"""A batch is tried where so many calls of it fit the time: warm-up and samples."""
MEMORY = 0.5
"""Of the device's: a larger batch that might need more is not tried. A doctor does not run out of memory on the patient's behalf."""

OtherBatch = Callable[[int], Callable[[], Any]]
"""Batch -> the timed call at that batch."""


def curve(
    call: OtherBatch, clock: Clock, *, batch: int, wall_ms: float, peak_bytes: int | None, device: Device, largest: int | None = None
) -> dict[int, float]:
    """Batch -> milliseconds a call: the one asked for and up to `FACTORS` of it. Empty where nothing larger can be tried: calls too long, memory too small, somebody else
    on the device.

    `largest`: what the program was built for. Timed like any bench, without a profiler.
    """
    if wall_ms <= 0 or device.other_processes:
        return {}
    found: dict[int, float] = {}
    left_s = CURVE_S
    for factor in FACTORS:
        size = batch * factor
        if largest is not None and size > largest:
            break
        if wall_ms / 1e3 * factor * MIN_CALLS > left_s:
            break
        if device.memory_bytes and (peak_bytes or 0) * factor > MEMORY * device.memory_bytes:
            break
        spec = replace(POINT, max_time_s=min(POINT.max_time_s, left_s))
        try:
            samples = loop.measure(call(size), clock, spec)
        except Exception:  # noqa: BLE001 - a batch the model was never made for may raise anything: then there is no point there
            break
        found[size] = median(samples.samples_ns) / 1e6
        left_s -= sum((*samples.warmup_ns, *samples.samples_ns)) / 1e9
    return {batch: wall_ms, **found} if found else {}


def sizes(dims: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> Iterator[list[dict[str, int]]]:
    """For each free dimension its usual size and three others, the rest as they are: within its range where one was given; else a batch a little larger, and anything
    else smaller, because positions and images end somewhere. Size 1 is left out: torch.compile makes a graph of its own for it."""
    for name, usual in dims.items():
        low, high = ranges.get(name, (2, usual + 3) if name == "N" else (2, usual))
        upward, downward = range(usual + 1, high + 1), range(usual - 1, max(2, low) - 1, -1)
        others = [*upward, *downward] if name == "N" else [*downward, *upward]
        if len(others) >= 3:
            yield [{**dims, name: size} for size in (usual, *others[:3])]


def calls(
    found: Iterator[list[dict[str, int]]], inputs: Callable[[dict[str, int]], Inputs]
) -> Iterator[list[Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """What `breaks.probe` takes: inputs are made when their turn comes."""

    def bound(dims: dict[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = inputs(dims)
        return given.args, dict(given.kwargs)

    for group in found:
        yield [(lambda dims=dims: bound(dims)) for dims in group]  # type: ignore[misc]


def settle(call: Callable[[], Any], device: str) -> None:
    """After larger batches: caches and peaks are the asked batch's own again before anybody reads them."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        for _ in range(2):
            call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
