"""Padding and causality against counts of the same model on what is real."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count, OpRecord
from gpuopt.profiling.count import count, summarize
from gpuopt.profiling.roofline import ImpossibleFigure, whole
from gpuopt.profiling.useful import Tokens, causal_modules, of_call, tokens, useful

HIDDEN, LAYERS, WIDTH = 32, 2, 12


def bert(**changes):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=64, vocab_size=50, **changes)
    return BertModel(config, add_pooling_layer=False).eval()


def batch(lengths, width=WIDTH):
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return Inputs(kwargs={"input_ids": torch.zeros(len(lengths), width, dtype=torch.int64), "attention_mask": mask})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(12, 3, 7), (1, 1, 1), (12, 12, 11)])
def test_padding_is_what_a_run_of_each_sample_by_itself_would_not_do(lengths, attention):
    model = bert(attn_implementation=attention)
    inputs = batch(lengths)
    found = of_call(count(model, inputs), model, inputs)
    alone = sum(count(model, batch([n], n)).flops for n in lengths)
    assert found.flops_useful == pytest.approx(alone)
    assert found.flops_padding == pytest.approx(count(model, inputs).flops - alone)
    assert found.real_tokens == pytest.approx(sum(lengths) / 36)
    assert "of the FLOPs are spent on padding" in found.reasons[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal_attention_needs_half_its_pairs_and_the_diagonal(attention):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=50,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    assert causal_modules(model) == {f"layers.{i}.self_attn" for i in range(2)}
    inputs = Inputs(kwargs={"input_ids": torch.zeros(3, 8, dtype=torch.int64), "use_cache": False})
    found = of_call(count(model, inputs), model, inputs)
    assert found.flops_causal == pytest.approx(2 * 4 * 3 * 8 * 8 * 32 * (1 - (8 * 9 / 2) / 64))
    assert found.flops_padding == 0
    assert found.flops_useful == pytest.approx(found.flops - found.flops_causal)


def attention_record(query, key, flops=1e6):
    return OpRecord(
        op="aten._scaled_dot_product_flash_attention", module="a", dtype="float16", flops=flops, shapes=f"{query}, {key}, {key}"
    )


@pytest.mark.parametrize(
    "query, key, causal, share",
    [
        ("2x4x1x8", "2x4x100x8", True, 1.0),  # one decoding step sees every key
        ("2x4x4x8", "2x4x8x8", True, (4 * 8 - 6) / 32),  # a chunk after a cache of four
        ("2x4x8x8", "2x4x8x8", False, 1.0),
        ("2x4x10x8", "2x4x8x8", True, 1.0),  # more queries than keys: no causal form is known
    ],
)
def test_the_masked_pairs_depend_on_queries_and_keys(query, key, causal, share):
    found = useful(summarize((attention_record(query, key),), method=""), None, frozenset({"a"} if causal else ()))
    assert (found.flops_useful if found else 1e6) == pytest.approx(1e6 * share)


def test_cross_attention_is_useful_by_its_real_keys():
    found = useful(summarize((attention_record("2x4x5x8", "2x4x10x8"),), method=""), Tokens(lengths=(10, 5), width=10))
    assert found.flops_useful == pytest.approx(0.75e6)


def test_what_does_not_run_over_tokens_counts_in_full():
    pooler = OpRecord(op="aten.addmm", module="pooler", dtype="float16", flops=100.0, shapes="32, 2x32, 32x32")
    tokenwise = OpRecord(op="aten.addmm", module="fc", dtype="float16", flops=100.0, shapes="32, 20x32, 32x32")
    found = useful(summarize((pooler, tokenwise), method=""), Tokens(lengths=(5, 5), width=10))
    assert found.flops_useful == pytest.approx(150.0)


def test_nothing_is_said_where_nothing_is_known():
    model, full = bert(), batch([12, 12])
    assert of_call(count(model, full), model, full) is None
    assert useful(summarize((), method="")) is None


@pytest.mark.parametrize(
    "name, mask, lengths",
    [
        ("attention_mask", torch.tensor([[1, 1, 0], [1, 0, 0]]), (2, 1)),
        ("attention_mask", torch.tensor([[True, True, False]]), (2,)),
        ("attention_mask", torch.tensor([[0.0, -1e9]]), None),  # additive
        ("attention_mask", torch.ones(1, 1, 3, 3), None),
        ("attention_mask", torch.ones(1, 3, device="meta"), None),
        ("src_key_padding_mask", torch.tensor([[False, True, True]]), (1,)),
        ("noise", torch.tensor([[1, 0]]), None),
    ],
)
def test_a_mask_is_known_by_its_name_and_its_values(name, mask, lengths):
    found = tokens(None, Inputs(kwargs={name: mask}))
    assert (found.lengths if found else None) == lengths


def test_a_positional_mask_is_found_by_the_forwards_own_name_for_it():
    class Model(nn.Module):
        def forward(self, x, attention_mask):
            return x

    assert tokens(Model(), Inputs(args=(torch.zeros(1, 2), torch.tensor([[1, 0]])))).lengths == (1,)


def bert_large_at_mlperf(real_share: float) -> tuple[Count, object]:
    """One sample of 384 padded tokens, its FLOPs as MLPerf's samples a second are multiplied with them."""
    rows = OpRecord(op="aten.addmm", module="fc", dtype="int8", flops=246.4e9, shapes="1024, 384x1024, 1024x1024")
    counted = summarize((rows,), method="")
    return counted, useful(counted, Tokens(lengths=(round(384 * real_share),), width=384))


def test_padding_counted_as_work_is_refused_by_that_name(h200):
    """field.md 5.2: 9,164 samples/s times the FLOPs of 384 padded tokens is 114% of an H200's int8 peak."""
    counted, found = bert_large_at_mlperf(0.45)
    with pytest.raises(
        ImpossibleFigure,
        match=r"114% of the spec peak.*padding counted as work \(attention_mask calls 45% of 384 tokens real.*are 51% of the peak",
    ):
        whole(counted, 1 / 9164, h200, useful=found)


def test_padding_that_does_not_explain_it_is_not_the_excuse(h200):
    counted, found = bert_large_at_mlperf(0.95)
    with pytest.raises(ImpossibleFigure, match="still too many"):
        whole(counted, 1 / 9164, h200, useful=found)
    with pytest.raises(ImpossibleFigure, match=r"the count \(padding\? sparsity\?\)"):
        whole(counted, 1 / 9164, h200)


def test_a_believable_figure_comes_with_its_useful_part(h200):
    counted, found = bert_large_at_mlperf(0.5)
    rate = whole(counted, 1e-3, h200, useful=found)
    assert (rate.tflops, rate.tflops_useful) == (pytest.approx(246.4), pytest.approx(123.2))
    assert "spent on padding" in rate.ceiling_note
    assert whole(counted, 1e-3, h200).tflops_useful is None
