"""Kernels to ops to modules, and FLOPs with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import OpRecord
from gpuopt.profiling import trace as tracing
from gpuopt.profiling.attribute import attribute, coverage, modules
from gpuopt.profiling.count import count, module_classes, module_parameters, summarize


def a_count(*records):
    return summarize(tuple(records), method="by hand")


def product(module, shapes="2x4, 4x8", flops=128.0, op="aten.mm", calls=1, moved=100.0):
    return OpRecord(op=op, module=module, dtype="float16", count=calls, flops=flops, bytes=moved, module_class="Linear", shapes=shapes)


def test_equal_ops_in_different_modules_get_their_own_kernels(timeline):
    for step, start in enumerate((0, 1000)):
        timeline.step(start, 900)
        timeline.module("", "Net", start + 1, 800)
        for at, (name, dur) in enumerate((("a", 10), ("b", 30))):
            t = start + 10 + 100 * at
            timeline.module(name, "Linear", t, 90)
            timeline.op("aten::mm", t + 5, 50, [[2, 4], [4, 8]])
            timeline.kernel(f"gemm_{name}", launch=t + 10, start=t + 200, dur=dur + 2 * step)
    records = attribute(timeline.trace(), a_count(product("a"), product("b")))
    assert [(r.module, r.time_ns, r.flops, r.count, r.kernels) for r in records] == [
        ("b", 31_000, 128.0, 1, ("gemm_b",)),
        ("a", 11_000, 128.0, 1, ("gemm_a",)),
    ]
    assert coverage(records) == 1.0


def test_shapes_tell_two_calls_of_one_op_in_one_module_apart(timeline):
    timeline.step(0, 900)
    timeline.module("", "Net", 1, 800)
    for at, (k, dur) in enumerate(((4, 10), (16, 40))):
        timeline.op("aten::mm", 10 + 100 * at, 50, [[2, k], [k, 8]])
        timeline.kernel("gemm", launch=15 + 100 * at, start=300 + 50 * at, dur=dur)
    records = attribute(timeline.trace(), a_count(product("", "2x4, 4x8", 128.0), product("", "2x16, 16x8", 512.0)))
    assert [(r.shapes, r.time_ns, r.flops) for r in records] == [("2x16, 16x8", 40_000, 512.0), ("2x4, 4x8", 10_000, 128.0)]


def test_an_op_with_several_kernels_is_counted_once(timeline):
    timeline.step(0, 900)
    timeline.module("", "Net", 1, 800)
    timeline.op("aten::mm", 10, 50, [[2, 4], [4, 8]])
    timeline.kernel("splitk", launch=15, start=300, dur=10)
    timeline.kernel("reduce", launch=18, start=310, dur=2)
    (record,) = attribute(timeline.trace(), a_count(product("")))
    assert (record.time_ns, record.flops, record.count, record.kernels) == (12_000, 128.0, 1, ("splitk", "reduce"))


def test_a_gpus_convolution_joins_a_count_made_on_a_cpu(timeline):
    timeline.step(0, 900)
    timeline.module("conv", "Conv2d", 1, 800)
    shapes = [[2, 3, 8, 8], [4, 3, 3, 3], [4]]
    timeline.op("aten::conv2d", 10, 90, shapes)
    timeline.op("aten::convolution", 11, 80, shapes)
    timeline.op("aten::_convolution", 12, 70, shapes)
    timeline.op("aten::cudnn_convolution", 20, 30, shapes[:2])
    timeline.kernel("sm90_xmma_fprop", launch=25, start=200, dur=50)
    timeline.op("aten::add_", 60, 10, [[2, 4, 6, 6], [1, 4, 1, 1]])
    timeline.kernel("elementwise", launch=62, start=250, dur=5)
    counted = a_count(product("conv", "2x3x8x8, 4x3x3x3, 4", 999.0, op="aten.mkldnn_convolution"))
    (record,) = attribute(timeline.trace(), counted)
    assert (record.op, record.module, record.flops, record.time_ns) == ("aten.conv2d", "conv", 999.0, 55_000)


def test_graph_replays_are_rows_of_their_own_and_unknown(timeline):
    timeline.step(0, 900)
    timeline.module("fc", "Linear", 1, 800)
    timeline.op("aten::mm", 10, 50, [[2, 4], [4, 8]])
    timeline.kernel("nvjet_hsh", launch=15, start=100, dur=30, graph=5)
    timeline.kernel("triton_poi_fused_gelu_0", launch=15, start=130, dur=10, graph=5)
    records = attribute(timeline.trace(), a_count(product("fc")))
    assert [(r.op, r.module, r.flops) for r in records] == [("nvjet_hsh", "?", None), ("triton_poi_fused_gelu_0", "?", 0.0)]
    assert coverage(records) == 0.25


def test_a_compiled_graphs_library_calls_keep_their_flops_without_a_module(timeline):
    timeline.step(0, 900)
    timeline.op("Torch-Compiled Region: 0/0", 5, 500)
    timeline.op("aten::addmm", 10, 50, [[8], [2, 4], [4, 8]])
    timeline.kernel("nvjet", launch=15, start=100, dur=30)
    timeline.op("triton_red_fused_native_layer_norm_1", 70, 10)
    timeline.kernel("triton_red_fused_native_layer_norm_1", launch=72, start=130, dur=10)
    timeline.op("aten::convolution", 100, 50, [[2, 3, 8, 8], [4, 3, 3, 3], []])
    timeline.kernel("fprop", launch=110, start=150, dur=20)
    counted = a_count(
        product("fc", "8, 2x4, 4x8", 128.0, op="aten.addmm"), product("conv", "2x3x8x8, 4x3x3x3, 4", 999.0, op="aten.convolution")
    )
    records = {r.kernels[0]: r for r in attribute(timeline.trace(), counted)}
    assert (records["nvjet"].module, records["nvjet"].flops, records["nvjet"].dtype) == ("?", 128.0, "float16")
    assert (records["fprop"].module, records["fprop"].flops) == ("?", 999.0)
    assert records["triton_red_fused_native_layer_norm_1"].flops == 0.0


def test_a_product_seen_only_in_the_trace_is_counted_from_its_shapes(timeline):
    timeline.step(0, 900)
    timeline.op("aten::bmm", 10, 50, [[3, 2, 4], [3, 4, 8]])
    timeline.kernel("gemm", launch=15, start=100, dur=30)
    (record,) = attribute(timeline.trace(), a_count())
    assert record.flops == 2 * 3 * 2 * 4 * 8
    assert record.bytes == 2 * 3 * (2 * 4 + 4 * 8 + 2 * 8)


def test_a_custom_ops_kernel_stays_unknown(timeline):
    timeline.step(0, 900)
    timeline.op("mylib::attend", 10, 50, [[3, 2, 4]])
    timeline.kernel("attend_kernel", launch=15, start=100, dur=30)
    records = attribute(timeline.trace(), a_count())
    assert [(r.op, r.flops) for r in records] == [("mylib.attend", None)]
    assert coverage(records) == 0.0


def test_a_fused_lstm_gets_what_its_module_was_counted_for_in_parts(timeline):
    timeline.step(0, 900)
    timeline.module("rnn", "LSTM", 1, 800)
    timeline.op("aten::lstm", 5, 200, [[2, 5, 8]])
    timeline.op("aten::_cudnn_rnn", 10, 150, [[2, 5, 8], [64, 8]])
    timeline.kernel("persistent_lstm", launch=15, start=100, dur=30)
    parts = (product("rnn", "2x8, 8x64", 100.0, op="aten.mm", calls=5), product("rnn", "10x8, 8x64", 50.0, op="aten.addmm"))
    (record,) = attribute(timeline.trace(), a_count(*parts))
    assert (record.flops, record.dtype, record.module) == (150.0, "float16", "rnn")


def test_two_fused_rows_of_one_module_share_nothing(timeline):
    timeline.step(0, 900)
    timeline.module("rnn", "LSTM", 1, 800)
    for at in range(2):
        timeline.op("aten::_cudnn_rnn", 10 + 100 * at, 50, [[2, 5, 8 + at]])
        timeline.kernel(f"lstm{at}", launch=15 + 100 * at, start=100 + 100 * at, dur=30)
    records = attribute(timeline.trace(), a_count(product("rnn", "2x8, 8x64", 100.0)))
    assert [r.flops for r in records] == [None, None]


def test_copies_over_the_link_are_rows_of_their_own(timeline):
    timeline.step(0, 900)
    timeline.copy("h2d", "Pageable", launch=5, call=50, start=20, dur=30, size=1_000_000)
    timeline.op("aten::copy_", 100, 20, [[8, 8], [8, 8]])
    timeline.copy("d2d", "", launch=105, call=2, start=120, dur=3, size=256)
    by_op = {r.op: r for r in attribute(timeline.trace(), a_count())}
    assert (by_op["memcpy h2d (pageable)"].bytes, by_op["memcpy h2d (pageable)"].time_ns) == (1_000_000, 30_000)
    assert by_op["aten.copy_"].time_ns == 3_000


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)).eval()
    ids = torch.randint(0, 100, (2, 8))
    with torch.inference_mode():
        counted = count(model, Inputs(args=(ids,)))
        traced = tracing.record(lambda: model(ids), "cpu", steps=2, with_modules=model)
    return model, counted, traced


def test_on_a_cpu_every_op_of_a_real_model_finds_its_flops(bert):
    _, counted, traced = bert
    records = attribute(traced, counted)
    assert len(traced.steps) == 2
    assert sum(r.flops for r in records if r.flops) == pytest.approx(counted.flops)
    assert coverage(records) == 1.0
    assert not [r for r in records if r.flops and r.module in ("?", "")]


def test_times_of_all_records_are_the_time_of_all_ops(bert):
    _, counted, traced = bert
    records = attribute(traced, counted)
    top = sum(o.dur_ns for o in traced.ops if o.step is not None and o.parent is None)
    assert sum(r.time_ns for r in records) == pytest.approx(top / len(traced.steps), rel=0.02)


def test_the_module_tree_sums_to_its_root(bert):
    model, counted, traced = bert
    records = attribute(traced, counted)
    rows = modules(records, counted, parameters=module_parameters(model), classes=module_classes(model))
    by_name = {r.name: r for r in rows}
    assert rows[0].name == ""
    assert (rows[0].module_class, rows[0].depth, rows[0].pct_of_time) == ("BertModel", 0, pytest.approx(100.0))
    assert rows[0].flops == counted.flops
    assert rows[0].num_parameters == counted.num_parameters
    for name in ("", "encoder.layer.0", "encoder.layer.0.attention"):
        depth = by_name[name].depth + 1
        below = [r for r in rows if r.depth == depth and (r.name.startswith(name + ".") or not name)]
        own = sum(r.time_ns for r in records if r.module == name or (not name and r.module == "?"))
        assert sum(r.time_ns for r in below) + own == pytest.approx(by_name[name].time_ns)
        assert sum(r.flops for r in below) == pytest.approx(by_name[name].flops - sum(r.flops for r in counted.records if r.module == name))
    names = [r.name for r in rows]
    assert names.index("encoder.layer.0") < names.index("encoder.layer.0.attention.self.query") < names.index("encoder.layer.1")


def test_a_module_tree_without_times_still_has_its_flops(bert):
    _, counted, _ = bert
    rows = modules((), counted, 2.0)
    assert (rows[0].time_ns, rows[0].flops) == (2e6, counted.flops)
    assert {r.time_ns for r in rows[1:]} == {None}


def test_a_module_holding_an_unknown_op_has_no_flops():
    unknown = OpRecord(op="lib.x", module="a.b", dtype="float32", flops=None, bytes=8.0)
    rows = {r.name: r for r in modules((), a_count(unknown, product("c")))}
    assert (rows["a.b"].flops, rows["a"].flops, rows["c"].flops) == (None, None, 128.0)


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), (2, 5, 16)),
        (nn.LSTM(8, 16, 2, batch_first=True).eval(), (2, 5, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval(), (2, 3, 8, 8)),
    ],
)
def test_fused_paths_lose_no_flops_between_count_and_trace(module, shape):
    x = torch.randn(shape)
    counted = count(module, Inputs(args=(x,)))
    with torch.inference_mode():
        traced = tracing.record(lambda: module(x), "cpu", steps=2, with_modules=module)
    records = attribute(traced, counted)
    assert sum(r.flops or 0 for r in records) == pytest.approx(counted.flops)
    assert coverage(records) == pytest.approx(1.0)


def test_tracing_leaves_no_hooks_behind_even_when_the_call_fails():
    hooks = len(nn.modules.module._global_forward_hooks)
    module = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        tracing.record(lambda: module(torch.randn(2, 5)), "cpu", warmup=0, with_modules=module)
    assert len(nn.modules.module._global_forward_hooks) == hooks
    traced = tracing.record(lambda: module(torch.randn(2, 4)), "cpu", with_modules=module)
    assert {m.name for m in traced.modules} == {""}
