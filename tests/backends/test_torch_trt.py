"""How torch_tensorrt is asked, against a stand-in for it: the package itself needs TensorRT, which is not here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import Precision, TensorSpec


@pytest.fixture
def torch_trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend over a torch_tensorrt that has the documented parameters and does nothing."""

    def compile(program: Any, *, arg_inputs: Any = None, kwarg_inputs: Any = None, disable_tf32: bool = False, truncate_double: bool = False,
                cache_built_engines: bool = False, reuse_cached_engines: bool = False, use_explicit_typing: bool = True,
                optimization_level: int | None = None, require_full_compilation: bool = False) -> None: ...  # fmt: skip

    fake = ModuleType("torch_tensorrt")
    fake.dynamo = SimpleNamespace(compile=compile)  # type: ignore[attr-defined]
    fake.Input = lambda **kwargs: kwargs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.delitem(sys.modules, "gpuopt.backends.torch_trt", raising=False)
    yield importlib.import_module("gpuopt.backends.torch_trt")
    sys.modules.pop("gpuopt.backends.torch_trt", None)


def test_engines_are_strongly_typed_and_tf32_is_off_unless_asked_for(torch_trt: Any) -> None:
    fp32 = torch_trt._settings({"preset": None, "precision": "fp32", "dynamic": {}}, "fp32")
    assert fp32["use_explicit_typing"] and fp32["disable_tf32"]
    assert not torch_trt._settings({}, "tf32")["disable_tf32"]


def test_presets_and_options_are_parameters_of_the_compiler(torch_trt: Any) -> None:
    assert torch_trt._settings({"preset": "full", "optimization_level": 3}, None)["optimization_level"] == 3
    with pytest.raises(UsageError, match="no preset"):
        torch_trt._settings({"preset": "fastest"}, None)
    with pytest.raises(UsageError, match="no option 'optimisation'"):
        torch_trt._settings({"optimisation": 3}, None)


def test_a_dynamic_dimension_becomes_a_profile_and_a_fixed_input_stays_itself(torch_trt: Any) -> None:
    x, mask = torch.zeros(4, 8), torch.zeros(3)
    accepts = Accepts.of(
        Inputs(args=(x, mask), specs=(TensorSpec.parse("x:float32[N,8]"), TensorSpec.parse("mask:float32[3]"))), {"N": (1, 16)}
    )
    profile = torch_trt._profile(x, 0, accepts)
    assert (profile["min_shape"], profile["opt_shape"], profile["max_shape"]) == ((1, 8), (4, 8), (16, 8))
    assert torch_trt._profile(mask, 1, accepts) is mask


def test_what_cannot_be_says_why(torch_trt: Any) -> None:
    assert "fp64" in torch_trt.supports("module", Precision.FP64, "cuda")
    assert "trt" in torch_trt.supports("onnx", None, "cuda")
    assert torch_trt.supports("module", Precision.FP16, "cuda:0") is None
    assert "GPU" in torch_trt.available("cpu")
