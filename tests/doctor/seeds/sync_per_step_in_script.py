"""Forty waits a call in a loop, and one to read the result."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import CallSite, Evidence, ModelCalls, Script

CODE = "GPU713"


def ran(a_call: int) -> Evidence:
    model = ModelCalls(
        name="model", module_class="Detector", num_calls=50, wall_s=5.0, line="infer.py:20", inputs=("x:float32[8,3,640,640]",)
    )
    site = CallSite(line="infer.py:31", what="Tensor.item", count=50 * a_call, seconds=0.02 * a_call)
    return evidence(script=Script(modules=(model,), syncs=(site,)))


def bad() -> Evidence:
    return ran(40)


def clean() -> Evidence:
    return ran(1)
