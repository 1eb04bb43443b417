"""Weights written to safetensors and read back, tied ones once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import gpuopt.models
from gpuopt.converters import apply, exported, weights
from gpuopt.core.errors import ResourceError, Unsupported
from gpuopt.core.live import Model
from gpuopt.core.spec import Precision, Transforms


def header_of(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])


def test_weights_come_back_as_they_were(resnet, tmp_path):
    model, _ = resnet
    path = weights.save(model, tmp_path / "w.safetensors")
    state = model.module.state_dict()
    loaded = load_file(path)
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)
    assert header_of(path)["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("to", [None, Precision.FP16])
def test_tied_weights_are_written_once_and_come_back_tied(t5, tmp_path, to):
    model, inputs = t5
    model = apply(model, to, Transforms())
    path = weights.save(model, tmp_path / "w.safetensors")
    metadata = header_of(path)["__metadata__"]
    assert metadata.keys() >= {"encoder.embed_tokens.weight", "shared.weight"} or metadata.keys() >= {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }
    stored = sum(t.numel() for t in load_file(path).values())
    assert stored == sum(p.numel() for p in model.module.parameters())
    fresh = gpuopt.models.t5_large_tiny().to(getattr(torch, model.dtype))
    for parameter in fresh.parameters():
        parameter.data.zero_()
    load_model(fresh, path)
    assert torch.equal(fresh(*inputs.args, **inputs.kwargs).logits, model.module(*inputs.args, **inputs.kwargs).logits)
    assert fresh.shared.weight is fresh.encoder.embed_tokens.weight


def test_channels_last_weights_are_written_by_value(resnet, tmp_path):
    model, inputs = resnet
    changed = apply(model, None, Transforms(channels_last=True), inputs)
    loaded = load_file(weights.save(changed, tmp_path / "w.safetensors"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.module.state_dict().items())


def test_tensors_that_overlap_are_written_apart():
    base = torch.arange(6.0)
    kept, tied = weights.untie({"all": base, "part": base[2:], "again": base, "turned": base.view(2, 3).t()})
    assert tied == {"all": "again"}
    assert {name: t.flatten().tolist() for name, t in kept.items()} == {
        "again": [0, 1, 2, 3, 4, 5],
        "part": [2, 3, 4, 5],
        "turned": [0, 3, 1, 4, 2, 5],
    }
    assert len({t.untyped_storage().data_ptr() for t in kept.values()}) == 3


def test_empty_tensors_are_not_ties():
    kept, tied = weights.untie({"a": torch.empty(0), "b": torch.empty(0)})
    assert set(kept) == {"a", "b"} and not tied


def test_an_exported_program_and_a_script_have_weights_too(make, inputs, tmp_path):
    module = nn.Linear(4, 8)
    program = exported.export(make(module), inputs("x:float32[N,4]", dims={"N": 3}))
    for model in (
        Model(form="exported", name="p", module=program.module(), exported=program, dtype="float32"),
        Model(form="torchscript", name="s", module=torch.jit.trace(module, torch.randn(2, 4)), dtype="float32"),
    ):
        loaded = load_file(weights.save(model, tmp_path / "w.safetensors"))
        assert torch.equal(loaded["weight"], module.weight)


def test_an_onnx_file_has_none(tmp_path):
    with pytest.raises(Unsupported):
        weights.save(Model(form="onnx", name="x", path=tmp_path / "x.onnx"), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_not_all_tensors_is_refused(make, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(Unsupported, match="_extra_state"):
        weights.save(make(Extra(2, 2)), tmp_path / "w.safetensors")


def test_a_path_that_cannot_be_written_is_a_resource_error(resnet, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        weights.save(resnet[0], tmp_path / "file" / "w.safetensors")


def test_the_file_says_nothing_but_names_and_format(resnet, tmp_path):
    with safe_open(weights.save(resnet[0], tmp_path / "w.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}
