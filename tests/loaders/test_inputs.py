"""Inputs bind to what forward takes, repeat by seed, and never allocate what cannot be."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from gpuopt import loaders
from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import InputSpec, ModelRef, TensorSpec
from gpuopt.loaders import describe, inputs


def model(module: nn.Module, *specs: str) -> Model:
    return describe.of_module(module.eval(), name="m", signature=tuple(TensorSpec.parse(s) for s in specs))


def make(m: Model, *specs: str, dtype: str | None = None, seed: int = 0, file: str | None = None, **dims: int) -> Inputs:
    return inputs.make(m, InputSpec(tensors=tuple(TensorSpec.parse(s) for s in specs), seed=seed, file=file), dims, "cpu", dtype)


class Three(nn.Module):
    def forward(self, x: Any, y: Any, mask: Any = None) -> Any:
        return x


class Any_(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args


# --- binding


def test_names_bind_to_parameters_of_forward_whatever_their_order() -> None:
    call = make(model(Three()), "y:float32[N,2]", "x:float32[N,3]")
    assert call.args == ()
    assert {k: tuple(v.shape) for k, v in call.kwargs.items()} == {"x": (1, 3), "y": (1, 2)}


def test_names_that_match_nothing_bind_by_order() -> None:
    call = make(model(Three()), "image:float32[N,3]", "label:float32[N,2]")
    assert [tuple(a.shape) for a in call.args] == [(1, 3), (1, 2)]
    assert [s.name for s in call.specs] == ["image", "label"]


def test_matched_and_unmatched_names_never_collide() -> None:
    call = make(model(Three()), "first:float32[N,1]", "x:float32[N,2]", "mask:int64[N]")
    assert {k: tuple(v.shape) for k, v in call.kwargs.items()} == {"x": (1, 2), "y": (1, 1), "mask": (1,)}
    Three().forward(*call.args, **call.kwargs)


def test_unnamed_inputs_take_the_names_of_parameters() -> None:
    call = make(model(Three()), "float32[N,3]", "float32[N,2]")
    assert list(call.kwargs) == ["x", "y"]


def test_a_forward_that_takes_anything_gets_positions() -> None:
    assert len(make(model(Any_()), "a:float32[N]", "b:float32[N]").args) == 2


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["x:float32[N]"], "also wants the input 'y'"),
        (["x:float32[N]", "y:float32[N]", "mask:int64[N]", "extra:float32[N]"], "no further input 'extra'"),
        (["x:float32[N]", "x:float32[N]"], "'x' is given twice"),
    ],
)
def test_a_wrong_set_of_inputs_is_named(specs: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        make(model(Three()), *specs)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("spec", "says"),
    [("x:float32[N,3,8]", "3 dimensions.*takes 4"), ("x:int64[N,3,8,8]", "is int64.*takes float32")],
)
def test_an_input_that_cannot_be_what_the_model_declares_is_refused(spec: str, says: str) -> None:
    class Image(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    with pytest.raises(UsageError, match=says):
        make(model(Image(), "x:float32[N,3,8,8]"), spec)
    assert make(model(Image(), "x:float32[N,3,8,8]"), "x:float16[N,3,16,16]").kwargs["x"].shape[-1] == 16


# --- sources


@pytest.mark.parametrize(
    ("module", "spec", "layer"),
    [
        (nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU()), "input:float32[N,5,224,224]", "Conv2d(5, 8, …)"),
        (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6)), "input:float32[N,6,224,224]", "Conv2d(6, 6, …)"),
        (nn.Sequential(nn.Conv1d(2, 3, 3)), "input:float32[N,2,1024]", "Conv1d"),
        (nn.Sequential(nn.Conv3d(2, 3, 3)), "input:float32[N,2,16,112,112]", "Conv3d"),
        (nn.Sequential(nn.Dropout(), nn.Linear(7, 3)), "input:float32[N,7]", "Linear"),
        (nn.Sequential(nn.Embedding(11, 4)), "input:int64[N,S]", "Embedding(11, 4)"),
        (nn.LSTM(4, 5, batch_first=True), "input:float32[N,S,4]", "LSTM"),
        (nn.GRU(4, 5), "input:float32[S,N,4]", "GRU"),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "src:float32[N,S,8]", "TransformerEncoderLayer"),
        (nn.Linear(3, 3).half(), "input:float16[N,3]", "Linear"),
    ],
)
def test_a_guess_from_the_first_layer_fits_and_is_called_a_guess(module: nn.Module, spec: str, layer: str) -> None:
    m = model(module)
    (found,), source = inputs.signature(m, InputSpec())
    assert (found.name, found.dtype, found.shape) == (lambda s: (s.name, s.dtype, s.shape))(TensorSpec.parse(spec))
    assert source.startswith(f"guess: first layer is {layer}") and f"--input '{found.name}:" in source
    call = make(m)
    if found.dtype != "float16":
        with torch.no_grad():
            module(*call.args, **call.kwargs)


def test_a_model_that_tells_nothing_asks_for_input() -> None:
    with pytest.raises(UsageError) as caught:
        make(model(nn.ReLU()))
    assert "--input 'input:" in caught.value.fix


@pytest.mark.parametrize("name", ["bert", "resnet", "t5", "llama"])
def test_configurations_give_inputs_the_model_runs_on(name: str) -> None:
    factory = {"bert": "bert_large_tiny", "resnet": "resnet101_tiny", "t5": "t5_large_tiny", "llama": "llama_8b_tiny"}[name]
    m = loaders.load(ModelRef(text=f"gpuopt.models:{factory}"))
    m.signature = ()
    call = make(m, N=2)
    assert call.source == "configuration"
    with torch.no_grad():
        m.module(*call.args, **call.kwargs)
    assert "attention_mask" not in call.kwargs
    for spec in call.specs:
        if spec.dtype == "int64":
            assert spec.high == m.config.vocab_size


def test_masks_are_ones_types_are_zeros_and_ids_stay_below_the_vocabulary() -> None:
    m = loaders.load(ModelRef(text="gpuopt.models:bert_large_tiny"))
    call = make(m, "input_ids:int64[N,S]", "attention_mask:int64[N,S]", "token_type_ids:int64[N,S]", N=4, S=50)
    assert call.kwargs["attention_mask"].unique().tolist() == [1]
    assert call.kwargs["token_type_ids"].unique().tolist() == [0]
    assert 50 < int(call.kwargs["input_ids"].max()) < 99


def test_positions_of_an_image_limit_no_text() -> None:
    """CLIP at 224 x 224 has 50 patches and takes 77 tokens."""
    import transformers as hf

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 16,
    }
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    assert inputs._max_positions(Model(module=clip, name="clip", form="module")) == 77


def test_a_sequence_longer_than_the_models_positions_names_the_dimension() -> None:
    m = loaders.load(ModelRef(text="gpuopt.models:bert_large_tiny"))
    assert make(m).dims["S"] == 64
    with pytest.raises(UsageError, match="dimension S of input_ids is 65; the model has 64 positions"):
        make(m, S=65)


# --- files


def test_stored_arrays_are_used_as_they_are(tmp_path: Path) -> None:
    x, y = np.arange(6, dtype="float32").reshape(2, 3), np.ones((2, 1), "float32")
    np.savez(tmp_path / "i.npz", y=y, x=x)
    save_file({"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, tmp_path / "i.safetensors")
    for name in ("i.npz", "i.safetensors"):
        call = make(model(Three()), file=str(tmp_path / name))
        assert torch.equal(call.kwargs["x"], torch.from_numpy(x))
        assert call.batch == 2
        assert call.source == f"--inputs {tmp_path / name}"
        assert make(model(Three()), file=str(tmp_path / name), dtype="float16").kwargs["x"].dtype == torch.float16
        with pytest.raises(UsageError, match="holds N=2, not 3"):
            make(model(Three()), file=str(tmp_path / name), N=3)


def test_a_pickle_inside_an_npz_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            import os

            return os.mkdir, (str(tmp_path / "canary"),)

    np.savez(tmp_path / "i.npz", x=np.array([Evil()], dtype=object))
    with pytest.raises(BadInput):
        make(model(Three()), file=str(tmp_path / "i.npz"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"hello"])
def test_a_damaged_inputs_file_is_bad_input(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.npz").write_bytes(content)
    with pytest.raises(BadInput):
        make(model(Three()), file=str(tmp_path / "i.npz"))


def test_an_npz_that_lies_about_its_size_is_refused_without_allocating(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "i.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(16))
    with pytest.raises((BadInput, ResourceError)):
        make(model(Three()), file=str(tmp_path / "i.npz"))


def test_a_missing_or_foreign_inputs_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "i.csv").touch()
    for name in ("none.npz", "i.csv"):
        with pytest.raises(UsageError):
            make(model(Three()), file=str(tmp_path / name))


# --- sizes and values


def test_an_unknown_dimension_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="no input has the dimension Q: it has N, S"):
        make(model(nn.Embedding(5, 2)), "input:int64[N,S]", Q=3)
    with pytest.raises(UsageError, match="every size is fixed"):
        make(model(nn.Linear(2, 2)), "input:float32[4,2]", N=3)


@pytest.mark.parametrize("form", ["onnx", "exported"])
def test_a_file_of_fixed_sizes_says_what_they_are_and_how_to_free_them(form: str) -> None:
    """Naming a free dimension by --input would only be refused again: the file says which are free."""
    fixed = replace(model(nn.Linear(2, 2), "input:float32[4,2]"), form=form, name="fixed.file")
    for name, option in (("N", "--batch"), ("S", "--dim S")):
        with pytest.raises(UsageError, match=r"fixed.file was exported with fixed sizes, input:float32\[4,2\]") as raised:
            make(fixed, **{name: 3})
        assert (
            f"leave {option} away" in raised.value.fix
            and "gpuopt convert" in raised.value.fix
            and f"--dim {name}=1:8:64" in raised.value.fix
        )
        assert "--input" not in raised.value.fix


def test_a_free_dimension_without_a_usual_size_wants_a_value() -> None:
    with pytest.raises(UsageError, match="free dimension Q") as caught:
        make(model(nn.Identity()), "input:float32[N,4,4,4,Q]")
    assert "--dim Q=" in caught.value.fix


@pytest.mark.parametrize("spec", ["input:float32[65536,65536]", "input:int8[4294967296]", "input:float32[N]"])
def test_a_huge_shape_is_a_resource_error_before_anything_is_allocated(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_draw", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ResourceError):
        make(model(nn.Identity()), spec, **({"N": 2**31} if "N" in spec else {}))


def test_more_than_the_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_available", lambda device: 1000)
    with pytest.raises(ResourceError, match="GiB"):
        make(model(nn.Identity()), "input:float32[N,1000]")


@pytest.mark.parametrize("spec", ["input:float32[0,3]", "input:float32[]", "input:int64[N,0]"])
def test_empty_and_scalar_inputs_are_allowed(spec: str) -> None:
    assert list(make(model(nn.Identity()), spec).kwargs) == ["input"]


def test_floats_take_the_precision_and_integers_stay() -> None:
    call = make(model(Three()), "x:float32[N,8]", "y:int64[N,8]", dtype="bfloat16")
    assert (call.kwargs["x"].dtype, call.kwargs["y"].dtype) == (torch.bfloat16, torch.int64)


DTYPES = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "float8_e4m3fn"]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5) | st.sampled_from(["N", "S"]), max_size=4),
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 4),
    high=st.none() | st.integers(1, 300),
)
def test_any_spec_gives_a_tensor_of_its_shape_and_dtype_and_the_same_one_again(
    dtype: str, shape: list[int | str], seed: int, batch: int, high: int | None
) -> None:
    spec = InputSpec(tensors=(TensorSpec(name="input", dtype=dtype, shape=tuple(shape), high=high),), seed=seed)
    dims = {letter: batch for letter in ("N", "S") if letter in shape}
    m = model(nn.Identity())
    first, second = (inputs.make(m, spec, dims, "cpu", None).kwargs["input"] for _ in range(2))
    assert first.dtype == getattr(torch, dtype)
    assert list(first.shape) == [batch if isinstance(d, str) else d for d in shape]
    assert torch.equal(
        first.view(torch.uint8) if first.numel() and first.dim() else first,
        second.view(torch.uint8) if second.numel() and second.dim() else second,
    )
    if high is not None and dtype.startswith(("int", "uint")) and first.numel():
        assert 0 <= int(first.min()) and int(first.max()) < high


def test_every_precision_sees_the_same_numbers_and_every_seed_others() -> None:
    m = model(nn.Linear(64, 2))
    full, half = make(m, N=4).kwargs["input"], make(m, N=4, dtype="float16").kwargs["input"]
    assert torch.equal(full.half(), half)
    assert not torch.equal(full, make(m, N=4, seed=1).kwargs["input"])


def test_moving_inputs_keeps_everything_else() -> None:
    call = make(model(Three()), "x:float32[N,3]", "y:float32[N,2]", N=2)
    moved = inputs.to_device(call, "meta")
    assert moved.kwargs["x"].device.type == "meta"
    assert (moved.specs, moved.dims, moved.source) == (call.specs, call.dims, call.source)
