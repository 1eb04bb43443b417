"""One decoding step of 8 billion parameters for one sequence, and for 512."""

from __future__ import annotations

from builders import evidence

from gpuopt.core.result import Count, OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU406"
WEIGHTS = 8e9
GEMV = "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false, false, cublasGemvParamsEx<int> >"
NVJET = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN"


def seen(batch: int, time_ms: float, kernel: str) -> Evidence:
    flops, moved = 2.0 * WEIGHTS * batch, 2.0 * WEIGHTS + 5e6 * batch
    record = OpRecord(
        op="aten.mm", module="layers", dtype="bfloat16", count=225, time_ns=time_ms * 1e6, flops=flops, bytes=moved, kernels=(kernel,)
    )
    count = Count(
        records=(record,), flops=flops, flops_by_dtype={"bfloat16": flops}, bytes=moved, coverage=1.0, num_parameters=int(WEIGHTS)
    )
    return evidence(
        records=(record,), count=count, precision="bf16", backend="inductor", preset="reduce-overhead", batch=batch, wall_ms=time_ms * 1.02
    )


def bad() -> Evidence:
    return seen(1, 4.6, GEMV)


def clean() -> Evidence:
    return seen(512, 14.0, NVJET)


GAIN_MS = 4.6 / 2 - 0.3
"""Half of the bytes in int8, less what dequantising takes."""
