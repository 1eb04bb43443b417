"""A service in eval mode that records gradients in every call; and one that asked for them once."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import Evidence, ModelCalls, Script

CODE = "GPU715"


def ran(num_grad_calls: int) -> Evidence:
    model = ModelCalls(
        name="model", module_class="Detector", num_calls=50, wall_s=5.0, line="infer.py:20", inputs=("x:float32[8,3,640,640]",),
        num_grad_calls=num_grad_calls,
    )  # fmt: skip
    return evidence(script=Script(modules=(model,)))


def bad() -> Evidence:
    return ran(50)


def clean() -> Evidence:
    return ran(1)
