"""Large draws from a bank: the same distributions, the same every time, and far fewer numbers drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpuopt.models.drawing import BANK, LARGE, BankedDraws
from gpuopt.models.factory import factory

SHAPE = (1500, 1000)


def banked(fill, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    target = torch.full(SHAPE, math.nan, dtype=dtype)
    with BankedDraws() as draws:
        fill(target)
    assert draws.num_laid == target.numel()
    return target


FILLS = {
    "normal": (lambda t: t.normal_(0.5, 2.0), 0.5, 2.0),
    "normal by name": (lambda t: t.normal_(std=0.02), 0.0, 0.02),
    "uniform": (lambda t: t.uniform_(2.0, 5.0), 3.5, 3.0 / math.sqrt(12)),
    "uniform of 0 to 1": (lambda t: t.uniform_(), 0.5, 1.0 / math.sqrt(12)),
    "nn.init.normal_": (lambda t: nn.init.normal_(t, std=0.1), 0.0, 0.1),
    "kaiming": (nn.init.kaiming_uniform_, 0.0, math.sqrt(2 / SHAPE[1])),
    "xavier": (nn.init.xavier_normal_, 0.0, math.sqrt(2 / sum(SHAPE))),
    "truncated": (lambda t: nn.init.trunc_normal_(t, std=0.02), 0.0, 0.02),
}


@pytest.mark.parametrize("name", FILLS)
def test_a_bank_has_the_moments_of_what_it_stands_for_and_no_two_rows_alike(name):
    fill, mean, std = FILLS[name]
    found = banked(fill)
    assert found.isfinite().all()
    assert found.double().mean().item() == pytest.approx(mean, abs=4e-3 * std)
    assert found.double().std().item() == pytest.approx(std, rel=4e-3)
    assert len({row.numpy().tobytes() for row in found}) == SHAPE[0]


def test_a_uniform_draw_stays_within_its_bounds():
    found = banked(lambda t: t.uniform_(2.0, 5.0))
    assert found.min() >= 2.0
    assert found.max() <= 5.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_filled_in_their_own(dtype):
    found = banked(lambda t: t.normal_(std=0.02), dtype)
    assert found.dtype == dtype
    assert found.double().std().item() == pytest.approx(0.02, rel=1e-2)


def test_a_tensor_that_is_not_contiguous_is_filled_where_it_lies_and_nowhere_else():
    torch.manual_seed(0)
    whole = torch.zeros(1000, 3000)
    with BankedDraws():
        whole[:, ::2].normal_()
        turned = torch.empty(1000, 1500).t().normal_()
    assert whole[:, 1::2].eq(0).all()
    assert whole[:, ::2].std().item() == pytest.approx(1.0, rel=5e-3)
    assert turned.std().item() == pytest.approx(1.0, rel=5e-3)


def test_the_seed_decides_and_two_layers_of_one_shape_differ():
    assert torch.equal(banked(lambda t: t.normal_()), banked(lambda t: t.normal_()))
    assert not torch.equal(banked(lambda t: t.normal_()), banked(lambda t: t.normal_(), seed=1))
    with BankedDraws():
        first, second = (torch.empty(SHAPE).normal_() for _ in range(2))
    assert not (first == second).all(1).any()
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()) < 0.01


def test_small_draws_and_those_that_name_a_generator_are_what_they_were():
    def draw():
        return [torch.empty(LARGE).normal_(), torch.empty(SHAPE).normal_(generator=torch.Generator().manual_seed(3)), torch.rand(5)]

    torch.manual_seed(0)
    plain = draw()
    torch.manual_seed(0)
    with BankedDraws() as draws:
        inside = draw()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert draws.num_drawn == 0


def test_what_torch_refuses_is_still_refused():
    with BankedDraws(), pytest.raises(RuntimeError, match="std >= 0"):
        torch.empty(SHAPE).normal_(std=-1.0)
    with BankedDraws(), pytest.raises(RuntimeError, match="from"):
        torch.empty(SHAPE).uniform_(1.0, 0.0)


def test_meta_tensors_are_left_alone():
    with BankedDraws() as draws, torch.device("meta"):
        nn.Linear(4096, 4096)
    assert (draws.num_drawn, draws.num_laid) == (0, 0)


def test_a_factory_draws_one_bank_of_a_kind_whatever_the_model_has(monkeypatch):
    seen = []
    leave = BankedDraws.__exit__

    def noted(self, *error):
        seen.append((self.num_drawn, self.num_laid))
        leave(self, *error)

    monkeypatch.setattr(BankedDraws, "__exit__", noted)

    @factory("x:float32[N,1500]")
    def wide():
        return nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(6)))

    model = wide()
    assert seen == [(BANK, 6 * 1500 * 1500)]
    assert model(torch.ones(2, 1500)).isfinite().all()
    assert torch.equal(model[3].weight, wide()[3].weight)
