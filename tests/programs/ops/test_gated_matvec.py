"""gpuopt::gated_matvec on a CPU: what it computes, where it rounds, and what a compiler takes it for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpuopt.core.tally import Tally
from gpuopt.programs.ops import gated_matvec as op

MODULES = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}


def tensors(*batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(*batch, 16).to(dtype), torch.randn(24, 16).to(dtype), torch.randn(24, 16).to(dtype)


def test_every_activation_is_tested() -> None:
    assert MODULES.keys() == op.ACTS.keys()


@pytest.mark.parametrize("act", MODULES)
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2, 3)])
def test_the_gate_is_activated_and_the_other_is_not(batch: tuple[int, ...], act: str) -> None:
    row, gate, up = tensors(*batch)
    wanted = MODULES[act](F.linear(row.double(), gate.double())) * F.linear(row.double(), up.double())
    torch.testing.assert_close(op.gated_matvec(row, gate, up, act).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", MODULES)
def test_halves_are_rounded_where_the_unfused_operators_round(act: str, dtype: torch.dtype) -> None:
    row, gate, up = tensors(1, 1, dtype=dtype)
    found = op.gated_matvec(row, gate, up, act)
    assert found.dtype == dtype and torch.equal(found, MODULES[act](F.linear(row, gate)) * F.linear(row, up))


def test_an_activation_it_does_not_have_is_an_error() -> None:
    with pytest.raises(KeyError, match="tanh"):
        op.gated_matvec(*tensors(1), "tanh")


@pytest.mark.parametrize("act", MODULES)
def test_torch_finds_no_fault_with_the_operator(act: str) -> None:
    torch.library.opcheck(torch.ops.gpuopt.gated_matvec.default, (*tensors(1, 1), act))


def test_its_flops_are_those_of_both_products() -> None:
    call = (*tensors(1, 1, dtype=torch.float16), "silu")
    tally = Tally()
    tally.add("gpuopt.gated_matvec.default", call, {}, op.gated_matvec(*call))
    assert tally.flops == {"float16": 2.0 * 2 * 16 * 24}
