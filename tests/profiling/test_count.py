"""The counter against arithmetic done by hand: every silent zero of the usual tools, by equality."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpuopt.core.live import Inputs
from gpuopt.profiling import formulas
from gpuopt.profiling.count import count, module_classes, module_parameters


def counted(target, *args, tf32=False, **kwargs):
    return count(target, Inputs(args=args, kwargs=kwargs), tf32=tf32)


def flops(target, *args, **kwargs):
    found = counted(target, *args, **kwargs)
    assert found.unknown_ops == ()
    assert found.coverage == 1.0
    assert found.method == "aten dispatch, fake tensors", found.notes
    return found.flops


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


a, b, v = torch.randn(3, 7), torch.randn(5, 7), torch.randn(7)
batch_a, batch_b = torch.randn(4, 3, 7), torch.randn(4, 7, 5)

SILENT_ZEROS = {
    "mv": (lambda: torch.mv(a, v), 2 * 3 * 7),
    "addmv": (lambda: torch.addmv(torch.zeros(3), a, v), 2 * 3 * 7),
    "dot": (lambda: torch.dot(v, v), 2 * 7),
    "vdot": (lambda: torch.vdot(v, v), 2 * 7),
    "addbmm": (lambda: torch.addbmm(torch.zeros(3, 5), batch_a, batch_b), 2 * 4 * 3 * 7 * 5),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(4, 3, 5), batch_a, batch_b), 2 * 4 * 3 * 7 * 5),
    "in-place addmm": (lambda: torch.zeros(3, 5).addmm_(a, b.t()), 2 * 3 * 7 * 5),
    "out variant": (lambda: torch.mm(a, b.t(), out=torch.empty(3, 5)), 2 * 3 * 7 * 5),
    "addr": (lambda: torch.addr(torch.zeros(7, 7), v, v), 2 * 7 * 7),
    "int_mm": (lambda: torch._int_mm(torch.zeros(32, 16, dtype=torch.int8), torch.zeros(16, 8, dtype=torch.int8)), 2 * 32 * 16 * 8),
    "bilinear": (lambda: F.bilinear(torch.randn(2, 3), torch.randn(2, 4), torch.randn(5, 3, 4)), 2 * 2 * 5 * 4 * (3 + 1)),
    "cdist": (lambda: torch.cdist(a, b), 2 * 3 * 5 * 7),
    "einsum": (lambda: torch.einsum("ij,kj->ik", a, b), 2 * 3 * 7 * 5),
    "matmul of a vector": (lambda: a @ v, 2 * 3 * 7),
    "linear of a vector": (lambda: F.linear(v, b), 2 * 5 * 7),
    "complex mm": (lambda: torch.mm(a.to(torch.complex64), b.t().to(torch.complex64)), 8 * 3 * 7 * 5),
    "fft": (lambda: torch.fft.fft(torch.randn(6, 8).to(torch.complex64)), 6 * 5 * 8 * 3),
    "rfft": (lambda: torch.fft.rfft(torch.randn(6, 8)), 6 * 5 * 8 * 3 / 2),
    "irfft": (lambda: torch.fft.irfft(torch.randn(6, 5).to(torch.complex64)), 6 * 5 * 8 * 3 / 2),
    "conv_tbc": (lambda: torch.conv_tbc(torch.randn(9, 2, 3), torch.randn(4, 3, 5), torch.randn(5)), 2 * 6 * 2 * 5 * 4 * 3),
    "grouped mm": (
        lambda: torch._grouped_mm(
            torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(2, 32, 64, dtype=torch.bfloat16), offs=torch.tensor([8, 16], dtype=torch.int32)
        ),
        2 * 16 * 32 * 64,
    ),
    "scaled mm": (
        lambda: torch._scaled_mm(
            torch.zeros(16, 32).to(torch.float8_e4m3fn), torch.zeros(48, 32).to(torch.float8_e4m3fn).t(), scale_a=torch.ones(()), scale_b=torch.ones(()), out_dtype=torch.bfloat16
        ),
        2 * 16 * 32 * 48,
    ),
    "int8 weights": (
        lambda: torch.ops.aten._weight_int8pack_mm(
            torch.randn(4, 32, dtype=torch.bfloat16), torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, dtype=torch.bfloat16)
        ),
        2 * 4 * 32 * 16,
    ),
    "attention": (lambda: F.scaled_dot_product_attention(*(torch.randn(2, 4, 16, 8) for _ in range(3))), 4 * 2 * 4 * 16 * 16 * 8),
    "causal attention counts full": (
        lambda: F.scaled_dot_product_attention(*(torch.randn(2, 4, 16, 8) for _ in range(3)), is_causal=True),
        4 * 2 * 4 * 16 * 16 * 8,
    ),
    "cross attention with another value width": (
        lambda: F.scaled_dot_product_attention(torch.randn(2, 4, 16, 8), torch.randn(2, 4, 10, 8), torch.randn(2, 4, 10, 12)),
        2 * 2 * 4 * 16 * 10 * (8 + 12),
    ),
    "grouped-query attention": (
        lambda: F.scaled_dot_product_attention(torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8), enable_gqa=True),
        4 * 2 * 4 * 16 * 16 * 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT_ZEROS)
def test_what_others_count_as_zero_is_counted_by_the_formula(name):
    function, expected = SILENT_ZEROS[name]
    assert flops(Call(function)) == expected


@pytest.mark.parametrize("name", ["mv", "dot", "addbmm", "einsum", "attention", "matmul of a vector", "linear of a vector"])
def test_inference_mode_around_and_inside_the_forward_changes_nothing(name):
    function, expected = SILENT_ZEROS[name]

    def inside():
        with torch.inference_mode():
            return function()

    assert flops(Call(inside)) == expected
    with torch.inference_mode():
        assert flops(Call(function)) == expected


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
def test_recurrent_layers_count_every_gate_of_every_step(kind, gates, layers, bidirectional):
    batch, steps, width, hidden = 2, 5, 4, 8
    directions = 2 if bidirectional else 1
    expected = sum(
        2 * batch * steps * directions * gates * hidden * ((width if layer == 0 else hidden * directions) + hidden)
        for layer in range(layers)
    )
    module = kind(width, hidden, layers, bidirectional=bidirectional, batch_first=True)
    assert flops(module, torch.randn(batch, steps, width)) == expected
    with torch.inference_mode():
        assert flops(module, torch.randn(batch, steps, width)) == expected


def test_the_fused_gpu_lstm_has_the_same_count_as_its_parts():
    x, hidden = torch.empty(5, 2, 4), 8
    weights = [torch.empty(32, 4), torch.empty(32, 8), torch.empty(32), torch.empty(32)]
    assert formulas.PRODUCTS["aten::_cudnn_rnn"]({"input": x, "weight": weights}, None) == 2 * 10 * 4 * hidden * (4 + 8)
    packed = torch.empty(7, 4)  # a packed sequence: steps of all samples in one dimension
    assert formulas.PRODUCTS["aten::_cudnn_rnn"]({"input": packed, "weight": weights}, None) == 2 * 7 * 4 * hidden * (4 + 8)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_layers_fast_path_costs_what_the_slow_path_costs(norm_first):
    batch, length, width, feed = 2, 10, 16, 32
    layer = nn.TransformerEncoderLayer(width, 4, feed, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(batch, length, width)
    expected = 2 * batch * length * width * (4 * width + 2 * feed) + 4 * batch * length * length * width
    assert torch.backends.mha.get_fastpath_enabled()
    assert flops(layer, x) == expected
    assert torch.backends.mha.get_fastpath_enabled()  # put back
    fused = formulas.PRODUCTS["aten::_transformer_encoder_layer_fwd"](
        {"src": x, "ffn_weight_1": layer.linear1.weight, "ffn_weight_2": layer.linear2.weight}, None
    )
    assert fused == expected
    attention = nn.MultiheadAttention(width, 4, batch_first=True).eval()
    expected = 8 * batch * length * width * width + 4 * batch * length * length * width
    assert flops(attention, x, x, x) == expected
    assert flops(attention, x, x, x, need_weights=False) == expected
    assert formulas.PRODUCTS["aten::_native_multi_head_attention"]({"query": x, "key": x, "value": x}, None) == expected


CUDA_ONLY = {
    "aten::_scaled_dot_product_flash_attention": 4 * 2 * 3 * 5 * 7 * 8,
    "aten::_scaled_dot_product_efficient_attention": 4 * 2 * 3 * 5 * 7 * 8,
    "aten::_scaled_dot_product_cudnn_attention": 4 * 2 * 3 * 5 * 7 * 8,
    "aten::_scaled_dot_product_fused_attention_overrideable": 4 * 2 * 3 * 5 * 7 * 8,
}


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_attention_ops_that_only_a_gpu_picks_have_the_same_formula(name):
    args = {"query": torch.empty(2, 3, 5, 8), "key": torch.empty(2, 3, 7, 8), "value": torch.empty(2, 3, 7, 8)}
    assert formulas.PRODUCTS[name](args, None) == CUDA_ONLY[name]


@pytest.mark.parametrize(
    "name",
    [
        "cudnn_convolution",
        "miopen_convolution",
        "mkldnn_convolution",
        "_slow_conv2d_forward",
        "_conv_depthwise2d",
        "cudnn_convolution_add_relu",
    ],
)
def test_library_convolutions_count_like_the_general_one(name):
    assert (
        formulas.PRODUCTS[f"aten::{name}"]({"self": torch.empty(2, 4, 9, 9), "weight": torch.empty(6, 2, 3, 3)}, torch.empty(2, 6, 7, 7))
        == 2 * 2 * 6 * 49 * 2 * 9
    )


@pytest.mark.parametrize("name", ["cudnn_convolution_transpose", "slow_conv_transpose2d"])
def test_transposed_library_convolutions_count_from_the_input(name):
    args = {"self": torch.empty(2, 4, 5, 5), "weight": torch.empty(4, 3, 3, 3)}
    assert formulas.PRODUCTS[f"aten::{name}"](args, torch.empty(2, 6, 11, 11)) == 2 * 2 * 4 * 25 * 3 * 9


def brute_convolution(batch, channels, out_channels, groups, size, taps, stride, dilation):
    """Multiply-adds of a convolution without padding, by walking over every output element and tap."""
    out = (size - dilation * (taps - 1) - 1) // stride + 1
    total = 0
    for _ in itertools.product(range(batch), range(out_channels), range(out), range(out)):
        total += sum(1 for _ in itertools.product(range(channels // groups), range(taps), range(taps)))
    return total


sizes = st.integers(1, 4)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    inner=st.integers(1, 2),
    outer=st.integers(1, 2),
    taps=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
)
def test_convolutions_count_two_flops_a_multiply_add_done_by_hand(batch, groups, inner, outer, taps, stride, dilation):
    conv = nn.Conv2d(groups * inner, groups * outer, taps, stride=stride, dilation=dilation, groups=groups)
    assert flops(conv, torch.randn(batch, groups * inner, 7, 7)) == 2 * brute_convolution(
        batch, groups * inner, groups * outer, groups, 7, taps, stride, dilation
    )


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    inner=st.integers(1, 2),
    outer=st.integers(1, 2),
    taps=st.integers(1, 3),
    stride=st.integers(1, 3),
)
def test_transposed_convolutions_count_what_each_input_element_scatters(batch, groups, inner, outer, taps, stride):
    conv = nn.ConvTranspose2d(groups * inner, groups * outer, taps, stride=stride, groups=groups)
    expected = 2 * batch * groups * inner * 4 * 4 * outer * taps * taps
    assert flops(conv, torch.randn(batch, groups * inner, 4, 4)) == expected


@settings(max_examples=15, deadline=None)
@given(m=sizes, k=sizes, n=sizes, batch=sizes)
def test_products_count_two_flops_a_multiply_add_and_agree_with_pytorch(m, k, n, batch):
    x, y = torch.randn(batch, m, k), torch.randn(batch, k, n)
    adds = sum(1 for _ in itertools.product(range(batch), range(m), range(n), range(k)))
    assert flops(Call(torch.bmm), x, y) == 2 * adds
    with FlopCounterMode(display=False) as theirs:
        torch.bmm(x, y)
    assert theirs.get_total_flops() == 2 * adds


@settings(max_examples=10, deadline=None)
@given(batch=sizes, heads=sizes, queries=sizes, keys=sizes, width=sizes)
def test_attention_counts_scores_and_mixtures_done_by_hand(batch, heads, queries, keys, width):
    q, k, v = torch.randn(batch, heads, queries, width), torch.randn(batch, heads, keys, width), torch.randn(batch, heads, keys, width)
    scores = sum(1 for _ in itertools.product(range(batch), range(heads), range(queries), range(keys), range(width)))
    assert flops(Call(F.scaled_dot_product_attention), q, k, v) == 2 * scores + 2 * scores


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv3d(2, 3, 3), (1, 2, 5, 5, 5)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
        (nn.Linear(5, 3), (2, 4, 5)),
    ],
)
def test_layers_pytorch_counts_right_agree_with_it(module, shape):
    with FlopCounterMode(display=False) as theirs:
        module(torch.randn(shape))
    assert flops(module, torch.randn(shape)) == theirs.get_total_flops()


def bert_large(**changes):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **changes)
    with torch.device("meta"):
        return BertModel(config, add_pooling_layer=False).eval().half()


@pytest.mark.parametrize("batch, length", [(64, 512), (1, 128)])
def test_bert_large_is_the_published_formula_without_allocating_it(batch, length):
    found = counted(bert_large(), input_ids=torch.zeros(batch, length, dtype=torch.int64, device="meta"))
    assert found.flops == batch * length * 24 * (24 * 1024**2 + 4 * length * 1024)
    assert found.flops_by_dtype == {"float16": found.flops}
    assert found.unknown_ops == ()


def test_an_attention_mask_read_by_the_model_does_not_stop_the_count():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)).eval()
    ids = torch.zeros(2, 6, dtype=torch.int64)
    plain = counted(model, input_ids=ids)
    masked = counted(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    layer = 2 * 6 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 2 * 6 * 6 * 32
    pooler = 2 * 2 * 32 * 32
    assert plain.flops == masked.flops == layer + pooler
    assert plain.method == masked.method == "aten dispatch, fake tensors"


def test_resnet_101_is_the_published_15_6_gflop_an_image():
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(depths=[3, 4, 23, 3], layer_type="bottleneck", num_labels=1000)).eval()
    found = counted(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert found.flops == pytest.approx(15.6e9, rel=0.005)
    assert found.num_parameters == pytest.approx(44.5e6, rel=0.005)
    assert found.coverage == 1.0


def test_a_custom_op_is_unknown_and_never_zero():
    @torch.library.custom_op("gpuopt_tests::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    @mystery.register_fake
    def _(x):
        return torch.empty_like(x)

    found = counted(Call(lambda x: torch.relu(torch.ops.gpuopt_tests.mystery(x))), torch.randn(8, 8))
    assert found.unknown_ops == ("gpuopt_tests.mystery",)
    assert [r.flops for r in found.records if "mystery" in r.op] == [None]
    assert found.coverage == pytest.approx(0.5)


def test_ops_nobody_has_a_formula_for_are_named():
    found = counted(Call(torch.linalg.inv), torch.randn(8, 8))
    assert any("linalg_inv" in op for op in found.unknown_ops)
    assert found.coverage < 1.0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.softmax(F.layer_norm(x, x.shape[-1:]), -1),
        lambda x: F.gelu(x) * torch.sigmoid(x) + x.exp().sum(-1, keepdim=True),
        lambda x: torch.topk(x, 2).values,
        lambda x: torch.cat([x, x]).reshape(-1).sort().values,
        lambda x: F.max_pool2d(F.interpolate(x[None], scale_factor=2), 2),
        lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
        lambda x: F.group_norm(x, 2),
        lambda x: F.rms_norm(x, x.shape[-1:]),
        lambda x: F.embedding(x[0, :, 0].long().clamp(0, 1), torch.randn(5, 4)),
        lambda x: torch.where(x > 0, x, x.cumsum(-1)).argmax(-1),
        lambda x: F.pad(x, (1, 1), mode="reflect").unfold(-1, 2, 1).std(-1),
        lambda x: F.grid_sample(x[None], torch.zeros(1, 2, 2, 2), align_corners=False),
        lambda x: F.one_hot(x.abs().long() % 3, 3),
    ],
)
def test_what_holds_no_products_is_known_to_be_zero(function):
    found = counted(Call(function), torch.randn(4, 8, 8))
    assert (found.flops, found.unknown_ops, found.coverage) == (0.0, (), 1.0)
    assert found.bytes > 0


def total_bytes(function, *args):
    return counted(Call(function), *args).bytes


def test_bytes_are_each_region_once_read_and_once_written():
    x = torch.randn(16, 32)
    size = 16 * 32 * 4
    assert total_bytes(lambda t: t + 1, x) == 2 * size
    assert total_bytes(lambda t: t + t, x) == 2 * size  # read once though named twice
    assert total_bytes(lambda t: t.view(32, 16).t()[3:], x) == 0
    assert total_bytes(lambda t: t.reshape(-1), x) == 0
    assert total_bytes(lambda t: t.t().contiguous(), x) == 2 * size
    assert total_bytes(lambda t: t.mul_(2), x.clone()) == 2 * size
    assert total_bytes(lambda t: t.fill_(2), x.clone()) == size
    assert total_bytes(lambda t: torch.add(t, 1, out=torch.empty(16, 32)), x) == 2 * size
    assert total_bytes(lambda t: t[:, :1].expand(16, 32) * 1, x) == 16 * 4 + size  # an expanded dimension is one column
    assert total_bytes(lambda t: t[:8] + t[8:], x) == size + size // 2
    assert total_bytes(lambda t: t.half(), x) == size + size // 2
    assert total_bytes(lambda t: torch.zeros(16, 32), x) == size
    assert total_bytes(lambda t: torch.empty(16, 32), x) == 0


def test_gathers_cost_their_rows_and_cache_writes_cost_what_they_write():
    table, rows = torch.randn(10_000, 64), torch.arange(8)
    assert total_bytes(F.embedding, rows, table) == 8 * 8 + 2 * 8 * 64 * 4
    assert total_bytes(lambda t, i: t[i], table, rows) == 8 * 8 + 2 * 8 * 64 * 4
    cache, new = torch.zeros(4, 1024, 64), torch.randn(4, 1, 64)
    moved = total_bytes(lambda c, n, i: c.index_copy_(1, i, n), cache, new, torch.tensor([5]))
    assert moved == 2 * 4 * 64 * 4 + 8
    assert total_bytes(lambda c, n: c[:, 5:6].copy_(n), cache, new) == 2 * 4 * 64 * 4


def test_products_read_operands_once_and_attention_never_writes_its_scores():
    assert total_bytes(torch.mm, torch.randn(8, 16), torch.randn(16, 4)) == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    q = torch.randn(1, 2, 256, 8)
    assert total_bytes(F.scaled_dot_product_attention, q, q.clone(), q.clone()) == 4 * q.numel() * 4
    strided = nn.Conv2d(4, 8, 1, stride=2, bias=False)
    assert counted(strided, torch.randn(1, 4, 8, 8)).bytes == 4 * (4 * 16 + 8 * 4 + 8 * 16)  # a quarter of the input is touched


def test_rows_carry_module_class_dtype_and_count():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.Linear(4, 4).bfloat16()))
    model[2].insert(1, Call(lambda x: x.bfloat16()))
    found = counted(model, torch.randn(2, 4))
    products = [(r.op, r.module, r.module_class, r.dtype, r.count, r.flops) for r in found.records if r.flops]
    assert products == [("aten.addmm", "0", "Linear", "float32", 2, 128.0), ("aten.addmm", "2.2", "Linear", "bfloat16", 1, 64.0)]
    assert found.flops_by_dtype == {"float32": 128.0, "bfloat16": 64.0}
    assert found.num_parameters == 40
    assert module_parameters(model) == {"": 40, "0": 20, "1": 0, "2": 40, "2.1": 0, "2.2": 20}
    assert module_classes(model)[""] == "Sequential"


def test_tf32_marks_float32_products_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = counted(model, torch.randn(2, 4), tf32=True)
    assert found.flops_by_dtype == {"tf32": 64.0}
    assert {r.dtype for r in found.records if not r.flops} == {"float32"}
    assert counted(model.double(), torch.randn(2, 4, dtype=torch.float64), tf32=True).flops_by_dtype == {"float64": 64.0}
    assert counted(Call(torch.fft.rfft), torch.randn(8), tf32=True).flops_by_dtype.keys() == {"float32"}


def test_autocast_is_counted_in_the_dtype_it_casts_to():
    def forward(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ w

    assert counted(Call(forward), torch.randn(4, 4), torch.randn(4, 4)).flops_by_dtype == {"bfloat16": 128.0}


class Counts(nn.Module):
    """Keeps state between calls: what counting must not touch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.cache = None

    def forward(self, x):
        self.calls += 1
        self.cache = x
        return self.norm(x)


def test_the_real_module_is_not_touched():
    model = Counts().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    counted(model, torch.randn(3, 4))
    assert model.cache is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)) == hooks
    assert type(model.norm.weight) is nn.Parameter


class ReadsValues(nn.Module):
    def forward(self, x):
        return x @ x if x.sum().item() > 0 else x


def test_a_forward_that_reads_values_is_run_once_for_real_and_says_so():
    found = counted(ReadsValues(), torch.ones(4, 4))
    assert found.flops == 128
    assert "real run" in found.method
    assert any("run once" in note for note in found.notes)


def test_an_op_without_a_fake_kernel_is_run_for_real_and_logs_nothing(caplog):
    @torch.library.custom_op("gpuopt_tests::no_fake", mutates_args=())
    def no_fake(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    found = counted(Call(lambda x: torch.ops.gpuopt_tests.no_fake(x) @ x), torch.randn(8, 8))
    assert (found.flops, found.unknown_ops) == (2 * 8**3, ("gpuopt_tests.no_fake",))
    assert "real run" in found.method
    assert not caplog.records


def test_a_forward_that_cannot_run_raises_its_own_error_and_leaves_no_hooks():
    hooks = len(nn.modules.module._global_forward_hooks)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        counted(nn.Linear(4, 4), torch.randn(2, 5))
    assert len(nn.modules.module._global_forward_hooks) == hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_scripted_and_exported_modules_and_bound_methods_count_alike():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    expected = 2 * 3 * (4 * 8 + 8 * 2)
    assert flops(model, x) == expected
    assert flops(torch.export.export(model, (x,)).module(), x) == expected
    assert flops(model.forward, x) == expected
    assert flops(lambda t: model(t), x) == expected
    assert flops(torch.jit.trace(model, x), x) == expected


def test_counting_a_model_twice_gives_the_same_rows():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    assert counted(model, torch.randn(2, 5, 16)) == counted(model, torch.randn(2, 5, 16))


def test_totals_are_sums_of_rows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    found = counted(model, torch.randn(2, 3, 8, 8))
    assert found.flops == sum(r.flops for r in found.records) == sum(found.flops_by_dtype.values())
    assert math.isclose(found.bytes, sum(r.bytes for r in found.records))


def test_no_op_is_both_a_product_and_known_to_be_none():
    assert not formulas.KNOWN_ZERO & {name.removeprefix("aten::") for name in formulas.PRODUCTS}


def test_every_product_pytorch_can_dispatch_to_is_in_a_table_or_unknown():
    """An op added to PyTorch under a product's name must not slip in as a known zero."""
    suspicious = re.compile(
        r"(^|_|add|addb|b|baddb|int)mm(_|$)|matmul|conv(olution|\d|_)|attention|lstm(?!_cell|.*cell)|linear(?!ize|.*1d)|_rnn|addmv|trilinear$|_gemm"
    )
    harmless = re.compile(
        r"upsample|resolve_conj|fused_.*_cell|convert|reorder|flatten_weight|backward|bilinear2d|linear1d|trilinear3d|_linear_combination"
    )
    slipped = []
    for full in torch._C._dispatch_get_all_op_names():
        name = full.partition(".")[0]
        op = name.removeprefix("aten::")
        if op == name or not suspicious.search(op) or harmless.search(op):
            continue
        if not formulas.is_product(name) and formulas.is_zero_when_dispatched(name):
            slipped.append(full)
    assert slipped == []


def test_one_row_times_several_matrices_is_counted() -> None:
    from gpuopt.programs import ops

    ops.register()
    weights = [torch.randn(n, 8) for n in (16, 4)]
    found = counted(Call(lambda x: torch.ops.gpuopt.matvecs(x, weights)[0]), torch.randn(1, 8))
    assert found.flops == 2 * 8 * 20
    found = counted(Call(lambda x: torch.ops.gpuopt.gated_matvec(x, weights[0], weights[0], "silu")), torch.randn(1, 8))
    assert found.flops == 2 * 8 * 32


def test_attention_of_one_query_is_counted() -> None:
    from gpuopt.programs.ops import attend_one

    key, value = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 16)
    found = counted(Call(lambda x: attend_one.attend_one(x, key, value, None, 0.3)), torch.randn(2, 6, 1, 8))
    assert found.flops == 2 * 12 * 40 * 24
