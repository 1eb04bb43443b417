"""The table is light, complete, and every module in it keeps the same interface."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpuopt.backends import BACKENDS, EXTRAS, SUMMARY, listed, load_backend
from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.spec import Precision

OURS = ("eager", "inductor", "cudagraphs", "aoti", "null")


def test_the_table_imports_neither_torch_nor_a_backend() -> None:
    code = "import sys, gpuopt.backends; bad = [m for m in sys.modules if m == 'torch' or m.startswith('gpuopt.backends.')]; sys.exit(str(bad) if bad else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_backend_has_a_summary_and_every_extra_a_backend() -> None:
    assert set(SUMMARY) == set(BACKENDS)
    assert set(EXTRAS) <= set(BACKENDS)


def test_an_unknown_backend_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        load_backend("inductr")
    assert "did you mean 'inductor'?" in caught.value.fix


def test_torch_trt_without_its_package_is_unavailable_and_names_the_extra() -> None:
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("torch_tensorrt is installed")
    with pytest.raises(Unavailable) as caught:
        load_backend("torch-trt")
    assert "torch_tensorrt" in caught.value.message and "gpuopt[torch-trt]" in caught.value.fix


@pytest.mark.parametrize("name", OURS)
def test_every_module_has_the_interface(name: str) -> None:
    backend = load_backend(name)
    assert backend.FORMS and isinstance(backend.FORMS, frozenset)
    assert isinstance(backend.PRESETS, dict)
    for function in ("available", "supports", "build", "load"):
        assert callable(getattr(backend, function))


@pytest.mark.parametrize("name", OURS)
def test_what_cannot_be_says_why_in_a_sentence(name: str) -> None:
    backend = load_backend(name)
    for form in ("module", "torchscript", "exported", "onnx"):
        for precision in (None, *Precision):
            reason = backend.supports(form, precision, "cpu")
            assert reason is None or len(reason.split()) > 3
            assert reason is not None or form in backend.FORMS


def test_tf32_and_cuda_graphs_are_refused_on_a_cpu() -> None:
    for name in ("eager", "inductor", "aoti"):
        assert "TF32" in load_backend(name).supports("module", Precision.TF32, "cpu")
    assert "GPU" in load_backend("cudagraphs").supports("module", None, "cpu")
    assert "GPU" in load_backend("cudagraphs").available("cpu")


def test_a_device_that_is_not_there_is_a_reason_and_not_an_exception() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("eager", "inductor", "cudagraphs", "aoti"):
        assert "no CUDA device" in load_backend(name).available("cuda")


def test_a_backend_for_tests_is_in_no_list_and_works_when_named() -> None:
    assert "null" in BACKENDS and "null" not in listed()
    with pytest.raises(UsageError) as raised:
        load_backend("nul")
    assert "null" not in raised.value.fix and "eager" in raised.value.fix
    assert load_backend("null").available("cpu") is None
