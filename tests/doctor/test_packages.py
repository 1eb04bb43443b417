"""Which versions go together, and the commands that repair what does not."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files

import pytest
from builders import CPU, GPU, evidence

from gpuopt.core.result import Environment, Finding
from gpuopt.devices import info, nvml
from gpuopt.doctor import packages
from gpuopt.doctor.diagnose import diagnose


def found(code: str, here: dict[str, str], *, cuda: str | None = "13.0", device: object = GPU) -> list[Finding]:
    environment = Environment(gpuopt="0", python="3.12", platform="Linux x86_64", packages=here, cuda=cuda)
    return [f for f in diagnose(evidence(packages=here, environment=environment, device=device)) if f.code == code]


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("11.1.0.106", ">=11.1,<11.2", True),
        ("11.2", ">=11.1,<11.2", False),
        ("11.0.9", ">=11.1,<11.2", False),
        ("10.15", ">=10.15.1,<10.16", False),
    ],
)
def test_ranges_compare_numbers_and_not_texts(version: str, wanted: str, fits: bool) -> None:
    assert packages.within(version, wanted) is fits
    assert packages.within("10.9", ">=10.15") is False


def test_the_table_names_its_sources_and_no_registry() -> None:
    text = files("gpuopt.doctor").joinpath("packages.toml").read_text(encoding="utf-8")
    rows = packages.table()
    assert all("source" in row for row in (rows["driver"], rows["torch"], rows["onnxruntime-gpu"], *rows["torch-tensorrt"].values()))
    assert not re.search(r"index-url|pypi\.|/simple|whl/", text)
    for row in rows["torch-tensorrt"].values():
        assert packages.within(re.findall(r">=([\d.]+)", row["tensorrt"])[0], row["tensorrt"])


@pytest.mark.parametrize(
    ("here", "fix"),
    [
        # An unpinned install: the newest of each.
        (
            {"torch": "2.15.0", "torch-tensorrt": "2.14.0"},
            "pip install 'torch==2.14.*' 'torch-tensorrt==2.14.*' 'tensorrt-cu13>=11.1,<11.2'",
        ),
        # torch stays where there is a torch-tensorrt for it.
        (
            {"torch": "2.11.0", "torch-tensorrt": "2.14.0"},
            "pip install 'torch==2.11.*' 'torch-tensorrt==2.11.*' 'tensorrt>=10.15.1,<10.16'",
        ),
        (
            {"torch": "2.14.0", "torch-tensorrt": "2.14.0", "tensorrt": "11.4.0.106"},
            "pip install 'torch==2.14.*' 'torch-tensorrt==2.14.*' 'tensorrt-cu13>=11.1,<11.2'",
        ),
    ],
)
def test_a_set_that_does_not_fit_is_replaced_by_one_that_does(here: dict[str, str], fix: str) -> None:
    (finding,) = found("GPU607", here)
    assert finding.fix == fix
    row = packages.torch_tensorrt(re.findall(r"torch==([\d.]+)\.\*", fix)[0] + ".0")
    assert row is not None
    mended = {"torch": f"{row['torch']}.0", "torch-tensorrt": f"{row['torch']}.0", row["package"]: re.findall(r">=([\d.]+)", fix)[0]}
    assert found("GPU607", mended) == []


def test_a_torch_tensorrt_for_another_cuda_is_found_by_its_tag_or_by_its_wheel() -> None:
    assert found("GPU607", {"torch": "2.11.0+cu126", "torch-tensorrt": "2.11.0"}, cuda="12.6")
    assert found("GPU607", {"torch": "2.11.0+cu130", "torch-tensorrt": "2.11.0+cu128"})
    assert not found("GPU607", {"torch": "2.11.0+cu128", "torch-tensorrt": "2.11.0+cu128"}, cuda="12.8")


def test_versions_no_row_names_are_not_judged() -> None:
    assert not found("GPU607", {"torch": "2.99.0", "torch-tensorrt": "2.99.0", "tensorrt": "99.0"})
    assert not found("GPU608", {"torch": "2.14.0", "onnxruntime-gpu": "1.12.0"})
    assert not found("GPU608", {"torch": "2.14.0", "onnxruntime-gpu": "1.32.0.dev20261101"})
    assert not found("GPU606", {"torch": "2.14.0"}, cuda="99.0", device=replace(GPU, driver="580.1"))


@pytest.mark.parametrize(
    ("version", "torch", "cuda", "fix"),
    [
        ("1.31.1", "2.11.0+cu126", "12.6", "pip install 'onnxruntime-gpu>=1.24,<1.27'"),
        ("1.26.0", "2.11.0", "13.0", "pip install 'onnxruntime-gpu>=1.27'"),
    ],
)
def test_an_onnxruntime_for_another_cuda_than_torchs_is_replaced(version: str, torch: str, cuda: str, fix: str) -> None:
    (finding,) = found("GPU608", {"torch": torch, "onnxruntime-gpu": version}, cuda=cuda)
    assert finding.fix == fix


def test_two_onnxruntimes_are_replaced_by_one_that_fits() -> None:
    (finding,) = found("GPU608", {"torch": "2.11.0+cu126", "onnxruntime-gpu": "1.31.1", "onnxruntime": "1.31.1"}, cuda="12.6")
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.24,<1.27'"
    assert not found("GPU608", {"torch": "2.11.0", "onnxruntime": "1.31.1"})


def test_an_old_driver_is_an_error_where_the_gpu_cannot_be_used_and_a_warning_where_it_can() -> None:
    note = "this machine has an NVIDIA GPU that is not used: the NVIDIA driver (535.1.2) runs CUDA up to 12.2, this torch (2.11.0) needs 13.0 (…)"
    (unused,) = found("GPU606", {"torch": "2.11.0"}, device=replace(CPU, notes=(note,)))
    (used,) = found("GPU606", {"torch": "2.11.0"}, device=replace(GPU, driver="570.86"))
    assert (unused.severity, used.severity) == ("error", "warning") and "580" in unused.fix and "CUDA 12" in unused.fix
    assert not found("GPU606", {"torch": "2.11.0+cu126"}, cuda="12.6", device=replace(GPU, driver="535.1"))


def test_a_cpu_build_is_replaced_together_with_its_family() -> None:
    device = replace(CPU, driver="535.1")
    (finding,) = found("GPU609", {"torch": "2.11.0+cpu", "torchvision": "0.26.0+cpu", "torchaudio": "2.11.0"}, cuda=None, device=device)
    assert finding.fix.startswith("pip uninstall -y torch torchvision && pip install torch==2.11.0 torchvision==0.26.0")
    assert "580" in finding.fix  # that wheel would not run on this driver either
    assert not found("GPU609", {"torch": "2.11.0"}, cuda="13.0", device=device)


@pytest.mark.parametrize("cpu_build", [True, False])
def test_the_notes_of_the_device_say_what_is_looked_for_in_them(monkeypatch: pytest.MonkeyPatch, cpu_build: bool) -> None:
    """gpuopt.devices writes the notes that gpuopt.doctor reads: both sides of one text."""
    monkeypatch.setattr(nvml, "num_gpus", lambda: 1)
    monkeypatch.setattr(nvml, "driver", lambda: "535.183.01")
    monkeypatch.setattr(nvml, "cuda_of_driver", lambda: (12, 2))
    monkeypatch.setattr("torch.version.cuda", None if cpu_build else "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = info.describe("cpu")
    assert packages.has_unused_gpu(device)
    assert cpu_build or packages.driver_of(device) == "535.183.01"
