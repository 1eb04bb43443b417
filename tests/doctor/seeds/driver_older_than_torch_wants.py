"""A driver of 2023 under a torch for CUDA 13, and a new one."""

from __future__ import annotations

from dataclasses import replace

from builders import CPU, GPU, evidence

from gpuopt.core.result import Environment
from gpuopt.doctor.evidence import Evidence

CODE = "GPU606"
PACKAGES = {"torch": "2.11.0"}
ENVIRONMENT = Environment(gpuopt="0", python="3.12.4", platform="Linux x86_64", packages=PACKAGES, cuda="13.0", cudnn="91900")
NOTE = (
    "this machine has an NVIDIA GPU that is not used: the NVIDIA driver (535.183.01) runs CUDA up to 12.2, this torch (2.11.0) needs 13.0 "
    "(update the NVIDIA driver to one for CUDA 13)"
)


def bad() -> Evidence:
    return evidence(device=replace(CPU, notes=(NOTE,)), environment=ENVIRONMENT, packages=PACKAGES)


def clean() -> Evidence:
    return evidence(device=replace(GPU, driver="580.82.07"), environment=ENVIRONMENT, packages=PACKAGES)
