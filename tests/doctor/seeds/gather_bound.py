"""Rows of a large table looked up at random, and at half of the memory's speed."""

from __future__ import annotations

from builders import evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU407"
GATHER = "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::Half, long, unsigned int, 2, 2, -2, true>(at::cuda::detail::TensorInfo<c10::Half, unsigned int>)"
NVJET = "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"


def seen(time_us: float) -> Evidence:
    lookup = OpRecord(
        op="aten.embedding", module="tables.0", dtype="float16", count=1, time_ns=time_us * 1e3, flops=0.0, bytes=4e8, kernels=(GATHER,)
    )
    dense = OpRecord(op="aten.addmm", module="top", dtype="float16", count=1, time_ns=2e6, flops=1e12, bytes=1e8, kernels=(NVJET,))
    return evidence(records=(dense, lookup), wall_ms=2.05 + time_us / 1e3)


def bad() -> Evidence:
    return seen(1200)


def clean() -> Evidence:
    return seen(200)


GAIN_MS = 1.2 - 0.2
