"""A small native bundle, its manifest and the device it was built for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpuopt.bundles import fingerprint, write
from gpuopt.core.result import SCHEMA_VERSION, Accuracy, Device, Manifest, Run
from gpuopt.core.spec import BackendSpec, Precision

GPU = Device(id="cuda:0", name="NVIDIA H200", kind="cuda", capability="9.0", driver="580.1")


@pytest.fixture
def device() -> Device:
    return GPU


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        gpuopt="0.1",
        model="resnet",
        model_sha256="ab" * 32,
        backend=BackendSpec(name="aoti", preset="max-autotune", options={"x": 1}),
        precision=Precision.FP16,
        transforms=("channels_last",),
        files=(),
        fingerprint=fingerprint.current("aoti", GPU),
        inputs=("x:float16[N,3,8,8]",),
        dims={"N": 8},
        dim_ranges={"N": (1, 16)},
        positional=1,
        device="cuda:0",
        verified=True,
        run=Run(model="resnet", backend="aoti", accuracy=Accuracy(passed=True, reference="fp64")),
        flops=1e9,
        flops_by_dtype={"float16": 1e9},
        flop_coverage=0.99,
        seed=3,
        notes=("built for a test",),
    )


def write_artifact(folder: Path) -> dict[str, str]:
    """Two files, one in a folder, one of them without a role."""
    (folder / "model.pt2").write_bytes(b"native" * 1000)
    (folder / "cache").mkdir()
    (folder / "cache" / "kernel.cubin").write_bytes(b"\x7fELF")
    return {"artifact": "model.pt2"}


@pytest.fixture
def artifact() -> Callable[[Path], dict[str, str]]:
    return write_artifact


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest) -> Path:
    """A published bundle, alone in its folder."""
    target = tmp_path / "out" / "fast"
    write.publish(write_artifact, target, manifest)
    return target
