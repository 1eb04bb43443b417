"""Casts: integers stay integers, ties stay tied, kept modules stay kept, and TF32 is a switch that is put back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gpuopt.models
from gpuopt.converters import apply, precision
from gpuopt.core.errors import UsageError
from gpuopt.core.spec import Precision, Transforms

HALF = (Precision.FP16, Precision.BF16)


def cast_of(model, to, **transforms):
    return apply(model, to, Transforms(**transforms))


@pytest.mark.parametrize("to", [Precision.FP64, *HALF])
def test_every_weight_is_cast_and_the_original_is_left_alone(bert, to):
    model, inputs = bert
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    changed = cast_of(model, to)
    dtype = getattr(torch, to.dtype)
    assert {p.dtype for p in changed.module.parameters()} == {dtype}
    assert changed.dtype == to.dtype and f"cast to {to.dtype}" in changed.notes
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in model.module.state_dict().items()
    )
    assert model.notes == []
    assert changed.module(*inputs.args).last_hidden_state.dtype == dtype


def test_integer_and_boolean_buffers_stay_what_they_are():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("ids", torch.arange(5))
            self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
            self.register_buffer("codes", torch.ones(3, dtype=torch.uint8))
            self.register_buffer("scale", torch.ones(3))
            self.register_buffer("turns", torch.ones(3, dtype=torch.complex64))
            self.register_buffer("quantised", torch.ones(3).to(torch.float8_e4m3fn))

    module = Holder()
    precision.cast(module, Precision.FP16)
    assert {name: str(b.dtype).removeprefix("torch.") for name, b in module.named_buffers()} == {
        "ids": "int64",
        "mask": "bool",
        "codes": "uint8",
        "scale": "float16",
        "turns": "complex64",
        "quantised": "float8_e4m3fn",
    }


@pytest.mark.parametrize("to", [Precision.FP64, *HALF])
def test_one_parameter_under_three_names_stays_one(t5, to):
    model, _ = t5
    module = cast_of(model, to).module
    assert module.shared.weight is module.encoder.embed_tokens.weight is module.decoder.embed_tokens.weight
    assert module.shared.weight.data_ptr() != model.module.shared.weight.data_ptr()


@pytest.mark.parametrize("to", HALF)
def test_a_masked_language_models_head_stays_tied_to_its_embedding(make, to):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, tie_word_embeddings=True
    )
    module = cast_of(make(BertForMaskedLM(config).eval()), to).module
    assert module.cls.predictions.decoder.weight.data_ptr() == module.bert.embeddings.word_embeddings.weight.data_ptr()
    module.bert.embeddings.word_embeddings.weight.data.zero_()
    assert not module.cls.predictions.decoder.weight.any()


def test_two_parameters_over_one_memory_stay_joined(make):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = nn.Parameter(self.a.weight.data)

    module = cast_of(make(Shared()), Precision.FP16).module
    assert module.a.weight is not module.b.weight
    assert module.a.weight.data_ptr() == module.b.weight.data_ptr()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.sampled_from([Precision.FP64, *HALF]))
def test_any_pattern_of_ties_survives(owners, to):
    """Layer i uses the weight of layer owners[i], as the same Parameter or as another one over its memory."""
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in owners)
    for index, owner in enumerate(owners):
        if owner < index:
            layers[index].weight = layers[owner].weight if index % 2 else nn.Parameter(layers[owner].weight.data)
    pattern = [[a.weight.data_ptr() == b.weight.data_ptr() for a in layers] for b in layers]
    values = [layer.weight.detach().clone() for layer in layers]
    precision.cast(layers, to)
    assert [[a.weight.data_ptr() == b.weight.data_ptr() for a in layers] for b in layers] == pattern
    assert all(torch.equal(layer.weight, value.to(layer.weight.dtype)) for layer, value in zip(layers, values, strict=True))


def test_kept_modules_compute_in_fp32_and_the_rest_does_not(bert):
    model, inputs = bert
    seen = {}
    changed = cast_of(model, Precision.FP16, keep_fp32=("encoder.layer.0.output.LayerNorm", "pooler")).module
    assert changed.pooler.dense.weight.dtype == torch.float32
    for name in ("encoder.layer.0.output.LayerNorm", "pooler.dense", "encoder.layer.1.output.LayerNorm"):
        changed.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0].dtype))
    outputs = changed(*inputs.args)
    assert seen == {
        "encoder.layer.0.output.LayerNorm": torch.float32,
        "pooler.dense": torch.float32,
        "encoder.layer.1.output.LayerNorm": torch.float16,
    }
    assert {value.dtype for value in outputs.values()} == {torch.float16}
    reference = copy.deepcopy(model.module).double()(*inputs.args)
    error = (outputs.pooler_output.double() - reference.pooler_output).norm() / reference.pooler_output.norm()
    assert error < 5e-3


def test_patterns_keep_every_module_they_fit(t5):
    model, inputs = t5
    changed = cast_of(model, Precision.FP16, keep_fp32=("*.wo",))
    assert {p.dtype for name, p in changed.module.named_parameters() if ".wo." in name} == {torch.float32}
    assert "cast to float16, 4 modules kept in fp32" in changed.notes
    assert changed.module(*inputs.args, **inputs.kwargs).logits.isfinite().all()


def test_kept_modules_can_be_copied_again(bert):
    model, inputs = bert
    once = cast_of(model, Precision.FP16, keep_fp32=("pooler",))
    twice = copy.deepcopy(once.module)
    assert torch.equal(twice(*inputs.args).pooler_output, once.module(*inputs.args).pooler_output)


def test_a_name_that_fits_no_module_is_a_usage_error_with_the_nearest(bert):
    with pytest.raises(UsageError, match="'poolr'") as caught:
        cast_of(bert[0], Precision.FP16, keep_fp32=("poolr",))
    assert "pooler" in caught.value.fix


def test_half_of_a_tie_cannot_be_kept(t5):
    with pytest.raises(UsageError, match="same weight"):
        cast_of(t5[0], Precision.FP16, keep_fp32=("encoder",))


def test_keeping_fp32_in_an_fp32_run_changes_nothing(bert):
    model, _ = bert
    assert cast_of(model, Precision.FP32, keep_fp32=("pooler",)) is model
    assert cast_of(model, None, keep_fp32=("pooler",)) is model
    assert cast_of(model, Precision.TF32) is model


def test_rotary_frequencies_keep_their_precision(make):
    model = make(gpuopt.models.llama_8b_tiny())
    wide = cast_of(model, Precision.FP32)
    assert wide.module.model.rotary_emb.inv_freq.dtype == torch.float32
    for to in HALF:
        narrow = cast_of(wide, to).module
        assert torch.equal(narrow.model.rotary_emb.inv_freq, model.module.model.rotary_emb.inv_freq)
        assert narrow.lm_head.weight.dtype == getattr(torch, to.dtype)


def test_weights_that_fp16_cannot_hold_are_named(make):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight.data[0, 0] = 1e6
    assert any("infinite in 1.weight" in note for note in cast_of(make(module), Precision.FP16).notes)
    assert not any("infinite" in note for note in cast_of(make(module), Precision.BF16).notes)


def test_a_class_that_asks_for_fp32_parts_is_mentioned(t5):
    assert any("wo" in note and "--keep-fp32" in note for note in cast_of(t5[0], Precision.FP16).notes)
    assert not any("--keep-fp32" in note for note in cast_of(t5[0], Precision.BF16).notes)


def test_a_mixed_model_is_cast_even_where_its_commonest_dtype_is_right(make):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).double())
    model = make(module)
    assert model.dtype == "float32"
    assert {p.dtype for p in cast_of(model, Precision.FP32).module.parameters()} == {torch.float32}


@pytest.mark.parametrize("to", [Precision.FP8, Precision.INT8, Precision.W8, Precision.W4])
def test_a_quantisation_is_not_a_cast(bert, to):
    with pytest.raises(AssertionError, match="scales"):
        precision.cast(bert[0].module, to)
    kinds = {p.dtype for p in apply(bert[0], to, Transforms(), bert[1]).module.parameters()}
    assert kinds == {getattr(torch, to.dtype), torch.bfloat16}


def test_a_recurrent_layer_survives_its_cast(make, inputs):
    module = nn.LSTM(4, 8, num_layers=2)
    changed = cast_of(make(module), Precision.BF16)
    assert changed.module(torch.randn(3, 2, 4, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


# -- flags ------------------------------------------------------------------------------------------------------------------------


def switches():
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.mark.parametrize("to", [None, *Precision])
@pytest.mark.parametrize("outer", ["highest", "high"])
def test_flags_are_put_back_whatever_they_were(to, outer):
    before = switches()
    torch.set_float32_matmul_precision(outer)
    try:
        inside = switches()
        with precision.flags(to):
            pass
        assert switches() == inside
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before[2], before[6]
    assert switches()[:6] == before[:6]


@pytest.mark.parametrize("to", list(Precision))
def test_tf32_is_on_for_tf32_alone_in_products_and_convolutions_by_both_ways_of_asking(to):
    with precision.flags(to):
        wanted = to is Precision.TF32
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
        assert torch.backends.cudnn.allow_tf32 is wanted
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is wanted
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is wanted
        assert (torch.get_float32_matmul_precision() == "high") is wanted


def test_flags_nest_and_survive_an_exception():
    before = switches()
    with pytest.raises(KeyError), precision.flags(Precision.TF32), precision.flags(Precision.FP32):
        assert not torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert switches() == before


def test_no_precision_touches_no_flag():
    with precision.flags(Precision.TF32):
        inside = switches()
        with precision.flags(None):
            assert switches() == inside
