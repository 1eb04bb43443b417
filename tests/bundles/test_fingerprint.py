"""What an artifact depends on, and where that differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpuopt.bundles import fingerprint
from gpuopt.core.result import Device, Manifest
from gpuopt.core.spec import BackendSpec

CPU = Device(id="cpu", name="a CPU", kind="cpu")


def test_a_fingerprint_is_text_and_names_what_code_was_built_for(device: Device) -> None:
    found = fingerprint.current("aoti", device)
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in found.items())
    assert found["torch"] == torch.__version__
    assert (found["device"], found["capability"], found["driver"]) == ("NVIDIA H200", "9.0", "580.1")
    assert "driver" not in fingerprint.current("aoti", CPU)
    assert fingerprint.current("aoti", CPU)["cpu_isa"]
    assert fingerprint.current("ort", CPU)["onnxruntime-gpu"] in ("absent", fingerprint.current("ort", CPU)["onnxruntime-gpu"])


def test_native_code_fits_where_every_field_is_equal(manifest: Manifest, device: Device) -> None:
    here = fingerprint.current("aoti", device)
    assert fingerprint.mismatches(manifest, here) == []
    for key in (key for key, value in manifest.fingerprint.items() if value != fingerprint.ABSENT):
        assert fingerprint.mismatches(manifest, {**here, key: "another"}) == [(key, manifest.fingerprint[key], "another")]
        assert fingerprint.mismatches(manifest, {k: v for k, v in here.items() if k != key}) == [(key, manifest.fingerprint[key], "absent")]
    assert fingerprint.mismatches(manifest, {**here, "new": "1"}) == [("new", "absent", "1")]
    assert len(fingerprint.mismatches(manifest, fingerprint.current("aoti", CPU))) > 2


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("2.13.0", "2.13.1+cu130", True),
        ("2.11.0+cu130", "2.13.0", True),
        ("2.13.0", "2.11.0", False),
        ("3.0.0", "2.99.0", False),
        ("2.9.0", "2.13.0a0+git", True),
    ],
)
def test_a_portable_file_only_must_not_come_from_a_newer_torch(manifest: Manifest, built: str, here: str, fits: bool) -> None:
    portable = replace(manifest, backend=BackendSpec(name="inductor"), fingerprint={"torch": built, "device": "NVIDIA A100"})
    found = fingerprint.mismatches(portable, {"torch": here, "device": "NVIDIA H200", "driver": "1"})
    assert (found == []) is fits
    assert fits or found[0] == ("torch", built, here)


def test_a_portable_file_that_does_not_say_its_torch_does_not_fit(manifest: Manifest) -> None:
    portable = replace(manifest, backend=BackendSpec(name="eager"), fingerprint={})
    assert fingerprint.mismatches(portable, {"torch": "2.13.0"}) == [("torch", "absent", "2.13.0")]


def test_an_engine_built_without_its_gpu_leaves_the_gpu_open_and_nothing_else(manifest: Manifest, device: Device) -> None:
    built = replace(manifest, backend=BackendSpec(name="trt"), fingerprint=fingerprint.current("trt", CPU))
    here = fingerprint.current("trt", device)
    assert fingerprint.mismatches(built, here) == []
    assert [field for field, _, _ in fingerprint.mismatches(built, {**here, "tensorrt": "99"})] == ["tensorrt"]
    assert fingerprint.mismatches(built, fingerprint.current("aoti", CPU))[0][0] == "device_kind"
