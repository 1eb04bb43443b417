"""Big bf16 products at half of their ceiling under Inductor's default, and at 90% of it."""

from __future__ import annotations

from builders import MS, Tape, evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU504"
M, N, K = 8192, 4096, 4096
FLOPS = 2.0 * M * N * K
COUNT = 20
FLOOR_NS = FLOPS / 790e12 * 1e9
KERNEL = "nvjet_tst_128x256_64x4_2x1_v_bz_TNT"


def compiled(share: float) -> Evidence:
    each_ns = round(FLOOR_NS / share)
    tape = Tape()
    region = tape.op("Torch-Compiled Region: 0/0")
    for _ in range(COUNT):
        tape.kernel(KERNEL, each_ns, op=region)
    record = OpRecord(
        op="aten.mm", module="layers.0.mlp", dtype="bfloat16", count=COUNT, time_ns=float(each_ns * COUNT), flops=FLOPS * COUNT,
        bytes=2.0 * (M * K + K * N + M * N) * COUNT, kernels=(KERNEL,), module_class="Linear", shapes=f"[{M},{K}] [{K},{N}]",
    )  # fmt: skip
    return evidence(tape, backend="inductor", preset="default", precision="bf16", records=(record,), batch=64)


def bad() -> Evidence:
    return compiled(0.5)


def clean() -> Evidence:
    return compiled(0.9)


GAIN_MS = COUNT * FLOOR_NS * (1 / 0.5 - 1 / 0.78) / MS
"""A tuned kernel at 78% of the ceiling."""
