"""Where the wall time went, on timelines written by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.core.result import Ceilings, OpRecord
from gpuopt.profiling.attribute import attribute
from gpuopt.profiling.count import summarize
from gpuopt.profiling.waterfall import PARTS, bound_class, build


def parts(found):
    return {p.name: p.ms for p in found.parts}


def gemm(flops, *, moved=1.0, dtype="float16", time_ns=1000.0, op="aten.mm"):
    return OpRecord(op=op, module="", dtype=dtype, flops=flops, bytes=moved, time_ns=time_ns)


COMPUTE = gemm(1e12, moved=1e6)
MEMORY = gemm(0.0, moved=1e9, op="aten.add")
UNKNOWN = gemm(None, op="lib.custom")


def test_a_busy_gpu_has_no_gaps_and_nothing_unaccounted(timeline, h200):
    timeline.step(0, 1000)
    for at in range(9):
        timeline.kernel("gemm", launch=1 + at, start=50 + 100 * at, dur=100)
    found = build(timeline.trace(), 0.9, h200, [COMPUTE])
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "compute-bound": 0.9})
    assert found.unaccounted_ms == pytest.approx(0.0, abs=1e-12)


def test_gaps_come_from_the_untraced_wall_not_from_the_stretched_trace(timeline, h200):
    timeline.step(0, 5000)  # tracing made the host three times slower
    for at in range(10):
        timeline.kernel("small", launch=1 + 400 * at, start=3 + 400 * at, dur=50)
    found = build(timeline.trace(), 1.5, h200, [MEMORY])
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "memory-bound": 0.5, "launch gaps": 1.0})
    assert "10 kernels" in next(p.detail for p in found.parts if p.name == "launch gaps")


def test_wall_time_that_the_trace_never_saw_is_unaccounted(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("gemm", launch=1, start=100, dur=900)
    found = build(timeline.trace(), 2.0, h200, [COMPUTE])
    assert parts(found)["launch gaps"] == pytest.approx(0.1)
    assert found.unaccounted_ms == parts(found)["unaccounted"] == pytest.approx(1.0)


def test_overlapping_streams_count_once(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("a", launch=1, start=100, dur=400, stream=7)
    timeline.kernel("b", launch=2, start=200, dur=400, stream=8)
    timeline.copy("h2d", "Pinned", launch=3, call=2, start=300, dur=500, size=1 << 20, stream=9)
    found = build(timeline.trace(), 0.8, h200, [COMPUTE])
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "compute-bound": 0.5, "host-to-device": 0.2, "launch gaps": 0.1})


def test_classes_share_the_busy_time_by_their_durations(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("a", launch=1, start=0, dur=1000)
    rows = [gemm(1e12, moved=1e6, time_ns=600.0), gemm(0.0, moved=1e9, time_ns=300.0), gemm(None, time_ns=100.0)]
    found = build(timeline.trace(), 1.0, h200, rows)
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "compute-bound": 0.6, "memory-bound": 0.3, "other": 0.1})


def test_a_pageable_copy_costs_the_whole_call_that_blocks(timeline, h200):
    timeline.step(0, 1000)
    timeline.copy("h2d", "Pageable", launch=0, call=600, start=500, dur=100, size=4 << 20)
    timeline.kernel("gemm", launch=610, start=620, dur=200)
    timeline.copy("d2h", "Pageable", launch=640, call=260, start=820, dur=30, size=1 << 20)
    found = build(timeline.trace(), 0.9, h200, [COMPUTE])
    shown = parts(found)
    assert shown["host-to-device"] == pytest.approx(0.6)
    assert shown["compute-bound"] == pytest.approx(0.2)
    assert shown["device-to-host"] == pytest.approx(0.03 + 0.05)
    assert shown["launch gaps"] == pytest.approx(0.02)
    assert "pageable" in next(p.detail for p in found.parts if p.name == "host-to-device")


def test_graph_kernels_are_busy_time_of_a_known_length_and_unknown_kind(timeline, h200):
    timeline.step(0, 400)
    for at in range(3):
        timeline.kernel("nvjet_hsh", launch=2, start=10 + 100 * at, dur=100, graph=9)
    trace = timeline.trace()
    found = build(trace, 0.31, h200, attribute(trace, summarize((), method="")))
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "other": 0.3, "launch gaps": 0.01})


def test_kernels_slower_in_the_trace_than_the_wall_are_scaled_and_said_to_be(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("gemm", launch=1, start=0, dur=1000)
    found = build(timeline.trace(), 0.8, h200, [COMPUTE])
    assert parts(found)["compute-bound"] == pytest.approx(0.8)
    assert "scaled by 0.800" in found.method


def test_times_are_means_over_the_steps_and_warm_up_is_left_out(timeline, h200):
    timeline.kernel("warm", launch=-500, start=-400, dur=300)
    for start, dur in ((0, 100), (1000, 300)):
        timeline.step(start, 500)
        timeline.kernel("gemm", launch=start + 1, start=start + 50, dur=dur)
    found = build(timeline.trace(), 0.2, h200, [COMPUTE])
    assert parts(found)["compute-bound"] == pytest.approx(0.2)
    assert "1 device events lay outside" in found.method


def test_on_a_cpu_the_profilers_time_is_taken_from_the_framework_first(timeline):
    timeline.step(0, 1000)
    timeline.op("aten::mm", 100, 400, [[2, 4], [4, 8]])
    found = build(timeline.trace("cpu"), 0.5, Ceilings(), [gemm(128.0, time_ns=400e3)])
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "other": 0.4, "launch gaps": 0.1})
    assert "tracing took 0.5 ms" in found.method


def test_on_a_cpu_ops_longer_than_the_wall_are_scaled_and_said_to_be(timeline):
    timeline.step(0, 1000)
    timeline.op("aten::mm", 100, 800, [[2, 4], [4, 8]])
    found = build(timeline.trace("cpu"), 0.4, Ceilings(), [gemm(128.0, time_ns=800e3)])
    assert parts(found) == pytest.approx({**dict.fromkeys(PARTS, 0.0), "other": 0.4})
    assert "scaled by 0.500" in found.method


def test_views_and_dispatch_are_the_frameworks_time(timeline):
    timeline.step(0, 1000)
    timeline.op("aten::linear", 0, 1000)
    rows = [gemm(0.0, moved=0.0, time_ns=400.0, op="aten.linear"), gemm(0.0, moved=1e6, time_ns=600.0)]
    shown = parts(build(timeline.trace("cpu"), 1.0, Ceilings(), rows))
    assert (shown["launch gaps"], shown["memory-bound"]) == pytest.approx((0.4, 0.6))


@pytest.mark.parametrize(
    "record, expected",
    [
        (COMPUTE, "compute-bound"),
        (MEMORY, "memory-bound"),
        (UNKNOWN, "other"),
        (gemm(1e6, moved=1e6), "memory-bound"),  # intensity 1: below any ridge
        (gemm(1e12, dtype="int32"), "other"),  # no ceiling known
        (gemm(0.0, moved=None), "memory-bound"),
        (gemm(0.0, moved=0.0), "overhead"),
    ],
)
def test_a_record_is_classed_by_the_larger_of_its_floors(record, expected, h200):
    assert bound_class(record, h200) == expected


def test_a_trace_without_steps_leaves_everything_unaccounted(timeline, h200):
    found = build(timeline.trace(), 1.0, h200, [])
    assert found.unaccounted_ms == 1.0


span = st.tuples(st.integers(0, 2000), st.integers(0, 600), st.integers(7, 9))


@settings(max_examples=200, deadline=None)
@given(
    kernels=st.lists(span, max_size=12),
    copies=st.lists(
        st.tuples(st.sampled_from(["h2d", "d2h", "d2d"]), st.sampled_from(["Pageable", "Pinned"]), span, st.integers(0, 500)), max_size=6
    ),
    steps=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    wall_us=st.floats(0.5, 5000),
    times=st.lists(st.tuples(st.sampled_from([COMPUTE, MEMORY, UNKNOWN]), st.integers(0, 1000)), max_size=5),
)
def test_parts_are_never_negative_and_always_sum_to_the_wall(new_timeline, h200, kernels, copies, steps, wall_us, times):
    line = new_timeline()
    start = 0
    for dur in steps:
        line.step(start, dur)
        line.op("aten::mm", start, dur / 2)
        start += dur + 1
    for at, dur, stream in kernels:
        line.kernel("k", launch=at, start=at + 5, dur=dur, stream=stream)
    for kind, memory, (at, dur, stream), call in copies:
        line.copy(kind, memory, launch=at, call=call, start=at + 3, dur=dur, size=1024, stream=stream)
    rows = [gemm(r.flops, moved=r.bytes, op=r.op, time_ns=float(t)) for r, t in times]
    found = build(line.trace(), wall_us / 1e3, h200, rows)
    assert all(p.ms >= 0 for p in found.parts)
    assert [p.name for p in found.parts] == list(PARTS)
    assert math.isclose(math.fsum(p.ms for p in found.parts), found.wall_ms, rel_tol=1e-12)
    assert math.isclose(found.wall_ms, wall_us / 1e3, rel_tol=1e-12)
    assert found.unaccounted_ms == found.parts[-1].ms
