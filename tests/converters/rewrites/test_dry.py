"""A call that is not made: on fake tensors of the CPU, wherever the module lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpuopt.models
from gpuopt.converters.rewrites import dry, implementations
from gpuopt.core.live import Inputs
from gpuopt.models import drawing, factory, laid

_spec = importlib.util.spec_from_file_location("far", Path(__file__).parents[2] / "models" / "far.py")
assert _spec is not None and _spec.loader is not None
far = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(far)


def placed(made: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(drawing, "LARGE", 100)
    monkeypatch.setattr(factory, "room_bytes", lambda device: None)
    monkeypatch.setattr(laid, "room_bytes", lambda device: None)
    with far.OneGpu():
        module: nn.Module = made.on_device("cuda:0")
    assert all(isinstance(p, far.Far) for p in module.parameters())
    return module


IDS = torch.randint(99, (2, 7))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("bert_large_tiny", {}), ("llama_8b_tiny", {}), ("t5_large_tiny", {"decoder_input_ids": IDS})],
)
def test_a_module_on_a_gpu_is_dry_run_on_the_cpu(name: str, kwargs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = placed(getattr(gpuopt.models, name), monkeypatch)
    calls: list[str] = []
    watched = [part for part in module.modules() if isinstance(part, nn.Linear)]

    def watch(twin: nn.Module) -> list[str]:
        for part in twin.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(lambda part, args, out: calls.append(out.device.type))
        return calls

    assert dry.faked(module, Inputs(args=(IDS,), kwargs=kwargs), watch) is calls
    assert calls.count("cpu") == len(calls) >= len(watched)
    assert all(isinstance(p, far.Far) for p in module.parameters())


def test_recurrent_layers_read_the_weights_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    @factory.factory("x:float32[N,5,16]")
    def build() -> nn.Module:
        return nn.LSTM(16, 24, batch_first=True)

    outputs, _ = dry.faked(placed(build, monkeypatch), Inputs(args=(torch.zeros(2, 5, 16),)))
    assert outputs.shape == (2, 5, 24) and outputs.device.type == "cpu"


def test_a_kernel_of_halves_on_gpus_does_not_refuse_a_module_that_is_not_cast_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
            return implementations.attend("flash", rows, rows, rows, None, is_causal=False, scale=None)

    module = placed(factory.factory("x:float32[N,5,16]")(Attends), monkeypatch)
    assert dry.faked(module, Inputs(args=(torch.zeros(2, 5, 16),))).shape == (2, 2, 5, 8)
