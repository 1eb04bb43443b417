"""Backend x device -> the versions and the hardware its artifact depends on; two fingerprints -> the fields that differ."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from gpuopt.bundles.manifest import NATIVE_BACKENDS
from gpuopt.core.result import Device, Manifest

ABSENT = "absent"
ANY = "any"
"""Of a field that a build without its device left open: an engine made for a GPU on a machine that has none."""
BUILD_ONLY = frozenset({"trt", "torch-trt"})
PACKAGES: dict[str, tuple[str, ...]] = {
    "aoti": ("triton",),
    "inductor": ("triton",),
    "ort": ("onnxruntime", "onnxruntime-gpu"),
    "trt": ("tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
    "torch-trt": ("torch-tensorrt", "tensorrt"),
}
"""Packages whose version changes what a backend builds. Read from the installed metadata, so that nothing is imported for it."""


def current(backend: str, device: Device) -> dict[str, str]:
    """What an artifact of `backend` built on `device` by this installation depends on. All text; what is not there is `absent`."""
    found = {
        "torch": str(torch.__version__),
        "platform": f"{platform.system()}-{platform.machine()}".lower(),
        "device_kind": device.kind,
        "device": device.name,
    }
    if device.kind != "cuda" and backend in BUILD_ONLY:
        return {**found, **dict.fromkeys(("device", "cuda", "capability", "driver"), ANY), "device_kind": "cuda", **_packages(backend)}
    if device.kind == "cuda":
        found["cuda"] = str(torch.version.cuda or ABSENT)
        found["capability"] = device.capability or ABSENT
        found["driver"] = device.driver or ABSENT
    elif device.kind == "cpu":
        # AOTInductor compiles for the vector extension it finds: AVX512 code is an illegal instruction on an AVX2 machine.
        found["cpu_isa"] = torch.backends.cpu.get_cpu_capability()
    return {**found, **_packages(backend)}


def mismatches(manifest: Manifest, here: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(field, as built, as here) of everything that keeps the artifact from running here; empty when it fits.

    Native code wants every field equal. A portable file is built again on arrival and only must not come from a newer torch than this one,
    whose schema this one may not know.
    """
    built = manifest.fingerprint
    if manifest.backend.name in NATIVE_BACKENDS:
        pairs = [(key, built.get(key, ABSENT), here.get(key, ABSENT)) for key in (*built, *(key for key in here if key not in built))]
        return [(key, theirs, ours) for key, theirs, ours in pairs if theirs not in (ours, ANY)]
    theirs, ours = built.get("torch", ABSENT), here.get("torch", ABSENT)
    if theirs == ABSENT or _release(theirs) > _release(ours):
        return [("torch", theirs, ours)]
    return []


def _packages(backend: str) -> dict[str, str]:
    return {package: _version(package) for package in PACKAGES.get(backend, ())}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _release(text: str) -> tuple[int, ...]:
    """`2.13.0+cu130` -> (2, 13): the parts that change the file schema."""
    numbers = []
    for part in text.partition("+")[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)
