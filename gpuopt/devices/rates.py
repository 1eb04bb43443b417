"""A call -> seconds it takes once the machine is warm: CUDA events on a GPU, the performance counter elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

BLOCK_S = 0.015
"""Calls are timed in blocks this long: two events cost microseconds, and queued calls hide the launches."""
REST_S = 0.03
"""Between blocks on a GPU. Large products without a pause run into the power limit within a second (an H200 fell from 764 to 656 TFLOP/s in fp16 that way);
a model's products have other kernels between them and do not, so they would pass a ceiling that was taken without one."""
MAX_BLOCKS = 12
WARM_CALLS = 3
"""At the start of each block, not timed."""


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
    num_blocks = min(MAX_BLOCKS, max(3, int(budget_s / (rough * size))))
    times: list[float] = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(num_blocks):
        for _ in range(WARM_CALLS):
            call()
        start.record()
        for _ in range(size):
            call()
        end.record()
        torch.cuda.synchronize(device_id)
        times.append(start.elapsed_time(end) / 1e3 / size)
        time.sleep(REST_S)
    return times


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
