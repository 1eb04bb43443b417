"""A tenth of the FLOPs on the CPU under the CUDA provider, and none."""

from __future__ import annotations

from builders import evidence

from gpuopt.core.result import PrecisionAudit
from gpuopt.doctor.evidence import Evidence

CODE = "GPU505"


def placed(cpu: float) -> Evidence:
    placements = {"CUDAExecutionProvider": 1 - cpu} | ({"CPUExecutionProvider": cpu} if cpu else {})
    audit = PrecisionAudit(shares={"float16": 1.0}, method="onnx graph + placement", honoured=True, requested="fp16", placements=placements)
    return evidence(backend="ort", preset="cuda", precision="fp16", audit=audit)


def bad() -> Evidence:
    return placed(0.1)


def clean() -> Evidence:
    return placed(0.0)
