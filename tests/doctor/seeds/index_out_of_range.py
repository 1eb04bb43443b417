"""A token of another model's tokenizer, and one of its own."""

from __future__ import annotations

import torch
from broken import Encoder, failing, working

from gpuopt.doctor.evidence import Evidence

CODE = "GPU705"


def bad() -> Evidence:
    return failing(Encoder(vocabulary=50), torch.tensor([[1, 2, 50]]))


def clean() -> Evidence:
    return working(Encoder(vocabulary=50), torch.tensor([[1, 2, 49]]))
