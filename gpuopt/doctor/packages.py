"""Installed versions -> what goes together, from packages.toml, and the pip command that repairs it. Unknown stays unknown: a version no row names is not judged."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from gpuopt.core.result import Device, Environment
from gpuopt.doctor.evidence import Evidence

NAMES = (
    "torch",
    "torchvision",
    "torchaudio",
    "triton",
    "torch-tensorrt",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
)
"""Distributions the rules look at: what whoever gathers Evidence.packages should read."""
TENSORRT = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt")
"""Distributions that bring TensorRT; `tensorrt` alone only pulls in one of the others."""
_DRIVER_IN_NOTE = re.compile(r"NVIDIA driver \(([\d.]+)\)")
UNUSED_GPU = "NVIDIA GPU that is not used"
"""In the notes of the device `cpu` where the machine has a GPU that torch cannot use (devices/info.py)."""


@cache
def table() -> dict[str, Any]:
    """packages.toml."""
    return tomllib.loads(files("gpuopt.doctor").joinpath("packages.toml").read_text(encoding="utf-8"))


def installed(evidence: Evidence) -> dict[str, str]:
    """Distribution -> version, from Evidence.packages and the environment."""
    environment = evidence.environment.packages if evidence.environment is not None else {}
    return {**environment, **evidence.packages}


def release(version: str) -> tuple[int, ...]:
    """`2.13.0+cu130` -> (2, 13, 0); `1.31.1rc2` -> (1, 31, 1). Empty for a text that is none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return () if match is None else tuple(int(part) for part in match[0].split("."))


def minor(version: str) -> str:
    """`2.13.0+cu130` -> `2.13`."""
    return ".".join(str(part) for part in (*release(version), 0, 0)[:2])


def within(version: str, wanted: str) -> bool:
    """Whether a version lies in a range `>=11.0,<11.1`."""
    have = release(version)
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", part)
        assert match is not None, wanted
        bound = release(match[2])
        width = max(len(have), len(bound))
        left, right = have + (0,) * (width - len(have)), bound + (0,) * (width - len(bound))
        if (left < right) if match[1] == ">=" else (left >= right):
            return False
    return True


def cuda_of_torch(packages: Mapping[str, str], environment: Environment | None) -> str | None:
    """CUDA version torch is built for: as torch says, else by its version's tag (`+cu126`); None for a build without, or where nobody says."""
    if environment is not None and environment.cuda:
        return environment.cuda
    match = re.search(r"\+cu(\d+)(\d)$", packages.get("torch", ""))
    return None if match is None else f"{match[1]}.{match[2]}"


def is_cpu_build(packages: Mapping[str, str], environment: Environment | None) -> bool:
    """Whether torch has no CUDA at all. A version without a tag says nothing by itself: then torch must have said so."""
    version = packages.get("torch", "")
    if "+" in version:
        return version.endswith("+cpu")
    return bool(version) and environment is not None and environment.cuda is None and "+" not in version


def cuda_of_onnxruntime(version: str) -> int | None:
    """CUDA major of the onnxruntime-gpu wheel; None where the table does not say (older releases, nightlies of other feeds)."""
    if "dev" in version or "+" in version:
        return None
    rows = sorted((release(first), cuda) for first, cuda in table()["onnxruntime-gpu"].items() if first != "source")
    return next((int(cuda) for first, cuda in reversed(rows) if release(version) >= first), None)


def onnxruntime_for(cuda_major: int) -> str | None:
    """The pip requirement of an onnxruntime-gpu for a CUDA major: `onnxruntime-gpu>=1.24,<1.27`. gpuopt needs 1.24."""
    rows = sorted((release(first), int(cuda), first) for first, cuda in table()["onnxruntime-gpu"].items() if first != "source")
    for index, (_, cuda, first) in enumerate(rows):
        if cuda == cuda_major:
            oldest = first if release(first) >= (1, 24) else "1.24"
            return f"onnxruntime-gpu>={oldest}" + (f",<{rows[index + 1][2]}" if index + 1 < len(rows) else "")
    return None


def torch_tensorrt(version: str) -> dict[str, Any] | None:
    """The row of a torch-tensorrt, or of a torch, whose versions it shares."""
    row: dict[str, Any] | None = table()["torch-tensorrt"].get(minor(version))
    return row


def newest_torch_tensorrt() -> dict[str, Any]:
    """The newest row."""
    rows: dict[str, dict[str, Any]] = table()["torch-tensorrt"]
    return rows[max(rows, key=release)]


def oldest_driver(cuda: str) -> int | None:
    """Major version of the oldest driver for a CUDA version `13.0`."""
    found = table()["driver"].get(str((*release(cuda), 0)[0]))
    return None if found is None else int(found)


def driver_of(device: Device | None) -> str | None:
    """The NVIDIA driver; where torch could not use the GPU, as the note of the CPU tells it."""
    if device is None:
        return None
    noted = (_DRIVER_IN_NOTE.search(note) for note in device.notes)
    return device.driver or next((match[1] for match in noted if match), None)


def has_unused_gpu(device: Device | None) -> bool:
    """A run on the CPU of a machine with an NVIDIA GPU that torch cannot use."""
    return device is not None and device.kind == "cpu" and (device.driver is not None or any(UNUSED_GPU in note for note in device.notes))


__all__ = [
    "NAMES",
    "TENSORRT",
    "cuda_of_onnxruntime",
    "cuda_of_torch",
    "driver_of",
    "has_unused_gpu",
    "installed",
    "is_cpu_build",
    "minor",
    "newest_torch_tensorrt",
    "oldest_driver",
    "onnxruntime_for",
    "release",
    "table",
    "torch_tensorrt",
    "within",
]
