"""A vocabulary of 30522 (2 over a multiple of 8) at 30% of the ceiling where other products reach 80%, and one of 30528."""

from __future__ import annotations

import torch
from builders import MS, evidence
from torch import nn

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU401"
TOKENS, WIDTH = 32768, 1024


def made(vocabulary: int, share: float) -> Evidence:
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(WIDTH, 4096, device="meta"),
            "stem": nn.Conv2d(3, 64, 7, device="meta"),
            "head": nn.Linear(WIDTH, vocabulary, device="meta"),
        }
    )
    model = model.half().eval()
    model["stem"].weight.data = model["stem"].weight.data.contiguous(memory_format=torch.channels_last)

    def row(name: str, flops: float, reached: float) -> OpRecord:
        return OpRecord(
            op="aten.addmm", module=name, dtype="float16", time_ns=flops / (reached * 750e12) * 1e9, flops=flops, bytes=flops / 1e3,
            kernels=("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n",),
        )  # fmt: skip

    rows = (row("fc", 2.0 * TOKENS * WIDTH * 4096 * 20, 0.8), row("head", 2.0 * TOKENS * WIDTH * vocabulary, share))
    return evidence(module=model, records=rows, wall_ms=sum(r.time_ns or 0.0 for r in rows) / MS)


def bad() -> Evidence:
    return made(30522, 0.3)


def clean() -> Evidence:
    return made(30528, 0.8)


GAIN_MS = 2.0 * TOKENS * WIDTH / 750e12 * (30522 / 0.3 - 30528 / 0.8) * 1e3
