"""A half-precision convolution of three channels in a kernel without tensor cores, and one of eight with them."""

from __future__ import annotations

from builders import evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU208"
PLAIN = (
    "void implicit_convolve_sgemm<__half, __half, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int, __half const*, int, __half*)"
)
TENSOR = "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn"


def record(kernel: str, time_us: float) -> OpRecord:
    return OpRecord(
        op="aten.conv2d",
        module="stem",
        dtype="float16",
        count=1,
        time_ns=time_us * 1e3,
        flops=3e10,
        bytes=2e8,
        kernels=(kernel,),
        module_class="Conv2d",
    )


def bad() -> Evidence:
    return evidence(records=(record(PLAIN, 2000),), wall_ms=2.05)


def clean() -> Evidence:
    return evidence(records=(record(TENSOR, 90),), wall_ms=0.1)


GAIN_MS = 2.0 - 0.09
