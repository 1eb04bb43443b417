"""No mask is built where none is given; what is given stays, and outputs are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gpuopt.models
from gpuopt.converters.rewrites import no_mask
from gpuopt.core.errors import Unsupported

MASKLESS = ("swin",)
WINDOWED = ("qwen2-window",)


def test_outputs_are_the_same_and_the_graph_builds_no_mask(kind: str, zoo: Any) -> None:
    module, given = zoo.built(kind)
    if kind in MASKLESS:
        with pytest.raises(Unsupported, match="takes no mask"):
            zoo.rewritten(module, given, "no_mask")
        return
    want = zoo.outputs(module, given)
    changed = zoo.rewritten(module, given, "no_mask").module
    assert zoo.same(zoo.outputs(changed, given), want)
    ops = zoo.exported_ops(changed, given)
    assert "aten.scaled_dot_product_attention.default" in ops
    if kind not in WINDOWED:  # a window shorter than the text is a pattern no kernel knows
        assert not zoo.stacks_a_mask([op for op in ops if kind != "t5" or "ge.Scalar" not in op])
    assert zoo.stacks_a_mask(zoo.exported_ops(module, given))


@pytest.mark.parametrize("kind", ["bert", "llama-no-cache"])
def test_a_compiled_graph_is_whole_has_no_mask_and_gives_the_same(kind: str, zoo: Any) -> None:
    module, given = zoo.built(kind)
    changed = zoo.rewritten(module, given, "no_mask").module
    assert zoo.same(zoo.outputs(zoo.compiled(changed), given), zoo.outputs(module, given))


@pytest.mark.parametrize("kind", ["bert", "bert-decoder", "llama", "llama-no-cache", "gpt2-no-cache", "qwen2", "t5", "distilbert"])
def test_a_mask_that_is_given_still_holds(kind: str, zoo: Any) -> None:
    module, given = zoo.built(kind)
    changed = zoo.rewritten(module, given, "no_mask").module
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    masked = {**given, "attention_mask": mask}
    want = zoo.outputs(module, masked)
    assert zoo.same(zoo.outputs(changed, masked), want)
    assert not zoo.same(zoo.outputs(changed, given), want)
    assert zoo.stacks_a_mask(zoo.exported_ops(changed, masked)) or "aten.bitwise_and.Tensor" in zoo.exported_ops(changed, masked)


def test_packed_sequences_that_are_given_by_their_positions_stay_apart(zoo: Any) -> None:
    module, given = zoo.built("llama-no-cache")
    changed = zoo.rewritten(module, given, "no_mask").module
    packed = {**given, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)}
    want = zoo.outputs(module, packed)
    assert zoo.same(zoo.outputs(changed, packed), want)
    assert not zoo.same(zoo.outputs(changed, given), want)


def test_a_step_with_a_cache_gives_what_it_gave(zoo: Any) -> None:
    module, given = zoo.built("llama")
    changed = zoo.rewritten(module, given, "no_mask").module

    def two_steps(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(input_ids=given["input_ids"][:, :4]).past_key_values
            more = model(input_ids=given["input_ids"][:, 4:6], past_key_values=cache)
            logits: torch.Tensor = model(input_ids=given["input_ids"][:, 6:], past_key_values=more.past_key_values).logits
            return logits

    assert zoo.same([two_steps(changed)], [two_steps(module)])


def test_a_copy_keeps_it_and_the_original_and_other_models_never_had_it(zoo: Any) -> None:
    module, given = zoo.built("bert")
    changed = zoo.rewritten(module, given, "no_mask").module
    twin = copy.deepcopy(changed)
    assert not zoo.stacks_a_mask(zoo.exported_ops(twin, given))
    assert module.config._attn_implementation == "sdpa"
    assert zoo.stacks_a_mask(zoo.exported_ops(zoo.built("bert")[0], given))


def test_other_lengths_than_the_sample_are_as_good(zoo: Any) -> None:
    module, given = zoo.built("qwen2-window")
    changed = zoo.rewritten(module, given, "no_mask").module
    for length in (1, 3, 4, 5, 7):
        cut = {"input_ids": given["input_ids"][:, :length]}
        assert zoo.same(zoo.outputs(changed, cut), zoo.outputs(module, cut)), length


def test_what_it_does_not_fit_is_told() -> None:
    assert no_mask.applies(nn.Linear(2, 2)) == "it is no transformers model"
    assert no_mask.applies(gpuopt.models.resnet101_tiny()) == "it has no attention"
    eager = gpuopt.models.bert_large_tiny()
    eager.set_attn_implementation("eager")
    assert no_mask.applies(eager) == "its attention is eager, not sdpa"
    with torch.device("meta"):
        assert no_mask.applies(gpuopt.models.bert_large_tiny()) is None
