"""What is typed -> specs, and what is refused with the form wanted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.errors import UsageError
from gpuopt.core.spec import DTYPE_BYTES, BackendSpec, DimSpec, Precision, TensorSpec

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,10}", fullmatch=True)
dims = st.lists(st.one_of(st.integers(0, 10**6), st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,4}", fullmatch=True)), max_size=5)


@given(names, st.sampled_from(sorted(DTYPE_BYTES)), dims)
def test_a_tensor_spec_reads_back_as_it_was_written(name: str, dtype: str, shape: list[int | str]) -> None:
    spec = TensorSpec(name=name, dtype=dtype, shape=tuple(shape))
    assert TensorSpec.parse(str(spec)) == spec


def test_a_tensor_spec_has_a_name_a_dtype_and_free_dimensions() -> None:
    spec = TensorSpec.parse(" x:fp16[N, 3, H, H] ")
    assert (spec.name, spec.dtype, spec.shape) == ("x", "float16", ("N", 3, "H", "H"))
    assert spec.free_dims == ("N", "H")
    assert spec.bind({"N": 8, "H": 224}).shape == (8, 3, 224, 224)
    assert TensorSpec.parse("int64[]").shape == ()
    assert TensorSpec.parse("long[0]").shape == (0,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x:float32",
        "float32[N",
        "x:float33[1]",
        "x:float32[-1]",
        "x:float32[1.5]",
        "x:float32[1;2]",
        "x:float32[1][2]",
        "x y:float32[1]",
    ],
)
def test_a_malformed_tensor_spec_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        TensorSpec.parse(text)
    assert caught.value.fix


def test_a_free_dimension_without_a_value_is_named() -> None:
    with pytest.raises(UsageError, match="free dimension S") as caught:
        TensorSpec.parse("ids:int64[N,S]").bind({"N": 1})
    assert "--dim S=" in caught.value.fix


def test_a_dimension_is_a_list_or_a_range() -> None:
    assert DimSpec.parse("N=1,8,64").values == (1, 8, 64)
    ranged = DimSpec.parse("S=1:128:512")
    assert (ranged.values, ranged.low, ranged.high) == ((128,), 1, 512)


@pytest.mark.parametrize("text", ["N", "N=", "=3", "N=1:2", "N=3:2:1", "N=1,,2", "N=-1", "N=a", "N=1:600:512", "N=1,2:3:4"])
def test_a_malformed_dimension_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        DimSpec.parse(text)


def test_a_backend_has_a_preset_and_options_read_as_json() -> None:
    assert BackendSpec.parse("eager") == BackendSpec(name="eager")
    assert BackendSpec.parse("inductor:max-autotune") == BackendSpec(name="inductor", preset="max-autotune")
    spec = BackendSpec.parse("null:sleep_ms=5,fail=oom,exact=true")
    assert (spec.name, spec.preset, spec.options) == ("null", None, {"sleep_ms": 5, "fail": "oom", "exact": True})
    assert str(BackendSpec.parse("ort:cuda")) == "ort:cuda"


def test_every_precision_has_a_storage_type_of_known_size() -> None:
    assert all(precision.dtype in DTYPE_BYTES for precision in Precision)
    assert Precision.TF32.dtype == Precision.FP32.dtype == "float32"
