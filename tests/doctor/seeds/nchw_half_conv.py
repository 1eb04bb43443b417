"""fp16 convolutions in NCHW with cuDNN's layout kernels around them, and in NHWC. At 78% of 750 TFLOP/s NHWC takes 2 ms where NCHW takes 4."""

from __future__ import annotations

import torch
from builders import MS, evidence
from torch import nn

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU303"
FLOPS = 0.78 * 750e12 * 2e-3


def made(layout: torch.memory_format, time_ns: int, kernels: tuple[str, ...]) -> Evidence:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).half().eval()
    rows = tuple(
        OpRecord(
            op="aten.cudnn_convolution", module=name, dtype="float16", time_ns=time_ns / 2, flops=FLOPS / 2, bytes=1e8, kernels=kernels
        )
        for name in ("0", "2")
    )
    return evidence(module=model.to(memory_format=layout), records=rows, wall_ms=time_ns / MS)


def bad() -> Evidence:
    return made(
        torch.contiguous_format,
        4 * MS,
        ("void cudnn::ops::nchwToNhwcKernel<__half>", "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32"),
    )


def clean() -> Evidence:
    return made(torch.channels_last, 2 * MS, ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32",))


GAIN_MS = 4 - 2
