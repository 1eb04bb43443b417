"""Tensors for a first call: large enough to trace, in the memory order that was given."""

from __future__ import annotations

import pytest
import torch

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import sample


def test_widening_keeps_the_memory_order() -> None:
    x = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    wide = sample.widened(Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[N,3,4,5]"),)), {"N": (1, 8)}).args[0]
    assert wide.shape == (2, 3, 4, 5) and wide.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(wide[0], x[0]) and torch.equal(wide[1], x[0])


def test_zeros_are_accepted_by_what_they_were_made_for() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    specs = (TensorSpec.parse("x:float32[N,3,4,5]"), TensorSpec.parse("ids:int64[N,7]"))
    accepts = Accepts.of(Inputs(args=(x,), kwargs={"ids": ids}, specs=specs), {"N": (1, 6)})
    args, kwargs = sample.zeros(accepts)
    accepts.check(args, kwargs)
    assert args[0].shape[0] == 6 and not args[0].any()


def test_a_sample_below_its_range_is_repeated_up_to_it_and_no_further() -> None:
    x = torch.arange(3.0)
    wide = sample.widened(Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[N]"),), dims={"N": 3}), {"N": (8, 8)})
    assert wide.args[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and wide.dims == {"N": 8}


def test_an_expanded_input_is_widened_into_memory_of_its_own() -> None:
    x = torch.ones(1, 1).expand(1, 4)
    wide = sample.widened(Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[N,4]"),), dims={"N": 1}), {"N": (1, 8)}).args[0]
    assert wide.shape == (2, 4) and wide.is_contiguous()


@pytest.mark.parametrize("bounds", [(0, 1), (2, 8)])
def test_a_dimension_that_cannot_be_made_dynamic_is_unsupported(bounds: tuple[int, int]) -> None:
    size = 1 if bounds == (0, 1) else 0
    with pytest.raises(Unsupported, match="cannot be dynamic"):
        sample.widened(Inputs(args=(torch.ones(size),), specs=(TensorSpec.parse("x:float32[N]"),), dims={"N": size}), {"N": bounds})
