"""gpuopt::linear_gelu against fp64, on both devices' paths."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gpuopt.core.live import Inputs
from gpuopt.core.tally import Tally
from gpuopt.profiling.count import count
from gpuopt.programs.ops import linear_gelu as op


def tensors(*batch, dtype=torch.float32):
    torch.manual_seed(5)
    return torch.randn(*batch, 16).to(dtype), torch.randn(24, 16).to(dtype), torch.randn(24).to(dtype)


def exact(x, w, b):
    return F.gelu(F.linear(x.double(), w.double(), b.double()), approximate="tanh")


@pytest.mark.parametrize("batch", [(3,), (2, 5), (2, 3, 4), ()])
def test_it_is_the_tanh_form(batch):
    call = tensors(*batch)
    torch.testing.assert_close(op.linear_gelu(*call).double(), exact(*call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(3,), (2, 5), (2, 3, 4), ()])
def test_a_gpus_path_hands_one_product_on_and_brings_the_shape_back(monkeypatch, batch):
    given = []

    def product(bias, rows, weight, *, use_gelu):
        given.append(rows.shape)
        assert use_gelu
        return F.gelu(torch.addmm(bias, rows, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", product)
    call = tensors(*batch)
    torch.testing.assert_close(op._on_cuda(*call).double(), exact(*call), rtol=1e-5, atol=1e-5)
    assert [len(s) for s in given] == [2]


def test_the_two_forms_differ_by_no_more_than_is_said():
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    assert 4.5e-4 < (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() < 4.8e-4


def test_torch_finds_no_fault_with_the_operator():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.gpuopt.linear_gelu.default, tensors(2, 5), test_utils=checks)


def test_its_flops_are_a_products():
    call = tensors(2, 5)
    tally = Tally()
    tally.add("gpuopt.linear_gelu.default", call, {}, op.linear_gelu(*call))
    assert tally.flops == {"float32": 2.0 * 10 * 16 * 24}
    found = count(lambda x: op.linear_gelu(x, *call[1:]), Inputs(args=call[:1]))
    assert found.flops == 2.0 * 10 * 16 * 24 and not found.unknown_ops
