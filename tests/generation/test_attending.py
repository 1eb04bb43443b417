"""Attention of one token against scaled-dot-product attention in fp64; who is given it, and that the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gpuopt.generation import attending
from gpuopt.generation.loop import SMALLEST_SPLIT, largest
from gpuopt.generation.masks import added
from gpuopt.programs.ops import attend_one


def drawn(*, batch: int = 2, heads: int = 8, held: int = 2, length: int = 37, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, heads, 1, width), (batch, held, length, width), (batch, held, length, width))
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.mark.parametrize("held", [8, 2, 1])
@pytest.mark.parametrize("masked", ["none", "added", "bool"])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_attention(held: int, masked: str, biased: bool) -> None:
    query, key, value = drawn(held=held)
    seen = torch.arange(37)[None, None, None] <= torch.tensor([20, 5])[:, None, None, None]
    mask = {"none": None, "added": added(seen, torch.float32), "bool": seen}[masked]
    bias = torch.randn(1, 8, 1, 37, generator=torch.Generator().manual_seed(1)) if biased else None
    module: Any = SimpleNamespace(num_key_value_groups=8 // held, is_causal=True)
    got, _ = attending.one_token(module, query, key, value, mask, scaling=0.3, position_bias=bias)
    whole = torch.zeros(2, 8, 1, 37, dtype=torch.float64) if bias is None else bias.double().expand(2, -1, -1, -1)
    if mask is not None:
        whole = whole.masked_fill(~seen, float("-inf"))
    spread = [t.double().repeat_interleave(8 // held, 1) for t in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *spread, attn_mask=whole, scale=0.3)
    torch.testing.assert_close(got.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_many_queries_and_long_caches_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(attending, "sdpa_attention_forward", lambda *a, **k: asked.append(a) or sdpa_attention_forward(*a, **k))
    query, key, value = drawn(held=8)
    module: Any = SimpleNamespace(is_causal=True)
    attending.one_token(module, query.expand(-1, -1, 4, -1), key, value, None)
    assert len(asked) == 1
    monkeypatch.setattr(attending, "MOST_KEYS", 2 * 37 - 1)
    attending.one_token(module, query, key, value, None)
    assert len(asked) == 2
    monkeypatch.setattr(attending, "MOST_KEYS", 2 * 37)
    attending.one_token(module, query, key, value, None)
    assert len(asked) == 2


@pytest.mark.parametrize("masked", ["none", "added", "bool"])
def test_in_one_launch_it_is_the_same(monkeypatch: pytest.MonkeyPatch, masked: str) -> None:
    """The kernel's definition, which a GPU test holds the kernel against."""
    asked: list[Any] = []
    attend = attend_one.attend_one
    monkeypatch.setattr(attend_one, "takes", lambda query, *_: query.shape[2] == 1)
    monkeypatch.setattr(attend_one, "attend_one", lambda *given: asked.append(given) or attend(*given))
    query, key, value = drawn()
    seen = torch.arange(40)[None, None, None] <= torch.tensor([20, 5])[:, None, None, None]
    mask = {"none": None, "added": added(seen, torch.float32), "bool": seen}[masked]
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    for more in ({}, {"scaling": 0.3}):
        got, wanted = (f(module, query, key, value, mask, **more)[0] for f in (attending.in_one_launch, attending.one_token))
        torch.testing.assert_close(got, wanted)
    assert len(asked) == 2
    bias = torch.zeros(1, 8, 1, 37)
    attending.in_one_launch(module, query, key, value, mask, position_bias=bias)
    assert len(asked) == 2, "a bias is left to the three reductions"


def test_a_cpu_has_no_such_launch() -> None:
    query, key, value = (t.half() for t in drawn())
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    assert torch.equal(*(f(module, query, key, value, None)[0] for f in (attending.in_one_launch, attending.one_token)))


@pytest.mark.parametrize("name", ["mistral", "t5", "whisper", "gpt2", "gemma"])
def test_models_are_given_it_and_get_their_own_back(make: Callable[[str], Any], name: str) -> None:
    module = make(name)
    own = module.config._attn_implementation
    with pytest.raises(ValueError, match="inside"), attending.in_place(module):
        assert module.config._attn_implementation == (attending.NAME if own == "sdpa" else own)
        raise ValueError("inside")
    assert module.config._attn_implementation == own
    with attending.in_place(module, launched=True):
        assert module.config._attn_implementation == (attending.LAUNCHED if own == "sdpa" else own)
    assert module.config._attn_implementation == own


@pytest.mark.parametrize("size", [5, SMALLEST_SPLIT, 9973, 32128, 128256])
def test_the_largest_in_two_steps_is_the_first_largest(size: int) -> None:
    values = torch.randint(0, 50, (3, size), generator=torch.Generator().manual_seed(size)).float()
    expected = [int((row == row.max()).nonzero()[0]) for row in values]
    assert largest(values).tolist() == expected, "many are equal: the first one counts"
    values[1, size // 2] = float("nan")
    assert int(largest(values)[1]) == size // 2
