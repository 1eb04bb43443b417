"""A model under DataParallel, and on its own."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import Evidence, ModelCalls, Script

CODE = "GPU712"


def ran(*, spread: bool) -> Evidence:
    model = ModelCalls(
        name="model", module_class="ResNet", num_calls=50, wall_s=5.0, line="infer.py:20", inputs=("x:float32[64,3,224,224]",), is_data_parallel=spread
    )  # fmt: skip
    return evidence(script=Script(modules=(model,)))


def bad() -> Evidence:
    return ran(spread=True)


def clean() -> Evidence:
    return ran(spread=False)
