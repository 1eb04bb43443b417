"""A model built on the device it will run on: the same weights, and none of the large ones ever in the host's memory."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gpuopt.models
from gpuopt.models import drawing, factory, laid
from gpuopt.models.drawing import BankedDraws

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.zoo import tiny

_spec = importlib.util.spec_from_file_location("far", Path(__file__).with_name("far.py"))
far = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(far)

OURS = ("resnet101_tiny", "bert_large_tiny", "t5_large_tiny", "llama_8b_tiny", "llama_70b_half_tiny", "t5_11b_tiny")
ZOO = tuple(name for name, value in vars(tiny).items() if hasattr(value, "input_specs"))
ON_HOST = {"mobilenet_v2", "efficientnet_b0"}
"""Their constructors run the model, to know its statistics."""


@pytest.fixture
def small(monkeypatch):
    """Small tensors and banks count as large ones."""
    for name, value in (("LARGE", 100), ("BANK", 4099), ("STEP", 2533)):
        monkeypatch.setattr(drawing, name, value)
    monkeypatch.setattr(factory, "room_bytes", lambda device: None)
    monkeypatch.setattr(laid, "room_bytes", lambda device: None)


def both(made):
    with far.OneGpu() as host:
        plain = made()
        host.largest_on_host = 0
        there = made.on_device("cuda:0")
    return plain, there, host


def require_equal(plain, there):
    ours, theirs = plain.state_dict(), there.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(far.near(ours[name]), far.near(theirs[name])), name


@pytest.mark.parametrize("name", [*OURS, *(f"zoo.{name}" for name in ZOO)])
def test_the_weights_are_the_hosts_bit_for_bit_and_no_large_one_was_made_there(name, small):
    made = getattr(tiny, name.removeprefix("zoo.")) if name.startswith("zoo.") else getattr(gpuopt.models, name)
    plain, there, host = both(made)
    require_equal(plain, there)
    if name.removeprefix("zoo.") in ON_HOST:
        assert not any(isinstance(p, far.Far) for p in there.parameters())
        return
    assert all(p.device == far.PLACE for p in there.parameters())
    assert not any(part.training for part in there.modules())
    assert host.largest_on_host <= (laid.TINY_BANK + 1 if hasattr(made, "laid") else drawing.BANK)


def layers(fill):
    @factory.factory("x:float32[N,40]")
    def build():
        model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
        for part in model:
            fill(part.weight.detach())
        return model

    return build


FILLS = {
    "uniform": lambda t: t.uniform_(2.0, 5.0),
    "truncated": lambda t: nn.init.trunc_normal_(t, std=0.02),
    "truncated as torch 2.11 does": lambda t: t.uniform_(-0.95, 0.95).erfinv_().mul_(0.02).add_(0.5).clamp_(0.45, 0.55),
    "columns": lambda t: t.t().normal_(0.5, 2.0),
    "a generator of its own": lambda t: t.normal_(generator=torch.Generator().manual_seed(3)),
    "a draw of another kind": lambda t: t.exponential_(),
}


@pytest.mark.parametrize("name", FILLS)
def test_every_way_to_draw_gives_the_hosts_values(name, small):
    plain, there, _ = both(layers(FILLS[name]))
    require_equal(plain, there)
    assert all(p.device == far.PLACE for p in there.parameters())
    assert not torch.equal(plain[0].weight, plain[1].weight) or name == "a generator of its own"


def test_the_error_function_of_a_uniform_draw_is_computed_once_on_the_bank():
    torch.manual_seed(0)
    with BankedDraws():
        found = torch.empty(1500, 1000).uniform_(-0.9, 0.9).erfinv_()
        untouched = torch.full((1500, 1000), 0.5).erfinv_()
    assert found.isfinite().all()
    assert found.std().item() == pytest.approx(torch.empty(10**6).uniform_(-0.9, 0.9).erfinv_().std().item(), rel=1e-2)
    assert untouched.sub(0.4769363).abs().max() < 1e-6


def test_a_constructor_that_computes_with_its_weights_is_run_on_the_host(small):
    @factory.factory("x:float32[N,40]")
    def build():
        model = nn.Linear(40, 40)
        model.scale = model(torch.ones(2, 40)).abs().max()
        return model

    plain, there, _ = both(build)
    require_equal(plain, there)
    assert all(p.device.type == "cpu" for p in there.parameters())


@pytest.mark.parametrize("draw", [torch.randn_like, lambda t: nn.functional.dropout(t, 0.5)])
def test_random_functions_of_weights_draw_on_the_host_too(draw, small):
    plain, there, _ = both(layers(lambda t: t.copy_(draw(t))))
    require_equal(plain, there)


def test_a_model_without_room_is_built_on_the_host(small, monkeypatch):
    monkeypatch.setattr(factory, "room_bytes", lambda device: 4 * 40 * 40 * 4 - 1)
    _, there, _ = both(layers(lambda t: t.normal_()))
    assert all(p.device.type == "cpu" for p in there.parameters())
    monkeypatch.setattr(factory, "room_bytes", lambda device: 4 * 40 * 40 * 4)
    _, there, _ = both(layers(lambda t: t.normal_()))
    assert all(p.device == far.PLACE for p in there.parameters())


def test_what_is_wrong_with_a_model_is_said_as_ever(small):
    @factory.factory("x:float32[N,40]")
    def build():
        nn.Linear(40, 40)
        raise RuntimeError("no such layer")

    with far.OneGpu(), pytest.raises(RuntimeError, match="no such layer"):
        build.on_device("cuda:0")


def test_integers_small_tensors_and_what_is_asked_for_elsewhere_stay(small):
    with far.OneGpu(), BankedDraws("cuda:0"):
        assert torch.empty(1000, dtype=torch.int64).device.type == "cpu"
        assert torch.empty(100).device.type == "cpu"
        assert torch.zeros(1000).device.type == "cpu"
        assert torch.empty(1000, device="meta").device.type == "meta"
        assert torch.empty(1000).device == far.PLACE
        assert torch.empty(1000, dtype=torch.bfloat16, device="cpu").device == far.PLACE


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*OURS, *(f"zoo.{name}" for name in ZOO)])
def test_a_real_gpu_holds_the_hosts_values_bit_for_bit(name, small):
    made = getattr(tiny, name.removeprefix("zoo.")) if name.startswith("zoo.") else getattr(gpuopt.models, name)
    plain, there = made(), made.on_device("cuda:0")
    ours, theirs = plain.state_dict(), there.state_dict()
    assert name.removeprefix("zoo.") in ON_HOST or all(p.device == far.PLACE for p in there.parameters())
    # Norms of a weight_norm are sums: a GPU adds in another order.
    sums = {key for key in ours if key.endswith("parametrizations.weight.original0")}
    assert [key for key in ours if key not in sums and not torch.equal(ours[key], theirs[key].cpu())] == []
    for key in sums:
        torch.testing.assert_close(theirs[key].cpu(), ours[key], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "seconds"), [("bert_large", 3), ("t5_large", 4), ("llama_8b", 4)])
def test_a_real_gpu_is_filled_in_seconds_and_the_host_stays_small(name, seconds):
    getattr(gpuopt.models, f"{name}_tiny").on_device("cuda:0")  # imports, and the GPU's own start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    model = getattr(gpuopt.models, name).on_device("cuda:0")
    torch.cuda.synchronize()
    assert time.monotonic() - began < seconds
    assert all(p.device == far.PLACE for p in model.parameters())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
