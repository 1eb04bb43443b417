"""Impossible figures are refused; possible ones above a ceiling name their reason."""

from __future__ import annotations

import pytest

from gpuopt.core.result import Ceiling, Ceilings, Count, OpRecord
from gpuopt.profiling.roofline import ImpossibleFigure, points, whole

MB = 1_000_000


def record(flops=None, moved=None, time_ns=1000.0, dtype="float16", calls=1, op="aten.mm"):
    return OpRecord(op=op, module="fc", dtype=dtype, count=calls, time_ns=time_ns, flops=flops, bytes=moved, shapes="8x8")


def a_count(by_dtype, records=(), unknown=()):
    return Count(
        records=tuple(records), flops=sum(by_dtype.values()), flops_by_dtype=by_dtype, bytes=0.0, coverage=1.0, unknown_ops=unknown
    )


def test_the_floor_is_the_larger_of_compute_and_memory(h200):
    compute, memory = points([record(764e9, 1.0 * MB, 2e6), record(1e6, 4261 * MB, 2e6)], h200, cache_bytes=50 * MB)
    assert (compute.bound, compute.floor_ns, compute.pct_of_ceiling, compute.ceiling) == (
        "compute",
        pytest.approx(1e6),
        pytest.approx(50.0),
        "fp16 measured",
    )
    assert (memory.bound, memory.floor_ns, memory.pct_of_ceiling, memory.ceiling) == (
        "memory",
        pytest.approx(1e6),
        pytest.approx(50.0),
        "memory measured",
    )
    assert compute.intensity == pytest.approx(764e3)


def test_spec_ceilings_can_be_asked_for_and_stand_in_where_nothing_was_measured(h200):
    (spec,) = points([record(989e9, 1.0, 2e6)], h200, cache_bytes=None, kind="spec")
    assert (spec.pct_of_ceiling, spec.ceiling) == (pytest.approx(50.0), "fp16 spec")
    (fallback,) = points([record(1979e9, 1.0, 2e6, dtype="int8")], h200, cache_bytes=None)
    assert fallback.ceiling == "int8 spec"


def test_an_op_without_a_formula_has_no_floor_and_no_percent(h200):
    (point,) = points([record(None, 1e9)], h200, cache_bytes=None)
    assert (point.bound, point.floor_ns, point.pct_of_ceiling) == ("unknown", None, None)


def test_a_dtype_without_a_ceiling_is_unknown_not_free(h200):
    (point,) = points([record(1e9, 1.0, dtype="int32")], h200, cache_bytes=None)
    assert (point.bound, point.pct_of_ceiling) == ("unknown", None)


def test_flops_above_the_data_sheet_are_refused_with_count_and_peak(h200):
    with pytest.raises(
        ImpossibleFigure,
        match=r"aten\.mm in fc .* 1000 TFLOP/s is 101% of the spec float16 peak of 989 TFLOP/s; counted 1e\+12 FLOPs in 1e\+06 ns",
    ):
        points([record(1000e9, 1.0, 1e6)], h200, cache_bytes=50 * MB)


def test_flops_above_the_measured_peak_are_noted_within_the_slack_and_refused_beyond(h200):
    (point,) = points([record(764e9 * 1.04, 1.0, 1e6)], h200, cache_bytes=None)
    assert "that clocks allow" in point.note
    assert points([record(764e9 * 1.01, 1.0, 1e6)], h200, cache_bytes=None)[0].note == ""
    with pytest.raises(ImpossibleFigure, match="measured float16 peak"):
        points([record(764e9 * 1.11, 1.0, 1e6)], h200, cache_bytes=50 * MB)
    assert "that clocks allow" in points([record(764e9 * 1.11, 1.0, 1e6)], h200, cache_bytes=None, slack=0.12)[0].note


def test_a_working_set_that_fits_the_cache_may_beat_the_memory(h200):
    (point,) = points([record(0.0, 40 * MB, 2e3, op="aten.add_")], h200, cache_bytes=50 * MB)
    assert point.pct_of_ceiling > 100
    assert point.note == "working set of 40 MB a call fits the cache of 50 MB"


def test_many_small_calls_are_judged_by_the_call_not_by_their_sum(h200):
    (point,) = points([record(0.0, 400 * MB, 40e3, calls=100)], h200, cache_bytes=50 * MB)
    assert "fits the cache" in point.note


def test_a_working_set_partly_in_the_cache_may_be_faster_by_that_part_only(h200):
    ns = 60 * MB / 4261e9 * 1e9  # time for 60 MB of 110
    (point,) = points([record(0.0, 110 * MB, ns)], h200, cache_bytes=50 * MB)
    assert "part of its 110 MB" in point.note
    with pytest.raises(ImpossibleFigure, match="bandwidth"):
        points([record(0.0, 110 * MB, ns / 2)], h200, cache_bytes=50 * MB)


def test_bandwidth_above_the_ceiling_without_a_cache_to_explain_it_is_refused(h200):
    with pytest.raises(ImpossibleFigure, match=r"% of the spec memory bandwidth of 4800 GB/s"):
        points([record(0.0, 10_000 * MB, 1e6)], h200, cache_bytes=50 * MB)


def test_an_unknown_cache_is_named_and_refuses_nothing(h200):
    (point,) = points([record(0.0, 10_000 * MB, 1e6)], h200, cache_bytes=None)
    assert "unknown" in point.note


def test_copies_over_the_link_are_judged_by_the_link(h200):
    (point,) = points([record(0.0, 55.5 * MB, 2e6, op="memcpy h2d (pinned)")], h200, cache_bytes=50 * MB)
    assert (point.ceiling, point.pct_of_ceiling) == ("h2d measured", pytest.approx(50.0))
    with pytest.raises(ImpossibleFigure, match="h2d"):
        points([record(0.0, 1000 * MB, 1e6, op="memcpy h2d (pinned)")], h200, cache_bytes=50 * MB)


def test_a_record_without_a_time_is_a_point_without_a_percent(h200):
    (point,) = points([record(1e9, 1e6, None)], h200, cache_bytes=None)
    assert (point.pct_of_ceiling, point.floor_ns) == (None, pytest.approx(1e9 / 764e12 * 1e9))


def test_the_mlperf_bert_trap_is_refused(h200):
    """MLPerf drops padding; its samples times the FLOPs of 384 padded tokens would be 2,258 TOP/s, 114% of an H200's int8 peak."""
    per_sample, samples_per_s = 246.4e9, 9164
    with pytest.raises(
        ImpossibleFigure, match=r"2258 TFLOP/s is 114% of the spec peak \(int8 1979 TFLOP/s\); counted 2\.464e\+11 FLOPs .*padding"
    ):
        whole(a_count({"int8": per_sample}), 1 / samples_per_s, h200)
    useful = whole(a_count({"int8": 111e9}), 1 / samples_per_s, h200)  # real tokens alone: believable
    assert useful.pct_of_spec == pytest.approx(51.4, abs=0.1)


def test_mixed_precision_is_weighed_by_each_dtypes_peak(h200):
    found = whole(a_count({"float16": 764e9, "float32": 51e9}), 4e-3, h200)
    assert found.pct_of_measured == pytest.approx(50.0)
    assert found.tflops == pytest.approx((764e9 + 51e9) / 4e-3 / 1e12)
    assert found.pct_of_spec == pytest.approx(100 * (764 / 989 + 51 / 67) / 4)


def test_h200_figures_we_measured_are_believed(h200):
    bert = whole(a_count({"float16": 64 * 512 * 24 * (24 * 1024**2 + 4 * 512 * 1024)}), 46.6e-3, h200)
    assert bert.tflops == pytest.approx(460, abs=2)
    assert bert.pct_of_measured == pytest.approx(60, abs=1)


def test_a_missing_peak_makes_the_percent_missing_but_still_refuses_the_impossible(h200):
    found = whole(a_count({"float16": 1e9, "int32": 1e9}), 1.0, h200)
    assert (found.pct_of_measured, found.pct_of_spec) == (None, None)
    assert "int32" in found.ceiling_note
    with pytest.raises(ImpossibleFigure):
        whole(a_count({"float16": 1e15, "int32": 1e9}), 1.0, h200)


def test_above_the_measured_peak_of_a_device_without_a_data_sheet_is_refused():
    cpu = Ceilings(rows=(Ceiling(quantity="fp32", value=100e9, unit="FLOP/s", kind="measured", source="GEMM"),))
    assert "slack" in whole(a_count({"float32": 103e9}), 1.0, cpu).ceiling_note
    with pytest.raises(ImpossibleFigure, match="measure the ceilings again"):
        whole(a_count({"float32": 110e9}), 1.0, cpu)
    assert whole(a_count({"float32": 110e9}), 1.0, cpu, slack=0.2).pct_of_measured == pytest.approx(110)


def test_fusion_beating_the_unfused_floor_is_named(h200):
    rows = [record(0.0, 4261 * MB, None), record(0.0, 4261 * MB, None)]
    found = whole(a_count({"float16": 1e9}, rows), 1e-3, h200)
    assert found.pct_of_roofline == pytest.approx(200.0)
    assert "fusion" in found.ceiling_note


def test_no_flops_is_no_figure_and_no_time_is_an_error(h200):
    assert whole(a_count({}), 1.0, h200).tflops is None
    with pytest.raises(ImpossibleFigure, match="clock"):
        whole(a_count({"float16": 1.0}), 0.0, h200)


def winograd(factor, *kernels, shapes="64x256x14x14, 256x256x3x3"):
    """A 3x3 fp32 convolution `factor` times as fast as the peak of 51 TFLOP/s allows a direct one."""
    return OpRecord(
        op="aten.conv2d",
        module="conv",
        dtype="float32",
        count=1,
        time_ns=1e6,
        flops=factor * 51e9,
        bytes=1.0,
        kernels=kernels,
        shapes=shapes,
    )


def test_a_winograd_convolution_may_beat_the_peak_and_says_why_and_a_direct_one_may_not(h200):
    (point,) = points([winograd(1.3, "winograd_nonfused::winogradForwardData4x4", "sgemm_128x64_nn")], h200, cache_bytes=None)
    assert "Winograd" in point.note and point.pct_of_ceiling > 100
    with pytest.raises(ImpossibleFigure):
        points([winograd(1.4, "implicit_convolve_sgemm")], h200, cache_bytes=None)
    with pytest.raises(ImpossibleFigure):  # no tile saves more than three of four multiplications
        points([winograd(6.0, "winograd_fwd")], h200, cache_bytes=None)


def test_a_forward_of_3x3_convolutions_may_beat_the_fp32_peak_and_one_of_1x1_may_not(h200):
    rows = [winograd(1.0)]
    found = whole(a_count({"float32": 66e12}, [OpRecord(**{**_fields(rows[0]), "flops": 66e12})]), 1.0, h200)
    assert found.pct_of_measured > 100 and "Winograd" in found.ceiling_note
    flat = OpRecord(**{**_fields(rows[0]), "flops": 66e12, "shapes": "64x256x14x14, 256x256x1x1"})
    with pytest.raises(ImpossibleFigure):
        whole(a_count({"float32": 66e12}, [flat]), 1.0, h200)
    half = OpRecord(**{**_fields(rows[0]), "flops": 900e12, "dtype": "float16"})
    with pytest.raises(ImpossibleFigure):  # tensor cores multiply directly
        whole(a_count({"float16": 900e12}, [half]), 1.0, h200)


def _fields(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_where_one_peak_is_missing_winograd_prints_no_percent_of_a_part_and_is_named_once(h200):
    rows = [OpRecord(**{**_fields(winograd(1.0)), "flops": 66e12})]
    assert whole(a_count({"float32": 66e12, "int32": 1e9}, rows), 1.0, h200).pct_of_measured is None
    assert whole(a_count({"float32": 66e12}, rows), 1.0, h200).ceiling_note.count("Winograd") == 1
