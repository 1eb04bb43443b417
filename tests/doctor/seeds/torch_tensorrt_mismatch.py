"""What an unpinned pip install resolves to, and a set."""

from __future__ import annotations

from builders import evidence

from gpuopt.core.result import Environment
from gpuopt.doctor.evidence import Evidence

CODE = "GPU607"


def installed(**packages: str) -> Evidence:
    found = {name.replace("_", "-"): version for name, version in packages.items()}
    return evidence(
        packages=found, environment=Environment(gpuopt="0", python="3.12.4", platform="Linux x86_64", packages=found, cuda="13.0")
    )


def bad() -> Evidence:
    return installed(torch="2.15.0", torch_tensorrt="2.14.0", tensorrt_cu13="11.4.0.106")


def clean() -> Evidence:
    return installed(torch="2.14.1", torch_tensorrt="2.14.0", tensorrt_cu13="11.1.0.42")
