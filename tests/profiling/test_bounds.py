"""Bounds against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Ceilings, OpRecord
from gpuopt.profiling import roofline
from gpuopt.profiling.bounds import External, build, external
from gpuopt.profiling.count import count, summarize


def record(op="aten.mm", flops=0.0, moved=0.0, dtype="float16", module=""):
    return OpRecord(op=op, module=module, dtype=dtype, flops=flops, bytes=moved)


GEMM = record(flops=764e9, moved=426.1e6)  # 1 ms of products, 0.1 ms of bytes
NORM = record("aten.native_layer_norm", moved=4.261e9)  # 1 ms of bytes
COUNT = summarize((GEMM, NORM), method="")
OUTSIDE = External(by_dtype={"float16": 2 * 4.261e8, "int64": 4.261e8})


def test_op_by_op_is_a_sum_and_fused_is_the_larger_of_the_two_sums(h200):
    found = build(COUNT, h200, OUTSIDE)
    assert (found.precision, found.unfused_ms, found.fused_ms) == ("fp16", pytest.approx(2.0), pytest.approx(1.0))
    assert found.bytes_fused == pytest.approx(3 * 4.261e8)
    moving = build(COUNT, h200, External(by_dtype={"float16": 6.3915e9}))
    assert moving.fused_ms == pytest.approx(1.5)


def test_parameters_that_no_op_reads_are_no_bound(h200):
    assert build(COUNT, h200, External(by_dtype={"float16": 1e12})).fused_ms == pytest.approx(2.0)


def test_the_sum_is_that_of_the_roofline_points(h200):
    rows = roofline.points([GEMM, NORM], h200, cache_bytes=None)
    assert build(COUNT, h200).unfused_ms == pytest.approx(sum(p.floor_ns for p in rows) / 1e6)


def test_another_precision_has_its_own_peak_and_width(h200):
    found = build(COUNT, h200, OUTSIDE)
    assert found.by_precision["bf16"] == pytest.approx(764 / 792 + 1.0)
    assert found.by_precision["fp32"] == pytest.approx(764 / 51 + 2.0)
    # fp8: products alone, the norm stays at sixteen bits; int8 has a data sheet only
    assert found.by_precision["fp8"] == pytest.approx(764 / 1502 + 1.0)
    assert found.by_precision["int8"] == pytest.approx(764 / 1979 + 1.0)
    assert any("int8 by its spec ceiling" in n for n in found.notes)
    assert "tf32" not in found.by_precision and "fp16" not in found.by_precision
    assert found.fused_by_precision["fp8"] == pytest.approx(max(764 / 1502, 0.1 + 0.1))  # the integers keep their width


def test_attention_stays_at_sixteen_bits_when_products_go_to_eight(h200):
    attention = record("aten._scaled_dot_product_flash_attention", flops=764e9)
    assert build(summarize((GEMM, attention), method=""), h200).by_precision["fp8"] == pytest.approx(764 / 1502 + 1.0)


def test_what_is_not_known_is_none_and_said(h200):
    assert build(COUNT, h200).fused_ms is None
    nothing = build(COUNT, Ceilings(), OUTSIDE)
    assert (nothing.unfused_ms, nothing.fused_ms, nothing.by_precision) == (None, None, {})
    unknown = build(summarize((GEMM, record("lib.custom", flops=None, moved=1e6)), method=""), h200)
    assert any("lib.custom" in n for n in unknown.notes)


def test_a_fused_bound_never_lies_above_the_unfused_one_of_a_real_model(h200):
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.LayerNorm(1024), nn.Linear(1024, 256)).half()
    x = torch.zeros(64, 256, dtype=torch.float16)
    counted = count(model, Inputs(args=(x,)))
    found = build(counted, h200, external(model, Inputs(args=(x,)), torch.zeros(64, 256, dtype=torch.float16), counted))
    assert found.bytes_fused == 2 * (sum(p.numel() for p in model.parameters()) + 2 * 64 * 256)
    assert 0 < found.fused_ms < found.unfused_ms


def test_each_buffer_counts_once_and_a_table_by_the_rows_it_gives():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1000, 16)
            self.tied = nn.Linear(16, 16, bias=False)
            self.again = nn.Linear(16, 16, bias=False)
            self.again.weight = self.tied.weight
            self.register_buffer("scale", torch.ones(16))
            self.register_buffer("positions", torch.arange(1000))

        def forward(self, ids):
            return self.again(self.tied(self.table(ids))) * self.scale

    model, ids = Model(), torch.zeros(2, 5, dtype=torch.int64)
    inputs = Inputs(args=(ids,))
    found = external(model, inputs, model(ids), count(model, inputs))
    assert found.by_dtype == {"float32": 4 * (10 * 16 + 256 + 16 + 2 * 5 * 16), "int64": 8 * 10}
    assert found.notes == ()


def test_a_table_that_is_also_a_product_is_read_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, ids = Tied(), torch.zeros(1, 2, dtype=torch.int64)
    found = external(model, Inputs(args=(ids,)), None, count(model, Inputs(args=(ids,))))
    assert found.by_dtype["float32"] == 4 * 800
    assert found.notes == ("outputs are not counted",)
