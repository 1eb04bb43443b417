"""What a counter of ATen calls does not see by itself: control flow, attention by mask functions, packed sequences, Triton kernels, NumPy."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as hop_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex

from gpuopt.core.live import Inputs
from gpuopt.profiling import formulas, zeros
from gpuopt.profiling.count import count


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def counted(function, *args):
    return count(Call(function), Inputs(args=args, kwargs={}))


x, w = torch.ones(4, 8), torch.ones(8, 8)
PRODUCT = 2 * 4 * 8 * 8

CONTROL_FLOW = {
    "the branch taken": (lambda x, w: torch.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x @ w @ w, (x, w)), PRODUCT),
    "the other branch": (lambda x, w: torch.cond(x.sum() < 0, lambda x, w: x @ w, lambda x, w: x @ w @ w, (x, w)), 2 * PRODUCT),
    "a loop": (lambda x, w: while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x @ w), (torch.tensor(0), x)), 3 * PRODUCT),
    "a scan": (lambda x, w: scan(lambda c, r: (c @ w, c + r), torch.zeros(8), x)[1], 4 * 2 * 64),
    "a map": (lambda x, w: hop_map(lambda r, w: r @ w, x, w), 4 * 2 * 64),
}


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_products_inside_control_flow_are_counted_as_often_as_they_run(name):
    function, expected = CONTROL_FLOW[name]
    found = counted(function, x, w)
    assert (found.flops, found.unknown_ops) == (expected, ())


def test_an_associative_scan_counts_the_combinations_it_makes():
    found = counted(lambda x: associative_scan(lambda a, b: torch.bmm(a, b), x, 0, combine_mode="generic"), torch.randn(4, 3, 3)[:, None])
    assert (found.flops, found.unknown_ops) == (4 * 2 * 27, ())  # 3 outputs need 3 combinations; the tree makes 4


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_is_counted_full_and_left_as_it_was(kv_heads):
    q, k = torch.randn(2, 4, 128, 16), torch.randn(2, kv_heads, 128, 16)
    causal = flex.create_block_mask(lambda b, h, i, j: i >= j, 2, 4, 128, 128, device="cpu")
    found = counted(lambda q, k: flex.flex_attention(q, k, k, block_mask=causal, enable_gqa=kv_heads != 4), q, k)
    assert (found.flops, found.unknown_ops) == (4 * 2 * 4 * 128 * 128 * 16, ())
    assert found.method == "aten dispatch, fake tensors"
    assert flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is False


def test_a_compiled_module_counts_like_the_module():
    assert count(torch.compile(nn.Linear(8, 8)), Inputs(args=(x,), kwargs={})).flops == PRODUCT


PACKED = {
    "torch_attn::_varlen_attn": ("query", "key", "value", "cu_seq_q", "cu_seq_k"),
    "aten::_flash_attention_forward": ("query", "key", "value", "cum_seq_q", "cum_seq_k"),
    "aten::_efficient_attention_forward": ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"),
    "flash_attn::_flash_attn_varlen_forward": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_attend_to_themselves_alone(name):
    """Lengths 3 and 5, two heads of 8: not 8 by 8, and not twice the longest."""
    total = torch.empty(1, 8, 2, 8) if "efficient" in name else torch.empty(8, 2, 8)
    args = dict(zip(PACKED[name], (total, total, total, torch.tensor([0, 3, 8]), torch.tensor([0, 3, 8])), strict=True))
    formula = formulas.PRODUCTS[name]
    assert formula(args, None) == 4 * 2 * 8 * (3 * 3 + 5 * 5)
    starts = PACKED[name][3:]
    assert formula({**args, starts[1]: torch.tensor([0, 1, 3])}, None) == 4 * 2 * 8 * (3 * 1 + 5 * 2)
    assert formula({**args, starts[0]: torch.empty(3, device="meta")}, None) is None
    fake = FakeTensorMode().from_tensor(torch.tensor([0, 3, 8]))
    with pytest.raises(formulas.NeedsValuesError):
        formula({**args, starts[0]: fake}, None)
    plain = torch.empty(2, 5, 2, 8)
    if "varlen" not in name:
        assert formula({**dict.fromkeys(PACKED[name][:3], plain)}, None) == 4 * 2 * 2 * 5 * 5 * 8


def test_a_count_that_needs_lengths_takes_one_real_run():
    @torch.library.custom_op("gpuopt_tests::packed", mutates_args=())
    def packed(query: torch.Tensor, cu_seq_q: torch.Tensor) -> torch.Tensor:
        return query + 0

    packed.register_fake(lambda query, cu_seq_q: torch.empty_like(query))
    formulas.PRODUCTS["gpuopt_tests::packed"] = lambda args, out: formulas._packed_attention(
        {**args, "key": args["query"], "value": args["query"]}, out
    )
    try:
        found = counted(lambda q, n: torch.ops.gpuopt_tests.packed(q, n), torch.randn(8, 2, 8), torch.tensor([0, 3, 8]))
    finally:
        del formulas.PRODUCTS["gpuopt_tests::packed"]
    assert found.flops == 4 * 2 * 8 * 34
    assert "real run" in found.method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grouped_products_are_counted_on_fake_tensors_in_every_dtype(dtype):
    offs = torch.tensor([4, 8, 8, 16], dtype=torch.int32)
    rows, experts = torch.randn(16, 32).to(dtype), torch.randn(4, 32, 64).to(dtype)
    found = counted(lambda a, b: torch._grouped_mm(a, b, offs=offs), rows, experts)
    assert (found.flops, found.unknown_ops, found.method) == (2 * 16 * 32 * 64, (), "aten dispatch, fake tensors")


def test_one_token_reads_the_experts_it_goes_to_and_not_all_of_them():
    offs = torch.tensor([1, 1, 2, 2, 2, 2, 2, 2], dtype=torch.int32)
    rows, experts = torch.randn(2, 32).bfloat16(), torch.randn(8, 32, 64).bfloat16()
    found = counted(lambda a, b, o: torch._grouped_mm(a, b, offs=o), rows, experts, offs)
    assert found.bytes == 2 * (2 * 32 + 2 * 32 * 64 + 2 * 64) + 8 * 4


def test_what_numpy_computes_is_unknown_and_never_zero():
    found = counted(lambda x, w: torch.from_numpy(x.numpy() @ w.numpy()) + 1, x, w)
    assert found.unknown_ops == ("Tensor.numpy",)
    assert found.coverage < 1.0


class FakeTriton:
    """The one place through which `kernel[grid](…)` goes."""

    class KernelInterface:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.run(*args, grid=grid, **kwargs)


class Kernel(FakeTriton.KernelInterface):
    __name__ = "mystery_kernel"
    launched = 0

    def run(self, *args, grid, **kwargs):
        Kernel.launched += 1


class Tuned(FakeTriton.KernelInterface):
    def __init__(self, fn):
        self.fn = fn

    def run(self, *args, grid, **kwargs):
        for _ in range(5):  # tries its configurations
            self.fn.run(*args, grid=grid, **kwargs)


@pytest.fixture
def triton(monkeypatch):
    module = types.ModuleType("triton.runtime.jit")
    module.KernelInterface = FakeTriton.KernelInterface
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", module)
    Kernel.launched = 0
    return Kernel()


def test_a_triton_kernel_is_unknown_and_is_not_launched_on_fake_tensors(triton):
    def forward(x, w):
        y = torch.empty_like(x)
        Tuned(triton)[(1,)](x, y, 8)
        return y @ w

    original = FakeTriton.KernelInterface.__getitem__
    found = counted(forward, x, w)
    assert found.unknown_ops == ("triton.mystery_kernel",)
    assert found.flops == PRODUCT
    assert found.coverage < 1.0
    assert [r.count for r in found.records if r.op == "triton.mystery_kernel"] == [1]
    assert Kernel.launched == 0
    assert FakeTriton.KernelInterface.__getitem__ is original


def test_a_triton_kernel_inside_an_op_belongs_to_the_op(triton):
    @torch.library.custom_op("gpuopt_tests::wraps_triton", mutates_args=())
    def wraps_triton(x: torch.Tensor) -> torch.Tensor:
        triton[(1,)](x)
        return x + 1

    found = counted(lambda x: torch.ops.gpuopt_tests.wraps_triton(x), x)  # no fake kernel: one real run
    assert found.unknown_ops == ("gpuopt_tests.wraps_triton",)
    assert Kernel.launched > 0


def test_a_higher_order_op_nobody_knows_is_unknown():
    from torch._ops import HigherOrderOperator

    class Mystery(HigherOrderOperator):
        def __init__(self):
            super().__init__("gpuopt_tests_mystery")

        def __call__(self, x):
            return super().__call__(x)

    mystery = Mystery()
    mystery.py_impl(torch._C.DispatchKey.CompositeExplicitAutograd)(lambda x: x @ x)
    mystery.py_impl(FakeTensorMode)(lambda mode, x: torch.empty_like(x))
    mystery.py_impl(torch._C.DispatchKey.Autograd)(lambda x: mystery(x))
    with torch.inference_mode():
        found = counted(lambda x: mystery(x), w)
    assert found.unknown_ops == ("gpuopt_tests_mystery",)
    assert found.coverage < 1.0


def test_no_product_would_pass_for_a_zero_if_its_formula_were_lost(monkeypatch):
    """Every op with a formula, were its row to be deleted, is unknown: by no table, tag or namespace a silent zero."""
    names = list(formulas.PRODUCTS)
    for name in names:
        monkeypatch.delitem(formulas.PRODUCTS, name)
    slipped = [name for name in names if formulas.is_zero_when_dispatched.__wrapped__(name)]
    assert slipped == []


def test_no_name_is_both_excepted_and_listed_as_zero():
    assert not zeros.NOT_ZERO & zeros.ZERO_ELSEWHERE
    assert not any(formulas.is_zero_when_dispatched(name) for name in zeros.NOT_ZERO)
