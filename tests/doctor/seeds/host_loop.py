"""Twenty thousand rows one at a time, and in batches of 64."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import Evidence, ModelCalls, Script

CODE = "GPU714"


def ran(batch: int) -> Evidence:
    calls = 20_000 // batch
    model = ModelCalls(
        name="model", module_class="Mlp", num_calls=calls, wall_s=calls * 0.0004, line="infer.py:20", inputs=(f"x:float32[{batch},128]",)
    )
    return evidence(script=Script(modules=(model,)), batch_curve={1: 0.4, 64: 0.5})


def bad() -> Evidence:
    return ran(1)


def clean() -> Evidence:
    return ran(64)


GAIN_MS = 0.4 - 0.5 / 64
