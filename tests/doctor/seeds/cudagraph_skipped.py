"""CUDA graphs skipped for an input that forward() writes into, and replayed."""

from __future__ import annotations

from builders import MS, US, Tape, evidence

from gpuopt.core.result import Waterfall, WaterfallPart
from gpuopt.doctor.evidence import Compiled, Evidence

CODE = "GPU503"
GAP_NS = 300 * US
NUM = 10


def step(gap_ns: int) -> Tape:
    tape = Tape()
    region = tape.op("Torch-Compiled Region: 0/0")
    for _ in range(NUM):
        tape.kernel("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 1 * MS, gap_ns=gap_ns, op=region)
    return tape


def bad() -> Evidence:
    skips = (
        "skipping cudagraphs due to mutated inputs (1 instances). Found from : \n   File 'model.py', line 12, in forward\n    x += 1\n",
    )
    gaps = Waterfall(
        wall_ms=NUM * 1.3,
        parts=(WaterfallPart(name="launch gaps", ms=NUM * 0.3), WaterfallPart(name="compute-bound", ms=float(NUM))),
        unaccounted_ms=0.0,
    )
    return evidence(
        step(GAP_NS), backend="inductor", preset="reduce-overhead", compiled=Compiled(cudagraph_skips=skips, num_graphs=1), waterfall=gaps
    )


def clean() -> Evidence:
    return evidence(step(0), backend="inductor", preset="reduce-overhead", compiled=Compiled(num_graphs=1))


GAIN_MS = NUM * 0.25
"""A graph leaves some 50 us between these kernels."""
