"""Weights loaded for each of 50 calls, and once."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import Evidence, Load, ModelCalls, Script

CODE = "GPU711"


def ran(loads: int) -> Evidence:
    model = ModelCalls(
        name="model", module_class="BertModel", num_calls=50, wall_s=0.5, line="infer.py:20", inputs=("input_ids:int64[8,128]",)
    )
    load = Load(line="infer.py:12", what="torch.load", count=loads, seconds=0.7 * loads, bytes=1.3e9 * loads)
    return evidence(script=Script(modules=(model,), loads=(load,)))


def bad() -> Evidence:
    return ran(50)


def clean() -> Evidence:
    return ran(1)


GAIN_MS = 700 * 49 / 50
