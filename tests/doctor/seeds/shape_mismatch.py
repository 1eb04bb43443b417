"""Images with the channels last, and the same with the channels first."""

from __future__ import annotations

import torch
from broken import Images, failing, working

from gpuopt.doctor.evidence import Evidence

CODE = "GPU703"


def bad() -> Evidence:
    return failing(Images(), torch.ones(2, 16, 16, 3))


def clean() -> Evidence:
    return working(Images(), torch.ones(2, 16, 16, 3).permute(0, 3, 1, 2).contiguous())
