"""A call -> seconds it takes once the machine is warm: CUDA events on a GPU, the performance counter elsewhere."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

BLOCK_S = 0.015
"""Calls are timed in blocks this long: two events cost microseconds, and queued calls hide the launches."""


def seconds_a_call(call: Callable[[], object], device_id: str, budget_s: float) -> float:
    """On a GPU the median block: boost makes rare fast ones that nothing else will see. On a CPU the fastest: what disturbs it only ever slows it down."""
    if device_id.startswith("cuda"):
        return statistics.median(_by_events(call, device_id, budget_s))
    return min(_by_counter(call, budget_s))


def wall_seconds_a_call(call: Callable[[], object], device_id: str, budget_s: float) -> float:
    """The median by the host's clock, waiting for the GPU after each block: for copies that hold the host up, which events do not see."""

    def waited() -> None:
        call()
        torch.cuda.synchronize(device_id)

    return statistics.median(_by_counter(waited, budget_s))


def once(call: Callable[[], object], device_id: str) -> float:
    """A first rough figure, after one call that is not counted."""
    call()
    if not device_id.startswith("cuda"):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device_id)
    return float(start.elapsed_time(end)) / 1e3


def _by_events(call: Callable[[], object], device_id: str, budget_s: float) -> list[float]:
    rough = max(once(call, device_id), 1e-6)
    size = max(1, math.ceil(BLOCK_S / rough))
    num_blocks = max(3, int(budget_s / (rough * size)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_blocks + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(size):
            call()
        mark.record()
    torch.cuda.synchronize(device_id)
    return [before.elapsed_time(after) / 1e3 / size for before, after in itertools.pairwise(marks)]


def _by_counter(call: Callable[[], object], budget_s: float) -> list[float]:
    call()
    began = time.perf_counter()
    call()
    rough = max(time.perf_counter() - began, 1e-7)
    size = max(1, math.ceil(BLOCK_S / rough))
    blocks: list[float] = []
    ends = time.perf_counter() + budget_s
    while len(blocks) < 3 or time.perf_counter() < ends:
        began = time.perf_counter()
        for _ in range(size):
            call()
        blocks.append((time.perf_counter() - began) / size)
    return blocks
