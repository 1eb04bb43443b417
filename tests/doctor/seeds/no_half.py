"""TF32 products and memory-bound ops, and the same in fp16: half the time for both by the ceilings of the builders."""

from __future__ import annotations

from builders import MS, evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU203"
FLOPS, BYTES = 4e12, 16e9


def made(dtype: str, rate: float, num_bytes: float, kernel: str) -> Evidence:
    product_ns, add_ns = FLOPS / (0.9 * rate) * 1e9, num_bytes / (0.9 * 4e12) * 1e9
    rows = (
        OpRecord(op="aten.addmm", module="fc", dtype=dtype, count=10, time_ns=product_ns, flops=FLOPS, bytes=5e8, kernels=(kernel,)),
        OpRecord(op="aten.add", module="", dtype="float16" if dtype == "float16" else "float32", count=10, time_ns=add_ns, flops=0.0, bytes=num_bytes),
    )  # fmt: skip
    return evidence(records=rows, wall_ms=(product_ns + add_ns) / MS + 0.5)


def bad() -> Evidence:
    return made("tf32", 400e12, BYTES, "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n")


def clean() -> Evidence:
    return made("float16", 750e12, BYTES / 2, "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n")


GAIN_MS = (FLOPS * (1 / 400e12 - 1 / 750e12) + BYTES / 2 / 4e12) / 0.9 * 1e3
