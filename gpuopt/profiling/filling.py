"""A trace -> how much of the multiprocessors' time is without a block to run: what kernels running side by side could still have."""

from __future__ import annotations

import math

from gpuopt.core.trace import Trace


def unfilled(trace: Trace, num_sms: int | None) -> float | None:
    """0..1 of the time of kernels times multiprocessors, as if each held one block at a time; None where the trace names no grids.

    A grid of 200 blocks on 132 multiprocessors runs in two waves and leaves 64 places of 264 empty; one of 66 leaves half. It is an upper bound: blocks that share a
    multiprocessor share its units, and kernels of one chain wait for each other.
    """
    lost = total = 0.0
    for kernel in trace.kernels:
        if kernel.step is None or kernel.grid is None or kernel.is_memset or not num_sms:
            continue
        blocks = max(1, math.prod(kernel.grid))
        total += kernel.dur_ns
        lost += kernel.dur_ns * (1 - blocks / (num_sms * math.ceil(blocks / num_sms)))
    return lost / total if total else None
