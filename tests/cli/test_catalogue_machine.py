"""Rows 44 to 51 of the catalogue: what is not here, or is not what it seems. A made-up NVIDIA machine stands in for the real one.

Each must be told before a model is opened or anything runs on a GPU, with what was found, what is wanted, and what to do.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_spec = importlib.util.spec_from_file_location("cli_catalogue", Path(__file__).with_name("catalogue.py"))
assert _spec is not None and _spec.loader is not None
shared: Any = sys.modules.get("cli_catalogue")
if shared is None:
    shared = sys.modules["cli_catalogue"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(shared)
command, left, QUICK = shared.command, shared.left, shared.QUICK
fake_cuda, fake_nvml = shared.devices.fake_cuda, shared.devices.fake_nvml

TO_ONNX = ("convert", "m.py:net", "-o", "out.onnx")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, and nothing starts CUDA."""
    from gpuopt.pipeline import session

    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(session.loaders, "load", touched)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.setattr(torch.cuda, "synchronize", touched)


# --- row 44


@pytest.mark.parametrize("words", [["-b", "ort:cuda"], ["-b", "ort", "--option", "provider=cuda"], ["-b", "ort:nhwc"]])
@pytest.mark.parametrize("model", ["m.py:net", "m.onnx"])
def test_44_the_cuda_provider_asked_of_the_cpu_wheel_is_4(
    words: list[str], model: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    shared.corpus.onnx_model(tmp_path)
    ended = command("bench", model, *words, "--device", "cpu", *QUICK)
    assert ended.code == 4, ended.err
    assert "CUDA provider" in ended.message and onnxruntime.__version__ in ended.message
    assert "gpuopt[ort-gpu]" in ended.fix


def test_44_nor_is_it_a_cpu_session_on_a_gpu(command: Any, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    ended = command("bench", "m.py:net", "-b", "ort", "--device", "cuda", *QUICK)
    assert ended.code == 4 and "CUDA provider" in ended.message and "gpuopt[ort-gpu]" in ended.message, ended.err


# --- rows 45 and 46


def test_45_a_gpu_asked_of_a_torch_without_cuda_is_4(command: Any, untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    ended = command(*TO_ONNX, "--device", "cuda")
    assert ended.code == 4 and torch.__version__ in ended.message and "without CUDA" in ended.message
    assert "install a CUDA build of torch" in ended.fix


@pytest.mark.parametrize(
    ("missing", "count", "said"), [(True, 2, "no NVIDIA driver answers"), (False, 0, "the NVIDIA driver finds no GPU")]
)
def test_45_a_gpu_asked_of_a_machine_without_one_is_4(
    missing: bool, count: int, said: str, command: Any, untouched: None, fake_cuda: Any, fake_nvml: Any
) -> None:
    fake_cuda.count = 0
    fake_nvml.answers["nvmlDeviceGetCount"] = lambda: count
    if missing:
        fake_nvml.missing.add("nvmlInit")
    ended = command(*TO_ONNX, "--device", "cuda")
    assert ended.code == 4 and said in ended.message and "--device cpu" in ended.fix


@pytest.mark.parametrize("value", ["", "-1", "7", "0,0", "all", "GPU-33333333"])
def test_46_a_cuda_visible_devices_that_shows_no_gpu_is_4_and_is_named(
    value: str, command: Any, untouched: None, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.count = 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    ended = command(*TO_ONNX, "--device", "cuda")
    assert ended.code == 4 and f"CUDA_VISIBLE_DEVICES={value!r}" in ended.message
    assert "unset CUDA_VISIBLE_DEVICES" in ended.fix


@pytest.mark.parametrize(("value", "count"), [("1", 1), ("0,9,1", 1), (None, 2)])
def test_46_an_index_that_is_not_there_is_4(
    value: str | None, count: int, command: Any, untouched: None, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.count = count
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    ended = command(*TO_ONNX, "--device", "cuda:7")
    assert ended.code == 4 and "cuda:7" in ended.message and "numbered from 0" in ended.message
    assert value is None or f"CUDA_VISIBLE_DEVICES={value!r}" in ended.message
    assert "--device cuda:0" in ended.fix


@pytest.mark.parametrize(("device", "code"), [("cuda:-1", 2), ("tpu", 2), ("cuda:x", 2), ("null", 4)])
def test_46_a_device_that_is_none_is_told(device: str, code: int, command: Any) -> None:
    assert command(*TO_ONNX, "--device", device).code == code


# --- row 47


@pytest.mark.parametrize(
    ("capability", "arches", "driver", "said", "fix"),
    [
        ((7, 0), ["sm_80", "sm_90"], 13000, ("sm_70", "sm_80, sm_90"), "an older torch"),
        ((12, 0), ["sm_80", "sm_90"], 13000, ("sm_120", "sm_80, sm_90"), "a newer torch"),
        ((10, 0), ["sm_90a", "compute_90a"], 13000, ("sm_100", "sm_90a"), "a newer torch"),
        ((8, 7), ["sm_80", "sm_86"], 13000, ("sm_87", "sm_80"), "a newer torch"),
        ((12, 0), ["sm_90", "compute_90"], 12080, ("sm_120", "12.8", "13.0"), "update the NVIDIA driver"),
    ],
)
def test_47_a_gpu_that_this_torch_has_no_code_for_is_4_before_anything_runs(
    capability: Any, arches: list[str], driver: int, said: Any, fix: str, command: Any, untouched: None, fake_cuda: Any, fake_nvml: Any
) -> None:
    fake_cuda.capability, fake_cuda.arches = capability, arches
    fake_nvml.answers["nvmlSystemGetCudaDriverVersion_v2"] = lambda: driver
    ended = command(*TO_ONNX, "--device", "cuda")
    assert ended.code == 4, ended.err
    assert torch.__version__ in ended.message and all(word in ended.message for word in said), ended.message
    assert fix in ended.fix


@pytest.mark.parametrize(
    ("capability", "arches"),
    [((9, 0), ["sm_90a"]), ((8, 9), ["sm_80"]), ((12, 0), ["compute_90"]), ((10, 3), ["sm_100f"]), ((8, 7), ["sm_87"])],
)
def test_47_a_gpu_that_it_has_code_for_is_not_refused(capability: Any, arches: list[str], command: Any, fake_cuda: Any) -> None:
    fake_cuda.capability, fake_cuda.arches = capability, arches
    ended = command("convert", "m.py:nothing", "--device", "cuda", "-o", "out.onnx")
    assert ended.code == 2 and "nothing" in ended.message, "it got as far as the model"


def test_47_a_driver_too_old_is_4_with_both_versions(command: Any, untouched: None, fake_cuda: Any, fake_nvml: Any) -> None:
    fake_cuda.count = 0
    fake_nvml.answers["nvmlSystemGetCudaDriverVersion_v2"] = lambda: 12040
    ended = command(*TO_ONNX, "--device", "cuda")
    assert ended.code == 4 and "580.82.07" in ended.message and "12.4" in ended.message and "13.0" in ended.message
    assert "update the NVIDIA driver" in ended.fix and "CUDA 13" in ended.fix


# --- rows 48 to 50


USERS = ("gpuopt.backends.ort", "gpuopt.loaders.onnx")
"""Modules that import these packages where they begin, and what lies below them."""


def stubbed(monkeypatch: pytest.MonkeyPatch, folder: Path, package: str, source: str | None) -> None:
    """This package is the given file, or is not there; whatever has imported the real one imports it again."""
    from gpuopt.backends.trt import flavour

    monkeypatch.setattr(flavour, "_FOUND", {})
    for name in [n for n in sys.modules if n.partition(".")[0] == package or n.startswith(USERS)]:
        monkeypatch.delitem(sys.modules, name)
    if source is None:
        monkeypatch.setitem(sys.modules, package, None)
        return
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


def without_stub(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """monkeypatch puts back only what it took out: what the stub brought goes now."""
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.startswith(USERS)]:
        del sys.modules[name]  # what imported the stub; what was there before comes back with monkeypatch


USES = {
    "onnxruntime": ("bench", "m.py:net", "-b", "ort", *QUICK),
    "onnx": ("bench", "m.onnx", "-b", "ort", *QUICK),
    "tensorrt": ("bench", "m.py:net", "-b", "trt", "--device", "cuda", *QUICK),
}
"""Package -> a command that needs it."""


@pytest.fixture
def used(command: Any, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """used(package, source) -> how the command that needs it ended with this in its place."""
    shared.corpus.onnx_model(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)

    def run(package: str, source: str | None) -> Any:
        stubbed(monkeypatch, tmp_path / "site", package, source)
        ended = command(*USES[package])
        without_stub(monkeypatch, package)
        return ended

    return run


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "onnx"), ("onnx", "onnx"), ("tensorrt", "trt")])
def test_48_a_package_that_is_not_installed_is_4_and_names_its_extra(package: str, extra: str, used: Any) -> None:
    ended = used(package, None)
    assert ended.code == 4, ended.err
    told = ended.message + ended.fix
    assert "not installed" in told and f"gpuopt[{extra}]" in told


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-b", "torch-trt"], 4),
        (["-b", "trt"], 4),
        (["-b", "eagre"], 2),
        (["-b", "eager:fast"], 2),
        (["-b", "eager:x=1"], 2),
        (["-b", ""], 2),
    ],
)
def test_48_a_backend_that_cannot_is_told(words: list[str], code: int, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    ended = command("bench", "m.py:net", *words, "--device", "cpu", *QUICK)
    assert ended.code == code and ended.message and ended.fix, ended.err


BROKEN = [
    "raise ImportError('undefined symbol: _ZN2at')",
    "raise OSError('libcudart.so.99: cannot open shared object file')",
    "raise TypeError('Descriptors cannot be created directly.')",
    "raise AttributeError('_ARRAY_API not found')",
]


@pytest.mark.parametrize("source", BROKEN)
@pytest.mark.parametrize("package", USES)
def test_49_a_package_that_is_there_and_does_not_import_is_4(package: str, source: str, used: Any) -> None:
    ended = used(package, source)
    assert ended.code == 4, ended.err
    assert package in ended.message and source.partition("('")[2].rstrip("')") in ended.message


REAL_ENOUGH = {
    "onnxruntime": "capi = type('capi', (), {'onnxruntime_pybind11_state': type('s', (), {'Fail': 1})})\n"
    "InferenceSession = SessionOptions = get_available_providers = 1\n",
    "onnx": "ModelProto = TensorProto = 1\ndefs = type('defs', (), {'onnx_opset_version': 1})\n",
    "tensorrt": "Builder = OnnxParser = 1\n",
}
OLD = {"onnxruntime": ("1.9.0", "1.24"), "onnx": ("1.14.1", "1.21"), "tensorrt": ("8.6.1.6", "10.0")}


@pytest.mark.parametrize("source", ["", "__version__ = '0.0.1.dev5'\n"])
@pytest.mark.parametrize("package", USES)
def test_50_a_placeholder_is_4_with_what_is_wanted(package: str, source: str, used: Any) -> None:
    ended = used(package, source)
    assert ended.code == 4, ended.err
    told = ended.message + ended.fix
    assert package in told and OLD[package][1] in told and "it has no " in told and "pip " in told
    assert not source or "0.0.1.dev5" in told


@pytest.mark.parametrize("package", USES)
def test_50_a_version_too_old_is_4_with_both_versions(package: str, used: Any) -> None:
    found, wanted = OLD[package]
    ended = used(package, REAL_ENOUGH[package] + f"__version__ = {found!r}\n")
    assert ended.code == 4, ended.err
    told = ended.message + ended.fix
    assert f"{found} is too old" in told and f"{wanted} or later" in told and "pip install --upgrade" in told


def test_50_what_is_wanted_is_what_the_extras_install() -> None:
    import re
    import tomllib

    from gpuopt.trust import packages

    extras = tomllib.loads((shared.TESTS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {re.split(r"[>=]", line)[0]: line.partition(">=")[2] for line in extras["onnx"] + extras["ort-gpu"]}
    for name, need in packages.NEEDS.items():
        assert {asked[wheel] for wheel in need.wheels} == {f"{need.oldest[0]}.{need.oldest[1]}"}, name


@pytest.mark.parametrize(("text", "wanted"), [("1.31.1", (1, 31)), ("1.24.0rc1", (1, 24)), ("11", (11, 0)), ("", ()), ("unknown", ())])
def test_50_versions_are_compared_by_their_numbers(text: str, wanted: tuple[int, ...]) -> None:
    from gpuopt.trust import packages

    assert packages.release(text) == wanted


# --- row 51


@pytest.mark.parametrize(
    ("capability", "precision", "needed"),
    [
        ((7, 0), "tf32", "8.0"),
        ((7, 0), "bf16", "8.0"),
        ((7, 0), "fp8", "8.9"),
        ((7, 0), "int8", "7.5"),
        ((7, 5), "bf16", "8.0"),
        ((7, 5), "fp8", "8.9"),
        ((8, 0), "fp8", "8.9"),
        ((8, 6), "fp8", "8.9"),
    ],
)
def test_51_a_precision_that_the_gpu_lacks_is_4_with_the_capability_it_needs(
    capability: Any, precision: str, needed: str, command: Any, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any) -> Any:
        raise AssertionError("something ran on the GPU")

    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    fake_cuda.capability, fake_cuda.arches = capability, ["sm_70", "sm_75", "sm_80"]
    ended = command(*TO_ONNX, "--precision", precision, "--device", "cuda")
    assert ended.code == 4, ended.err
    assert f"needs compute capability {needed}" in ended.message and "{}.{}".format(*capability) in ended.message
    assert "--precision" in ended.fix


def test_51_among_candidates_it_is_unsupported_with_its_reason(command: Any, fake_cuda: Any, tmp_path: Path) -> None:
    fake_cuda.capability, fake_cuda.arches = (7, 5), ["sm_75"]
    ended = command("bench", "m.py:net", "-p", "bf16", "-p", "fp8", "--device", "cuda", *QUICK, "--json", "r.json")
    assert ended.code in (1, 4) and "Traceback" not in ended.err, ended.err
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["unsupported", "unsupported"]
    assert "8.0" in runs[0]["reason"] and "8.9" in runs[1]["reason"] and all("7.5" in run["reason"] for run in runs)


def test_51_one_that_can_still_wins(command: Any, tmp_path: Path) -> None:
    ended = command("bench", "m.py:net", "-p", "fp32", "-p", "tf32", "--device", "cpu", *QUICK, "--json", "r.json")
    assert ended.code == 0, ended.err
    able, unable = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert able["status"] == "ok" and unable["status"] == "unsupported" and "tf32" in unable["reason"]


# --- in processes of their own

FAKE_MACHINE = """
import sys
if "gpuopt.pipeline.worker" in sys.orig_argv:  # two GPUs, and torch's own reading of CUDA_VISIBLE_DEVICES
    import os, pynvml, torch
    torch.version.cuda = "13.0"
    driver = int(os.environ["FAKE_DRIVER"])
    pynvml.nvmlInit = lambda: None
    pynvml.nvmlDeviceGetCount = lambda: 2
    pynvml.nvmlSystemGetDriverVersion = lambda: "555.42"
    pynvml.nvmlSystemGetCudaDriverVersion_v2 = lambda: driver
    torch.cuda.device_count = lambda: sum(d in (0, 1) for d in torch.cuda._parse_visible_devices()) if driver >= 13000 else 0
    torch.cuda.is_available = lambda: torch.cuda.device_count() > 0
"""


@pytest.mark.parametrize(
    ("row", "env", "device", "said"),
    [
        (46, {"CUDA_VISIBLE_DEVICES": "9", "FAKE_DRIVER": "13000"}, "cuda", "CUDA_VISIBLE_DEVICES='9'"),
        (47, {"CUDA_VISIBLE_DEVICES": "0", "FAKE_DRIVER": "12040"}, "cuda:0", "555.42"),
    ],
)
def test_46_47_the_machine_is_told_in_processes_of_its_own(row: int, env: dict[str, str], device: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAKE_MACHINE)
    (tmp_path / "m.py").write_text(shared.MODELS)
    before = left(tmp_path)
    ended = shared.gpuopt(*TO_ONNX, "--device", device, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), **env)
    assert ended.code == 4 and said in ended.message and ended.fix, ended.err
    assert left(tmp_path) == before
