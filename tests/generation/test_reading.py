"""Bytes of a step against sums by hand, and the bounds that follow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.spec import BackendSpec
from gpuopt.generation import WAYS, bounds, reading, resolve, unasked
from gpuopt.generation.stepped import Stepped
from gpuopt.generation.subject import subject
from gpuopt.models import llama_8b_tiny
from gpuopt.programs.ops import attend_one

_spec = importlib.util.spec_from_file_location("generation_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)


def looked(module: Any, batch: int) -> tuple[float, float, Stepped]:
    found = subject(module)
    prompt = _shared.text(batch=batch)
    loop = Stepped(found, WAYS["eager", "static"], batch=batch, prompt_tokens=13, new_tokens=8, stop_at_eos=False, device="cpu")
    return *reading.read(module, loop.step_once(prompt)), loop


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_llama_reads_all_but_the_embedding(batch: int) -> None:
    module = llama_8b_tiny()
    size, flops, loop = looked(module, batch)
    weights = {n: p for n, p in module.named_parameters() if "embed_tokens" not in n}
    rotary = module.get_submodule("model.rotary_emb").inv_freq
    rows = batch * 64 * 2
    assert size == sum(p.numel() * 2 for p in weights.values()) + rows + rotary.numel() * rotary.element_size()
    assert flops == 2 * sum(p.numel() for p in weights.values() if p.dim() > 1)
    assert loop.kv_bytes(13) == 2 * 2 * 2 * 16 * 2 * (13 + 4), "keys and values, layers, heads, width, bytes, mean length"


def test_a_tied_head_is_read_once_and_in_full(make: Callable[[str], Any]) -> None:
    module = make("gpt2")
    apart, _, _ = looked(module, 1)
    module.transformer.wte.weight = module.lm_head.weight
    tied, _, _ = looked(module, 1)
    assert tied == apart


def test_an_encoder_and_the_keys_of_its_output_are_not_read_again(make: Callable[[str], Any]) -> None:
    module = make("t5")
    size, _, _ = looked(module, 1)
    unread = ("EncDecAttention.k.", "EncDecAttention.v.", "relative_attention_bias")
    named = dict(module.decoder.named_parameters()).items()
    weights = 4 * sum(p.numel() for n, p in named if "embed_tokens" not in n and not any(u in n for u in unread))
    head = 4 * module.lm_head.weight.numel()
    assert weights + head <= size <= weights + head + 32 * 4 + 64 * 2 * 4, "and a row of the embedding, and biases of 64 positions"


def test_bounds_are_bytes_over_bandwidth_until_products_take_longer() -> None:
    assert bounds.bound(batch=2, weight_bytes=90.0, kv_bytes=10.0, bandwidth=1000.0) == 20.0
    found = bounds.larger(
        batch=1,
        weight_bytes=1000.0,
        kv_bytes=1.0,
        full_kv_bytes=2.0,
        step_flops=100.0,
        bandwidth=100.0,
        peak=100.0,
        memory_bytes=10_000.0,
        held_bytes=1000.0,
    )
    assert [(b.batch, b.limit) for b in found] == [(4, "memory"), (16, "compute")]
    assert found[0].tokens_per_s == pytest.approx(4 / (1004 / 100))
    assert found[1].tokens_per_s == pytest.approx(16 / 16)
    full = bounds.larger(
        batch=1,
        weight_bytes=1.0,
        kv_bytes=1.0,
        full_kv_bytes=2.0,
        step_flops=0.0,
        bandwidth=100.0,
        peak=None,
        memory_bytes=20.0,
        held_bytes=10.0,
    )
    assert [(b.batch, b.fits) for b in full] == [(4, True), (16, False)]


def test_ways_are_named_and_others_refused() -> None:
    for kind in ("cuda", "cpu", "simulated"):
        assert all(resolve(BackendSpec.parse(name)) for batch in (None, 1, 8) for name in unasked(kind, batch, None))
    for dtype in (None, "float16", "bfloat16"):
        assert set(unasked("cuda", 1, dtype)) - set(unasked("cuda", 8, dtype)) == {"inductor:gemv"}, "which takes products of one row"
    assert unasked("cuda", 1, "float32") == unasked("cuda", 8, None)
    assert unasked("cpu", 1, None) == unasked("cpu", None, None)
    assert resolve(BackendSpec.parse("eager")).shipped
    with pytest.raises(UsageError, match="trt does not generate"):
        resolve(BackendSpec.parse("trt"))
    with pytest.raises(UsageError, match="no options"):
        resolve(BackendSpec.parse("inductor:max_autotune=true"))


def test_the_guide_tells_of_every_way_and_of_what_the_kernels_take() -> None:
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    for (name, preset), way in WAYS.items():
        assert f"| `{name}:{preset}` | {way.told('cuda:0')} |" in text or f"| `{name}` | {way.told('cuda:0')} |" in text, (name, preset)
    assert "CUDA graphs" not in " ".join(WAYS["inductor", preset].told("cpu") for preset in (None, "tuned"))
    assert f"up to {attend_one.MOST_KEYS:,} positions" in text


def test_weights_made_of_other_tensors_are_counted_as_those() -> None:
    assert reading.held(torch.nn.Linear(4, 4, bias=False)) == 64
