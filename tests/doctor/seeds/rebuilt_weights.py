"""Weight norm left on for inference, and removed."""

from __future__ import annotations

from builders import MS, evidence
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU309"


def made(*, is_removed: bool) -> Evidence:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.ReLU()).half().eval()
    rows = [OpRecord(op="aten.addmm", module="0", dtype="float16", time_ns=2 * MS, flops=1.4e12, bytes=1e9)]
    if is_removed:
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        rows.append(OpRecord(op="aten._weight_norm_interface", module="0.parametrizations.weight.0", dtype="float16", time_ns=1 * MS, flops=0.0, bytes=4e9))  # fmt: skip
    return evidence(module=model, records=tuple(rows), wall_ms=sum(r.time_ns or 0.0 for r in rows) / MS)


def bad() -> Evidence:
    return made(is_removed=False)


def clean() -> Evidence:
    return made(is_removed=True)


GAIN_MS = 0.95
