"""A large fp32 product with TF32 off and on. 2 TFLOP at 90% of 50 TFLOP/s, against 90% of 400."""

from __future__ import annotations

from builders import MS, evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU202"
FLOPS = 2e12


def made(dtype: str, rate: float, *, is_on: bool) -> Evidence:
    time_ns = FLOPS / (0.9 * rate) * 1e9
    row = OpRecord(
        op="aten.addmm", module="fc", dtype=dtype, count=10, time_ns=time_ns, flops=FLOPS, bytes=5e8, shapes="8192, 8192x4096, 4096x8192",
        kernels=("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n" if is_on else "ampere_sgemm_128x64_tn",),
    )  # fmt: skip
    flags = {"matmul_tf32": is_on, "cudnn_tf32": is_on, "cudnn_benchmark": True, "grad_enabled": False}
    return evidence(records=(row,), wall_ms=time_ns / MS + 1.0, flags=flags)


def bad() -> Evidence:
    return made("float32", 50e12, is_on=False)


def clean() -> Evidence:
    """In fp16: with TF32 on alone, half precision (GPU203) would still have something to say."""
    return made("float16", 750e12, is_on=True)


GAIN_MS = FLOPS / 0.9 * (1 / 50e12 - 1 / 400e12) * 1e3
"""At the same share of either ceiling."""
