"""Rows of 64, 128, 192 and 256 tokens padded to 256, a batch of nearly even rows, and a mask with holes, which is no padding."""

from __future__ import annotations

import torch
from builders import MS, evidence

from gpuopt.core.live import Inputs
from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU313"


def made(lengths: tuple[int, ...], **more: torch.Tensor) -> Evidence:
    mask = (torch.arange(256)[None] < torch.tensor(lengths)[:, None]).long()
    rows = (
        OpRecord(op="aten.addmm", module="fc", dtype="float16", time_ns=8 * MS, flops=5.4e12, bytes=1e9),
        OpRecord(op="aten._scaled_dot_product_flash_attention", module="att", dtype="float16", time_ns=1 * MS, flops=3.5e11, bytes=1e8),
    )
    return evidence(
        inputs=Inputs(kwargs={"input_ids": torch.ones(4, 256, dtype=torch.long), "attention_mask": mask, **more}), records=rows, wall_ms=9.2
    )


def bad() -> Evidence:
    return made((64, 128, 192, 256))


def clean() -> Evidence:
    holes = torch.ones(4, 256, dtype=torch.long)
    holes[:, ::2] = 0
    return made((250, 240, 256, 230), encoder_attention_mask=holes)


GAIN_MS = 8 * (1 - 640 / 1024)
