"""A print in forward() that leaves the GPU idle between two compiled regions, and the same in one region."""

from __future__ import annotations

from builders import MS, US, Tape, evidence

from gpuopt.doctor.evidence import Compiled, Evidence

CODE = "GPU501"
IDLE_NS = 2 * MS


def step(*, broken: bool) -> Tape:
    tape = Tape()
    region = tape.op("Torch-Compiled Region: 0/0")
    tape.kernel("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 5 * MS, op=region)
    if broken:
        region = tape.op("Torch-Compiled Region: 1/0")
    tape.kernel("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 5 * MS, op=region, gap_ns=IDLE_NS if broken else 2 * US)
    return tape


def bad() -> Evidence:
    breaks = (("Dynamo does not know how to trace builtin operator `print`\n  Explanation: …", "model.py:31", 1),)
    return evidence(step(broken=True), backend="inductor", preset="max-autotune", compiled=Compiled(graph_breaks=breaks, num_graphs=2))


def clean() -> Evidence:
    return evidence(step(broken=False), backend="inductor", preset="max-autotune", compiled=Compiled(num_graphs=1))


GAIN_MS = IDLE_NS / MS
