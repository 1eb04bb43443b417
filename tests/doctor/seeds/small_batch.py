"""BERT-large on one short text, and on 64."""

from __future__ import annotations

from dataclasses import replace

from builders import evidence

from gpuopt.core.result import Count, OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU405"
WEIGHTS = 302_000_000
NVJET = "nvjet_hsh_64x32_64x16_4x1_v_bz_splitK_TNT"


def seen(batch: int, time_us: float) -> Evidence:
    flops, moved = 2.0 * WEIGHTS * 128 * batch, 2.0 * WEIGHTS + 30e6 * batch
    record = OpRecord(
        op="aten.addmm", module="encoder", dtype="float16", count=144, time_ns=time_us * 1e3, flops=flops, bytes=moved, kernels=(NVJET,)
    )
    count = Count(records=(record,), flops=flops, flops_by_dtype={"float16": flops}, bytes=moved, coverage=1.0, num_parameters=WEIGHTS)
    return evidence(records=(record,), count=count, precision="fp16", batch=batch, wall_ms=time_us / 1e3 + 0.05)


CURVE = {1: 0.5, 2: 0.52, 4: 0.6}


def bad() -> Evidence:
    return replace(seen(1, 450), batch_curve=CURVE)


def clean() -> Evidence:
    return seen(64, 9000)


GAIN_MS = CURVE[1] - CURVE[4] / 4
