"""A torch without CUDA on a machine with a GPU, and on one without."""

from __future__ import annotations

from dataclasses import replace

from builders import CPU, evidence

from gpuopt.core.result import Environment
from gpuopt.doctor.evidence import Evidence

CODE = "GPU609"
PACKAGES = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}
ENVIRONMENT = Environment(gpuopt="0", python="3.12.4", platform="Linux x86_64", packages=PACKAGES)
NOTE = "this machine has an NVIDIA GPU that is not used: this torch (2.13.0+cpu) is built without CUDA (install a CUDA build of torch)"


def bad() -> Evidence:
    return evidence(device=replace(CPU, notes=(NOTE,)), environment=ENVIRONMENT, packages=PACKAGES)


def clean() -> Evidence:
    return evidence(device=CPU, environment=ENVIRONMENT, packages=PACKAGES)
