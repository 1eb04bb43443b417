"""Large products timed in blocks like a candidate's: the ceiling under the load of a bench.

A ceiling measured alone, in bursts with rests, is what nothing may pass. A card at its power limit cannot keep that up: an H200 falls by a fifth. Blocks of products between
the candidates' own blocks meet the same heat, clocks and power, so they say what the card had to give while it was busy with them.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from gpuopt.core.result import CEILING_OF_DTYPE, Ceiling, Count, Device, Samples
from gpuopt.core.spec import BenchSpec
from gpuopt.profiling.roofline import RARE

if TYPE_CHECKING:
    from gpuopt.devices import workloads

QUANTITIES = ("fp16", "bf16", "tf32", "fp32", "fp64")
"""What products are timed in; others (fp8, int8) have no sustained ceiling, and no percentage of it."""
LONGEST_BLOCK_MS = 500.0
MIN_CALLS = 3


class Anchor:
    """Products by quantity, made on first use and kept: the blocks of a bench come back to them."""

    def __init__(self) -> None:
        self._works: dict[str, tuple[workloads.Work, workloads.Shape]] = {}

    def block(self, quantity: str, device: Device, spec: BenchSpec) -> tuple[Samples, float, str]:
        """One block of products -> (samples, FLOPs a call, how). Raises OutOfMemory where the model leaves no room for them."""
        # Only where products run: the command's own process reads this file for its figures, and would wait two seconds for torch to be imported.
        import torch

        from gpuopt.devices import ceilings, workloads
        from gpuopt.timing import clocks, loop

        if quantity not in self._works:
            self._works[quantity] = ceilings.product(quantity, device)
        work, (m, n, k) = self._works[quantity]
        with torch.inference_mode(), workloads.tf32(quantity == "tf32"):
            samples = loop.block(work.call, clocks.for_device(device.id), spec)
        return samples, work.amount, f"GEMM {m}x{n}x{k}, random data"

    def close(self) -> None:
        """Give the memory back."""
        self._works.clear()


def wanted(counts: list[Count | None], device: Device, mode: str) -> tuple[str, ...]:
    """Quantities that any of these forwards spends more than a rare part of its FLOPs in; none where it is off, or automatic on anything but a GPU."""
    if mode == "off" or (mode == "auto" and device.kind != "cuda"):
        return ()
    found = dict.fromkeys(
        CEILING_OF_DTYPE.get(dtype, dtype)
        for count in counts
        if count is not None
        for dtype, flops in count.flops_by_dtype.items()
        if flops >= RARE * count.flops > 0
    )
    return tuple(q for q in found if q in QUANTITIES)


def block_spec(spec: BenchSpec, call_ms: float) -> BenchSpec:
    """Blocks as long as those of a candidate whose call takes `call_ms`, so that both are as hot at their end."""
    length = max(spec.block_ms, spec.min_iterations * call_ms)
    return BenchSpec(block_ms=min(LONGEST_BLOCK_MS, length), min_iterations=MIN_CALLS, timeout_s=spec.timeout_s)


def ceiling(quantity: str, samples: Samples, flops: float, how: str) -> Ceiling:
    """The median call of all blocks."""
    seconds = median(samples.samples_ns) / 1e9
    return Ceiling(
        quantity=quantity,
        value=flops / seconds,
        unit="FLOP/s",
        kind="sustained",
        source=f"{how}, median of {len(samples.block_sizes)} blocks between those of the runs",
    )
