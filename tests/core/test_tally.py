"""FLOPs by dtype against counts done by hand, and verdicts against a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpuopt.core.tally import HONOURED_SHARE, Tally, tf32_flags


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


CASES = [
    ("aten.mm.default", [t(4, 8), t(8, 16)], t(4, 16), 2 * 4 * 8 * 16),
    ("aten.addmm.default", [t(16), t(4, 8), t(8, 16)], t(4, 16), 2 * 4 * 8 * 16),
    ("aten.bmm.default", [t(3, 4, 8), t(3, 8, 16)], t(3, 4, 16), 2 * 3 * 4 * 8 * 16),
    ("aten.baddbmm.default", [t(3, 4, 16), t(3, 4, 8), t(3, 8, 16)], t(3, 4, 16), 2 * 3 * 4 * 8 * 16),
    ("aten.addbmm.default", [t(4, 16), t(3, 4, 8), t(3, 8, 16)], t(4, 16), 2 * 3 * 4 * 8 * 16),
    ("aten.mv.default", [t(4, 8), t(8)], t(4), 2 * 4 * 8),
    ("gpuopt.matvecs.default", [t(1, 1, 8), [t(16, 8), t(4, 8)]], [t(1, 1, 16), t(1, 1, 4)], 2 * 8 * 20),
    ("gpuopt.gated_matvec.default", [t(1, 1, 8), t(16, 8), t(16, 8), "silu"], t(1, 1, 16), 2 * 8 * 32),
    ("gpuopt.attend_one.default", [t(2, 6, 1, 8), t(2, 3, 40, 8), t(2, 3, 40, 16), None, 0.3], t(2, 1, 6, 16), 2 * 12 * 40 * 24),
    ("aten.dot.default", [t(8), t(8)], t(), 2 * 8),
    ("aten.linear.default", [t(2, 3, 8), t(16, 8), t(16)], t(2, 3, 16), 2 * 6 * 8 * 16),
    (
        "aten.convolution.default",
        [t(2, 6, 9, 9), t(12, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2],
        t(2, 12, 7, 7),
        2 * 2 * 12 * 49 * 27,
    ),
    (
        "aten.convolution.default",
        [t(2, 6, 5, 5), t(6, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1],
        t(2, 4, 7, 7),
        2 * 2 * 6 * 25 * 36,
    ),
    (
        "mkldnn._convolution_pointwise.default",
        [t(2, 6, 9, 9), t(12, 6, 3, 3), None, [0, 0], [1, 1], [1, 1], 1, "relu"],
        t(2, 12, 7, 7),
        2 * 2 * 12 * 49 * 54,
    ),
    ("aten._scaled_dot_product_flash_attention.default", [t(2, 4, 16, 8), t(2, 4, 32, 8), t(2, 4, 32, 6)], None, 2 * 2 * 4 * 16 * 32 * 14),
    ("aten._flash_attention_forward.default", [t(2, 16, 4, 8), t(2, 32, 4, 8), t(2, 32, 4, 8)], None, 2 * 2 * 4 * 16 * 32 * 16),
    ("aten.mkldnn_rnn_layer.default", [t(3, 2, 4), t(32, 4), t(32, 8)], None, 2 * 6 * (32 * 4 + 32 * 8)),
    ("aten._cudnn_rnn.default", [t(3, 2, 4), [t(32, 4), t(32, 8), t(32), t(32)]], None, 2 * 6 * (32 * 4 + 32 * 8)),
]


@pytest.mark.parametrize(("op", "args", "out", "flops"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_flops_match_a_count_by_hand(op: str, args: list[Any], out: Any, flops: int) -> None:
    tally = Tally()
    tally.add(op, args, {}, out)
    assert tally.flops == {"float32": float(flops)}


def test_the_fused_encoder_layer_counts_like_its_parts() -> None:
    b, s, d, h = 2, 5, 16, 32
    args = [
        t(b, s, d),
        d,
        2,
        t(3 * d, d),
        t(3 * d),
        t(d, d),
        t(d),
        False,
        False,
        1e-5,
        t(d),
        t(d),
        t(d),
        t(d),
        t(h, d),
        t(h),
        t(d, h),
        t(d),
    ]
    tally = Tally()
    tally.add("aten._transformer_encoder_layer_fwd.default", args, {}, t(b, s, d))
    assert tally.flops["float32"] == 2 * b * s * (3 * d * d + d * d + 2 * d * h) + 4 * b * s * s * d


def test_elementwise_ops_weigh_nothing_and_are_not_called_unknown() -> None:
    tally = Tally()
    tally.add("aten.add.Tensor", [t(4), t(4)], {}, t(4))
    audit = tally.audit("fp16", "test")
    assert audit.shares == {} and audit.honoured and "not counted" not in audit.reason


def test_an_op_of_a_foreign_library_is_named_because_it_may_hide_a_product() -> None:
    tally = Tally()
    tally.add("mylib.fused_gemm.default", [t(4, 4)], {}, t(4, 4))
    assert "mylib.fused_gemm" in tally.audit(None, "test").reason


def products(**flops_by_dtype: int) -> Tally:
    tally = Tally()
    for dtype, k in flops_by_dtype.items():
        tally.add("aten.mm.default", [t(1, k, dtype=getattr(torch, dtype)), t(k, 1)], {}, t(1, 1), where=f"layer.{dtype}")
    return tally


def test_a_request_is_honoured_from_99_percent_and_not_below() -> None:
    assert HONOURED_SHARE == 0.99
    assert products(float16=990, float32=10).audit("fp16", "test").honoured
    refused = products(float16=989, float32=11).audit("fp16", "test")
    assert not refused.honoured
    assert refused.exceptions == ("layer.float32: float32, 1.1%",)
    assert "98.90%" in refused.reason and "99%" in refused.reason


def test_bf16_does_not_satisfy_fp16() -> None:
    assert not products(bfloat16=100).audit("fp16", "test").honoured


def test_shares_sum_to_one() -> None:
    shares = products(float16=5, float32=3, bfloat16=2).audit(None, "test").shares
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares) == ["float16", "float32", "bfloat16"]


def test_tf32_is_its_own_dtype_and_fp32_is_not_honoured_by_it() -> None:
    tally = Tally(tf32_matmul=True, tf32_conv=False)
    tally.add("aten.mm.default", [t(4, 8), t(8, 4)], {}, t(4, 4))
    assert tally.audit("tf32", "test").honoured
    assert not tally.audit("fp32", "test").honoured
    assert tally.audit("fp32", "test").shares == {"tf32": 1.0}


def test_half_products_are_never_tf32() -> None:
    tally = Tally(tf32_matmul=True, tf32_conv=True)
    tally.add("aten.mm.default", [t(4, 8, dtype=torch.float16), t(8, 4, dtype=torch.float16)], {}, t(4, 4, dtype=torch.float16))
    assert tally.flops == {"float16": 256.0}


def test_attention_is_outside_a_tf32_request_but_inside_an_fp16_one() -> None:
    def mixed(dtype: torch.dtype) -> Tally:
        tally = Tally(tf32_matmul=True)
        tally.add("aten.mm.default", [t(16, 16, dtype=dtype), t(16, 16, dtype=dtype)], {}, t(16, 16, dtype=dtype))
        tally.add("aten._scaled_dot_product_efficient_attention.default", [t(2, 2, 8, 8)] * 3, {}, None)
        return tally

    assert mixed(torch.float32).audit("tf32", "test").honoured
    assert not mixed(torch.float16).audit("fp16", "test").honoured


def test_fp8_is_met_by_scaled_products_in_either_float8() -> None:
    tally = Tally()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tally.add("aten._scaled_mm.default", [t(4, 8, dtype=dtype), t(8, 4, dtype=dtype)], {}, t(4, 4, dtype=torch.bfloat16))
    assert tally.audit("fp8", "test").honoured


def test_symbolic_sizes_are_read_by_their_hint_and_never_fixed() -> None:
    class Symbol:
        node = SimpleNamespace(hint=6)

        def __int__(self) -> int:
            raise AssertionError("int() would fix the dimension in the graph")

    fake = SimpleNamespace(shape=(Symbol(), 8), dtype=torch.float32)
    out = SimpleNamespace(shape=(Symbol(), 4), dtype=torch.float32)
    tally = Tally()
    tally.add("aten.mm.default", [fake, t(8, 4)], {}, out)
    assert tally.flops == {"float32": 2.0 * 6 * 4 * 8}


def test_a_graph_names_the_module_that_left_the_request() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(8, 8).half()
            self.last = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.first(x).float())
            return out

    program = torch.export.export(Half().eval(), (torch.zeros(2, 8, dtype=torch.float16),))
    tally = Tally()
    tally.add_graph(program.graph)
    tally.add_graph(program.graph)
    assert tally.flops == {"float16": 256.0, "float32": 256.0}
    audit = tally.audit("fp16", "test")
    assert audit.exceptions == ("last: float32, 50.0%",)


def test_products_inside_control_flow_are_counted() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.cond(x.sum() > 0, lambda a: a @ a, lambda a: a + 1, (x,))
            return out

    program = torch.export.export(Branch(), (torch.ones(4, 4),))
    tally = Tally()
    tally.add_graph(program.graph)
    assert tally.flops == {"float32": 128.0}


def test_tf32_switches_count_from_ampere_on_and_only_on_a_gpu() -> None:
    switches = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True)), cudnn=SimpleNamespace(allow_tf32=False))
    assert tf32_flags(switches, (9, 0)) == {"tf32_matmul": True, "tf32_conv": False}
    assert tf32_flags(switches, (7, 5)) == tf32_flags(switches, None) == {"tf32_matmul": False, "tf32_conv": False}


def test_tf32_switches_set_through_the_newer_interface_are_read_through_it() -> None:
    class Mixed:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("PyTorch is checking whether allow_tf32 is mixed with the new settings")

    switches = SimpleNamespace(
        cuda=SimpleNamespace(matmul=Mixed()), cudnn=SimpleNamespace(allow_tf32=True, conv=SimpleNamespace(fp32_precision="ieee"))
    )
    assert tf32_flags(switches, (9, 0)) == {"tf32_matmul": True, "tf32_conv": False}


def weight_only(*, wide: int = 0) -> Tally:
    """Ops of a product whose [48, 64] weight is widened from int8 first, and of `wide` others whose weight is not."""
    tally = Tally()
    stored, x = t(48, 64, dtype=torch.int8), t(4, 64, dtype=torch.bfloat16)
    widened, turned, out = (t(*shape, dtype=torch.bfloat16) for shape in ((48, 64), (64, 48), (4, 48)))
    tally.add("prims.convert_element_type.default", [stored, torch.bfloat16], {}, widened)
    tally.add("aten.permute.default", [widened, [1, 0]], {}, turned)
    tally.add("aten.mm.default", [x, turned], {}, out, where="narrow")
    for index in range(wide):
        tally.add("aten.addmm.default", [t(48), x, t(64, 48, dtype=torch.bfloat16)], {}, out, where=f"wide{index}")
    return tally


def test_w8_is_judged_by_how_weights_are_stored_and_says_what_they_multiply_in() -> None:
    audit = weight_only().audit("w8", "test")
    assert audit.honoured and audit.shares == {"bfloat16": 1.0}
    assert audit.reason == "100.00% of the weights that products read are stored in int8"


def test_w8_is_honoured_from_half_of_the_weights_and_names_the_others() -> None:
    assert weight_only(wide=1).audit("w8", "test").honoured
    refused = weight_only(wide=2).audit("w8", "test")
    assert not refused.honoured and "33.33%" in refused.reason and "50%" in refused.reason
    assert refused.exceptions[0] == "wide0: stored as bfloat16, 33.3%"
    assert not weight_only(wide=0).audit("int8", "test").honoured


def test_w8_says_so_where_a_compiler_left_no_product_to_read() -> None:
    tally = Tally()
    tally.add("prims.convert_element_type.default", [t(48, 64, dtype=torch.int8), torch.float32], {}, t(48, 64))
    tally.add("aten._scaled_dot_product_flash_attention.default", [t(2, 2, 8, 8)] * 3, {}, None)
    audit = tally.audit("w8", "test")
    assert audit.honoured and "1 weights of int8 are widened in the code they became" in audit.reason


def test_another_tensor_at_the_same_address_is_not_taken_for_a_weight() -> None:
    tally = weight_only()
    stale = next(iter(tally._stems_from))
    other = t(64, 48, dtype=torch.bfloat16)
    tally._stems_from[id(other)] = tally._stems_from[stale]
    assert tally._origin(other) == "bfloat16"


def test_w4_follows_four_bits_from_the_mask_that_unpacks_them_to_the_product_and_no_other_mask() -> None:
    def unpacked_by(mask: int) -> Tally:
        tally = Tally()
        words, wide = t(6, 1, 32, 4, 8, dtype=torch.int32), t(48, 128, dtype=torch.bfloat16)
        bits, centred = (t(48, 1, 128, dtype=torch.int32) for _ in range(2))
        floats, scaled, shifted = (t(48, 1, 128) for _ in range(3))
        turned, x = t(128, 48, dtype=torch.bfloat16), t(4, 128, dtype=torch.bfloat16)
        tally.add("aten.bitwise_and.Scalar", [words, mask], {}, bits)
        tally.add("aten.sub.Tensor", [bits, 8], {}, centred)
        tally.add("aten._to_copy.default", [centred], {}, floats)
        tally.add("aten.mul.Tensor", [floats, t(48, 1, 1)], {}, scaled)
        tally.add("aten.add.Tensor", [scaled, t(48, 1, 1)], {}, shifted)
        tally.add("aten._to_copy.default", [shifted], {}, wide)
        tally.add("aten.t.default", [wide], {}, turned)
        tally.add("aten.mm.default", [x, turned], {}, t(4, 48, dtype=torch.bfloat16))
        return tally

    audit = unpacked_by(15).audit("w4", "test")
    assert audit.honoured and audit.shares == {"bfloat16": 1.0}
    assert audit.reason == "100.00% of the weights that products read are stored in int4"
    assert not unpacked_by(7).audit("w4", "test").honoured and not unpacked_by(15).audit("w8", "test").honoured


def test_w4_weighs_packed_words_by_the_weights_in_them() -> None:
    tally = Tally()
    x, out = t(4, 128, dtype=torch.bfloat16), t(4, 48, dtype=torch.bfloat16)
    tally.add("aten._weight_int4pack_mm.default", [x, t(6, 1, 32, 4, dtype=torch.int32), 128, t(1, 48, 2)], {}, out)
    tally.add("aten.mm.default", [x, t(128, 48, dtype=torch.bfloat16)], {}, out)
    audit = tally.audit("w4", "test")
    assert audit.reason == "50.00% of the weights that products read are stored in int4" and tally.flops == {
        "bfloat16": 2.0 * 2 * 4 * 48 * 128
    }


def test_convolutions_and_attention_are_outside_an_fp8_request_and_half_of_the_products_carries_it() -> None:
    def mixed(narrow: int) -> Tally:
        tally = Tally()
        tally.add("aten._scaled_dot_product_flash_attention.default", [t(2, 2, 64, 64)] * 3, {}, None)
        tally.add("aten.convolution.default", [t(1, 8, 16, 16), t(8, 8, 3, 3)], {}, t(1, 8, 16, 16))
        for index in range(4):
            dtype = torch.float8_e4m3fn if index < narrow else torch.bfloat16
            tally.add("aten._scaled_mm.default", [t(4, 8, dtype=dtype), t(8, 4, dtype=dtype)], {}, t(4, 4), where=f"at{index}")
        return tally

    assert mixed(4).audit("fp8", "test").reason.startswith("100.00% of product FLOPs")
    assert mixed(2).audit("fp8", "test").honoured
    refused = mixed(1).audit("fp8", "test")
    assert not refused.honoured and "25.00% of product FLOPs" in refused.reason and len(refused.exceptions) == 3
