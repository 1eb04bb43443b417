"""Both wheels of ONNX Runtime, and one."""

from __future__ import annotations

from builders import evidence

from gpuopt.core.result import Environment
from gpuopt.doctor.evidence import Evidence

CODE = "GPU608"


def installed(packages: dict[str, str]) -> Evidence:
    return evidence(
        packages=packages, environment=Environment(gpuopt="0", python="3.12.4", platform="Linux x86_64", packages=packages, cuda="13.0")
    )


def bad() -> Evidence:
    return installed({"torch": "2.14.0", "onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})


def clean() -> Evidence:
    return installed({"torch": "2.14.0", "onnxruntime-gpu": "1.31.1"})
