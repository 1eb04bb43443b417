"""Every way a call can differ from what an artifact was built for is refused with the input's name, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.core import codec
from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec

X = torch.zeros(4, 3, 8, 8)
IDS = torch.zeros(4, 16, dtype=torch.int64)


def built(**ranges: tuple[int, int]) -> Accepts:
    specs = (TensorSpec.parse("x:float32[N,3,8,8]"), TensorSpec.parse("ids:int64[N,S]"))
    return Accepts.of(Inputs(args=(X,), kwargs={"ids": IDS}, specs=specs, dims={"N": 4, "S": 16}), ranges)


def test_the_inputs_it_was_built_from_are_accepted() -> None:
    built().check((X,), {"ids": IDS})


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X.double(),), {"ids": IDS}, "'x' is float64, this artifact was built for float32"),
        ((X,), {"ids": IDS.int()}, "'ids' is int32"),
        ((X[:1],), {"ids": IDS}, "'x' has shape [1,3,8,8]: dimension 0 was built for 4 alone"),
        ((X.repeat(2, 1, 1, 1),), {"ids": IDS}, "'x' has shape [8,3,8,8]"),
        ((X.transpose(2, 3),), {"ids": IDS}, "'x' has strides [192,64,1,8]"),
        ((X.to(memory_format=torch.channels_last),), {"ids": IDS}, "'x' has strides"),
        ((X[0],), {"ids": IDS}, "'x' has 3 dimensions"),
        ((X.to("meta"),), {"ids": IDS}, "'x' is on meta, this artifact runs on cpu"),
        ((X,), {}, "'ids' is missing"),
        ((X,), {"ids": IDS, "mask": IDS}, "there is no input 'mask'"),
        ((X, IDS), {}, "2 positional inputs were given, this artifact takes 1: x"),
        ((), {"x": X, "ids": IDS}, "0 positional inputs"),
        (([1.0],), {"ids": IDS}, "'x' is a list, not a tensor"),
        ((None,), {"ids": IDS}, "'x' is a NoneType, not a tensor"),
    ],
)
def test_what_differs_is_refused_by_name(args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        built().check(args, kwargs)
    assert says in caught.value.message
    assert caught.value.fix


def test_a_dynamic_dimension_takes_its_range_and_both_ends_of_it() -> None:
    accepts = built(N=(1, 8))
    for n in (1, 2, 8):
        accepts.check((torch.zeros(n, 3, 8, 8),), {"ids": torch.zeros(n, 16, dtype=torch.int64)})
    with pytest.raises(UsageError, match="dimension N is 9, built for 1 to 8"):
        accepts.check((torch.zeros(9, 3, 8, 8),), {"ids": torch.zeros(9, 16, dtype=torch.int64)})


def test_one_letter_has_one_value_across_inputs() -> None:
    with pytest.raises(UsageError, match="'ids' has N=3, an input before it has N=2"):
        built(N=(1, 8)).check((torch.zeros(2, 3, 8, 8),), {"ids": torch.zeros(3, 16, dtype=torch.int64)})


def test_a_range_no_input_has_is_refused() -> None:
    with pytest.raises(UsageError, match="no input has the dynamic dimension T"):
        built(T=(1, 2))


def test_inputs_outside_their_own_range_are_refused_at_build() -> None:
    with pytest.raises(UsageError, match="dimension N is 4, built for 8 to 16"):
        built(N=(8, 16))


def test_strides_of_size_one_dimensions_do_not_matter() -> None:
    x = torch.zeros(4, 1, 8)
    accepts = Accepts.of(Inputs(args=(x,)))
    accepts.check((torch.empty_strided((4, 1, 8), (8, 5, 1)),), {})


def test_channels_last_is_kept_as_an_order_and_holds_for_every_batch() -> None:
    x = X.to(memory_format=torch.channels_last)
    accepts = Accepts.of(Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[N,3,8,8]"),)), {"N": (1, 16)})
    assert accepts.inputs[0].order == (0, 2, 3, 1)
    accepts.check((torch.zeros(1, 3, 8, 8).to(memory_format=torch.channels_last),), {})
    with pytest.raises(UsageError, match="strides"):
        accepts.check((X,), {})


def test_an_expanded_input_must_come_back_with_the_same_strides() -> None:
    mask = torch.zeros(1, 8).expand(4, 8)
    accepts = Accepts.of(Inputs(args=(mask,)))
    assert accepts.inputs[0].order is None
    accepts.check((mask,), {})
    with pytest.raises(UsageError, match="strides"):
        accepts.check((mask.contiguous(),), {})


def test_a_misaligned_slice_is_refused_where_alignment_matters() -> None:
    base = torch.zeros(65)
    assert base.data_ptr() % 16 == 0
    accepts = Accepts.of(Inputs(args=(base[:64],)), align_bytes=16)
    with pytest.raises(UsageError, match="address"):
        accepts.check((base[1:],), {})


def test_any_layout_is_accepted_where_inputs_are_copied() -> None:
    accepts = Accepts.of(Inputs(args=(X,)), any_layout=True)
    accepts.check((X.transpose(2, 3),), {})
    with pytest.raises(UsageError):
        accepts.check((X.double(),), {})


def test_it_travels_as_json() -> None:
    accepts = built(N=(1, 8))
    assert codec.from_json(Accepts, codec.to_json(accepts)) == accepts


def test_shape_gives_the_highest_value_of_a_range_unless_told() -> None:
    accepts = built(N=(1, 8), S=(4, 32))
    assert accepts.shape(1) == (8, 32)
    assert accepts.shape(1, {"N": 2}) == (2, 32)


@settings(max_examples=150, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=4), data=st.data())
def test_every_dense_layout_is_recognised_and_only_itself_accepted(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    other = data.draw(st.permutations(range(len(shape))))

    def make(permutation: list[int]) -> torch.Tensor:
        outer = torch.zeros([shape[axis] for axis in permutation])
        return outer.permute([permutation.index(axis) for axis in range(len(shape))])

    first, second = make(order), make(other)
    accepts = Accepts.of(Inputs(args=(first,)))
    assert accepts.inputs[0].order is not None
    same = all(a == b for size, a, b in zip(shape, first.stride(), second.stride(), strict=True) if size > 1)
    if same:
        accepts.check((second,), {})
    else:
        with pytest.raises(UsageError):
            accepts.check((second,), {})
