"""The reference models: their sizes, their seeds, and that naming one costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpuopt.models
from gpuopt.core.errors import Unavailable
from gpuopt.core.spec import TensorSpec

TINY = ("resnet101_tiny", "bert_large_tiny", "t5_large_tiny", "llama_8b_tiny", "t5_11b_tiny", "llama_70b_half_tiny")
DIMS = {"N": 2, "S": 7, "T": 5}


def inputs_of(factory):
    found = {}
    for text in factory.input_specs:
        spec = TensorSpec.parse(text).bind(DIMS)
        is_float = spec.dtype.startswith("float")
        found[spec.name] = torch.randn(spec.shape) if is_float else torch.randint(99, spec.shape)
    return found


def test_naming_a_model_imports_neither_torch_nor_transformers():
    code = "import sys, gpuopt.models; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_has_a_factory_and_every_factory_a_tiny_sibling():
    for name in gpuopt.models.__all__:
        assert getattr(gpuopt.models, name).input_specs
    large = [name for name in gpuopt.models.__all__ if not name.endswith("_tiny")]
    assert sorted(f"{name}_tiny" for name in large) == sorted(TINY)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="resnet101"):
        _ = gpuopt.models.resnet102


def test_without_transformers_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "gpuopt.models.bert", raising=False)
    with pytest.raises(Unavailable) as caught:
        _ = gpuopt.models.bert_large
    assert "gpuopt[hf]" in caught.value.fix


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_runs_on_what_its_specs_say(name):
    factory = getattr(gpuopt.models, name)
    model = factory()
    assert not any(part.training for part in model.modules())
    outputs = model(**inputs_of(factory))
    tensors = [value for value in outputs.values() if value is not None]
    assert all(isinstance(value, torch.Tensor) and value.isfinite().all() and value.std() > 0 for value in tensors)
    assert all(value.shape[0] == DIMS["N"] for value in tensors)


@pytest.mark.parametrize("name", TINY)
def test_two_calls_give_the_same_weights_and_leave_the_callers_random_state_alone(name):
    factory = getattr(gpuopt.models, name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = factory()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = factory()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_resnet101_has_44_5_million_parameters_and_15_6_gflop_an_image():
    with torch.device("meta"):
        model = gpuopt.models.resnet101()
    assert sum(p.numel() for p in model.parameters()) == 44_549_160
    with FlopCounterMode(display=False) as counted:
        logits = model(torch.empty(2, 3, 224, 224, device="meta")).logits
    assert logits.shape == (2, 1000)
    assert counted.get_total_flops() / 2 == pytest.approx(15.6e9, rel=0.001)


def test_resnet101_puts_its_strides_where_torchvision_does():
    with torch.device("meta"):
        model = gpuopt.models.resnet101()
    strided = {
        part.kernel_size
        for name, part in model.named_modules()
        if name.endswith("convolution") and part.stride == (2, 2) and "shortcut" not in name
    }
    assert strided == {(7, 7), (3, 3)}


@pytest.mark.parametrize(("name", "count"), [("bert_large", 335_141_888), ("t5_large", 737_668_096)])
def test_transformers_of_the_known_size(name, count):
    with torch.device("meta"):
        model = getattr(gpuopt.models, name)()
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "count", "gigabytes"),
    [("llama_8b", 8_030_261_248, 16.06), ("llama_70b_half", 36_327_530_496, 72.66), ("t5_11b", 11_307_321_344, 22.61)],
)
def test_the_largest_have_the_known_sizes_and_take_no_memory_to_say_so(name, count, gigabytes):
    laid = getattr(gpuopt.models, name).laid()
    model = laid.module
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert sum(p.numel() for p in model.parameters()) == count
    assert laid.num_bytes == sum(p.numel() * p.element_size() for p in model.parameters()) == pytest.approx(gigabytes * 1e9, rel=1e-3)
    assert not hasattr(model.config, "quantization_config")


def test_llama_survives_the_meta_device_with_its_rotary_tables_and_its_norms():
    model = gpuopt.models.llama_8b_tiny()
    inverse = model.model.rotary_emb.inv_freq
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_laid_out_weights_look_drawn():
    weight = gpuopt.models.llama_8b_tiny().model.embed_tokens.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.mean().abs().item() < 1e-3
    assert len({tuple(row.tolist()) for row in weight}) == weight.shape[0]


def test_t5_keeps_its_embedding_tied():
    model = gpuopt.models.t5_large_tiny()
    assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr() == model.decoder.embed_tokens.weight.data_ptr()
