"""Weights laid one by one: in any order, into anybody's memory, by several threads, and always the same."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import gpuopt.models
from gpuopt.models.laid import TINY_BANK, Laid

NAMES = ("llama_8b_tiny", "llama_70b_half_tiny", "t5_11b_tiny")


@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_in_any_order_and_by_threads_they_are_those_of_the_whole_model(name):
    whole = dict(getattr(gpuopt.models, name)().named_parameters(remove_duplicate=False))
    laid = getattr(gpuopt.models, name).laid()
    names = sorted(whole)
    random.Random(3).shuffle(names)

    def filled(key):
        target = torch.full(whole[key].shape, math.nan, dtype=whole[key].dtype)
        laid.fill(key, target)
        return torch.equal(target, whole[key])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(filled, names))
    assert all(p.is_meta for p in laid.module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_what_lies_there(name):
    laid = getattr(gpuopt.models, name).laid()
    for key, parameter in laid.module.named_parameters():
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        laid.fill(key, value)
        for start in {0, value.numel() // 2, max(0, value.numel() - 5)}:
            assert torch.equal(laid.sample(key, start, 5), value.view(-1)[start : start + 5])


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_scatters_as_transformers_would_draw_it(name):
    whole = getattr(gpuopt.models, name)()
    drawn = type(whole)(whole.config)
    theirs = dict(drawn.named_parameters())
    for key, parameter in whole.named_parameters():
        if theirs[key].numel() >= 500:
            assert parameter.float().std().item() == pytest.approx(theirs[key].std().item(), rel=0.15, abs=1e-9), key
        else:
            assert (parameter == 1).all() == (theirs[key] == 1).all(), key


def test_no_two_weights_of_a_size_near_the_banks_are_alike():
    module = nn.Sequential(*(nn.Linear(TINY_BANK + extra, 1, bias=False, device="meta") for extra in (0, 0, 3, 12, 0)))
    model = Laid(module, lambda name, parameter: 1.0).materialize()
    rows = torch.stack([part.weight.view(-1)[: TINY_BANK - 64] for part in model])
    for shift in range(-50, 51):
        apart = torch.corrcoef(torch.stack([*rows[:, 64:-64], *rows[:, 64 + shift : rows.shape[1] - 64 + shift]]))
        apart.fill_diagonal_(0.0)
        apart[:5, 5:].fill_diagonal_(0.0)
        apart[5:, :5].fill_diagonal_(0.0)
        assert apart.abs().max() < 0.1


def test_memory_that_is_not_contiguous_and_other_shapes():
    laid = gpuopt.models.llama_8b_tiny.laid()
    name = "model.layers.0.mlp.up_proj.weight"
    plain = torch.empty(128, 64, dtype=torch.bfloat16)
    laid.fill(name, plain)
    turned = torch.empty(64, 128, dtype=torch.bfloat16).t()
    laid.fill(name, turned)
    assert torch.equal(plain, turned)
    with pytest.raises(ValueError, match="up_proj"):
        laid.fill(name, torch.empty(128, 64))
    with pytest.raises(ValueError, match="up_proj"):
        laid.fill(name, torch.empty(64, 128, dtype=torch.bfloat16))


def test_some_first_and_the_rest_later_and_ties_stay():
    laid = gpuopt.models.t5_11b_tiny.laid()
    laid.materialize(["shared.weight"])
    assert [name for name, p in laid.module.named_parameters() if not p.is_meta] == ["shared.weight"]
    kept = laid.module.shared.weight
    model = laid.materialize()
    assert model.shared.weight is kept is model.encoder.embed_tokens.weight is model.lm_head.weight
    assert not any(p.is_meta for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
