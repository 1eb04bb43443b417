"""Where the wall time went, on timelines written by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.core.result import Ceilings, OpRecord
from gpuopt.profiling.attribute import attribute
from gpuopt.profiling.count import summarize
from gpuopt.profiling.passes import bound_class
from gpuopt.profiling.waterfall import PARTS, _passes, build


def parts(found):
    return {p.name: p.ms for p in found.parts}


def gemm(flops, *, moved=1.0, dtype="float16", time_ns=1000.0, op="aten.mm"):
    return OpRecord(op=op, module="", dtype=dtype, flops=flops, bytes=moved, time_ns=time_ns)


COMPUTE = gemm(1e12, moved=1e6)
MEMORY = gemm(0.0, moved=1e9, op="aten.add")
UNKNOWN = gemm(None, op="lib.custom")


def only(**values):
    """All parts, 0 but for those named (`launch_gaps=1.0`; the avoidable ones without that word)."""
    names = {
        "unfused": "avoidable: unfused pointwise",
        "layout": "avoidable: layout",
        "casts": "avoidable: casts",
        "tensor": "tensor-core compute",
    }
    names |= {
        "other": "other compute",
        "memory": "memory-bound",
        "launch": "launch gaps",
        "sync": "synchronisation",
        "python": "python and framework",
    }
    names |= {"pinned": "host-to-device (pinned)", "pageable": "host-to-device (pageable)", "calls": "copy calls", "d2h": "device-to-host"}
    return pytest.approx({**dict.fromkeys(PARTS, 0.0), **{names.get(n, n): v for n, v in values.items()}})


def detail(found, name):
    return next(p.detail for p in found.parts if p.name == name)


def test_a_busy_gpu_has_no_gaps_and_nothing_unaccounted(timeline, h200):
    timeline.step(0, 1000)
    for at in range(9):
        timeline.kernel("gemm", launch=1 + at, start=50 + 100 * at, dur=100)
    found = build(timeline.trace(), 0.9, h200, [COMPUTE])
    assert parts(found) == only(tensor=0.9)
    assert found.unaccounted_ms == pytest.approx(0.0, abs=1e-12)


def test_gaps_come_from_the_untraced_wall_not_from_the_stretched_trace(timeline, h200):
    timeline.step(0, 5000)  # tracing made the host three times slower
    for at in range(10):
        timeline.op("aten::mm", 400 * at, 400)
        timeline.kernel("small", launch=1 + 400 * at, start=3 + 400 * at, dur=50)
    timeline.sync("cudaDeviceSynchronize", 3640, 1360)
    found = build(timeline.trace(), 1.5, h200, [MEMORY])
    assert parts(found) == only(memory=0.5, launch=1.0)
    assert "10 kernels" in detail(found, "launch gaps")


def test_wall_time_that_the_trace_never_saw_is_unaccounted(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("gemm", launch=98, start=100, dur=900)
    found = build(timeline.trace(), 2.0, h200, [COMPUTE])
    assert parts(found)["tensor-core compute"] == pytest.approx(0.9)
    assert found.unaccounted_ms == parts(found)["unaccounted"] == pytest.approx(1.1)


def test_overlapping_streams_count_once_and_what_is_hidden_is_told(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("a", launch=1, start=100, dur=400, stream=7)
    timeline.kernel("b", launch=2, start=200, dur=400, stream=8)
    timeline.copy("h2d", "Pinned", launch=3, call=2, start=300, dur=500, size=1 << 20, stream=9)
    found = build(timeline.trace(), 0.7, h200, [COMPUTE])
    assert parts(found) == only(tensor=0.5, pinned=0.2)
    assert "hidden under other work: 0.3 of 0.5 ms" in detail(found, "host-to-device (pinned)")


def test_classes_share_the_busy_time_by_their_durations(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("a", launch=1, start=0, dur=1000)
    rows = [gemm(1e12, moved=1e6, time_ns=600.0), gemm(0.0, moved=1e9, time_ns=300.0), gemm(None, time_ns=100.0)]
    found = build(timeline.trace(), 1.0, h200, rows)
    assert parts(found) == only(tensor=0.6, memory=0.3, other=0.1)
    assert "10% of the kernel time has no known count" in detail(found, "tensor-core compute")


def test_a_pageable_copy_costs_its_transfer_and_apart_from_it_the_call_that_blocks(timeline, h200):
    timeline.step(0, 1000)
    timeline.copy("h2d", "Pageable", launch=0, call=600, start=500, dur=100, size=4 << 20)
    timeline.kernel("gemm", launch=610, start=620, dur=200)
    timeline.copy("d2h", "Pageable", launch=640, call=260, start=820, dur=30, size=1 << 20)
    timeline.sync("cudaDeviceSynchronize", 900, 100)
    found = build(timeline.trace(), 0.9, h200, [COMPUTE])
    assert parts(found) == only(
        pageable=0.1, calls=0.5 + 0.05, tensor=0.2, d2h=0.03, launch=0.01, python=0.01
    )  # 10 us to the launch, 10 from it to the kernel
    assert "4.194 MB" in detail(found, "host-to-device (pageable)")


def test_graph_kernels_are_classed_by_their_names_and_the_gaps_between_them_are_nobodys(timeline, h200):
    timeline.step(0, 400)
    for at, name in enumerate(("nvjet_hsh_128x256_64x4_1x2_h_bz_TNT", "my_secret", "triton_red_fused_native_layer_norm_1")):
        timeline.kernel(name, launch=2, start=10 + 110 * at, dur=100, graph=9)
    trace = timeline.trace()
    found = build(trace, 0.34, h200, attribute(trace, summarize((), method="")))
    third = 0.302 / 3
    assert parts(found) == only(tensor=third, other=third, memory=third, idle=0.03, launch=0.008)
    assert "placed by kernel name" in detail(found, "tensor-core compute")


def test_kernels_slower_in_the_trace_than_the_wall_are_scaled_and_said_to_be(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("gemm", launch=1, start=0, dur=1000)
    found = build(timeline.trace(), 0.8, h200, [COMPUTE])
    assert parts(found)["tensor-core compute"] == pytest.approx(0.8)
    assert "scaled by 0.800" in found.method


def test_a_wait_in_the_call_costs_the_idle_time_after_it_less_a_usual_gap(timeline, h200):
    timeline.step(0, 2000)
    for at in range(4):  # a queue: launched early, run back to back with 2 us between
        timeline.kernel("gemm", launch=1 + 4 * at, start=20 + 102 * at, dur=100)
    timeline.sync("cudaStreamSynchronize", 30, 410)  # the device falls idle at 426, the host wakes at 440
    for at in range(4):
        timeline.kernel("gemm", launch=520 + 4 * at, start=526 + 102 * at, dur=100)
    timeline.sync("cudaDeviceSynchronize", 700, 250)
    found = build(timeline.trace(), 0.93, h200, [COMPUTE])
    shown = parts(found)
    assert shown["synchronisation"] == pytest.approx(0.098)  # 100 less the usual 2
    assert shown["idle"] == pytest.approx(0.012)
    assert shown["launch gaps"] + shown["python and framework"] == pytest.approx(0.02)
    assert detail(found, "synchronisation") == "1 waits a call"
    assert math.isclose(sum(shown.values()), 0.93)


def test_python_is_what_the_host_does_outside_any_op(timeline, h200):
    timeline.step(0, 1000)
    for at in range(5):
        timeline.op("aten::mm", 200 * at + 100, 60)
        timeline.kernel("gemm", launch=200 * at + 150, start=200 * at + 154, dur=46)
    timeline.sync("cudaDeviceSynchronize", 965, 35)
    found = build(timeline.trace(), 1.0, h200, [COMPUTE])
    # Of each 200: 46 busy, 54 from entering the op to the kernel, the rest before it.
    assert parts(found) == only(tensor=0.23, launch=0.27, python=0.5)


def test_regions_of_compiled_code_are_not_ops(timeline, h200):
    timeline.step(0, 300)
    timeline.op("Torch-Compiled Region: 0/0", 0, 300)
    timeline.kernel("triton_poi_fused_add_0", launch=98, start=100, dur=100)
    timeline.sync("cudaDeviceSynchronize", 110, 190)
    found = build(timeline.trace(), 0.2, h200, [])
    assert parts(found) == only(memory=0.1, python=0.098, launch=0.002)


def test_a_host_that_runs_ahead_makes_the_head_of_a_traced_call_nobodys_fault(timeline, h200):
    """The trace starts with an empty queue; a timed loop does not."""
    timeline.step(0, 1500)
    timeline.op("aten::mm", 0, 200)
    for at in range(10):
        timeline.kernel("gemm", launch=100 + 10 * at, start=210 + 103 * at, dur=100)
    timeline.sync("cudaDeviceSynchronize", 220, 1280)
    found = build(timeline.trace(), 1.05, h200, [COMPUTE])
    assert parts(found) == only(tensor=1.02, idle=0.03)
    assert "runs ahead" in found.method and "scaled by 1.020" in found.method
    # Clocks explain a few percent; more is nobody's to explain, and stays in the open.
    found = build(timeline.trace(), 1.2, h200, [COMPUTE])
    assert parts(found) == only(tensor=1.0, idle=0.03, unaccounted=0.17)
    assert "scaled" not in found.method


def test_what_tracing_cost_is_said(timeline, h200):
    timeline.step(0, 1500)
    timeline.kernel("gemm", launch=10, start=20, dur=900)
    assert "a traced call took 1.5 ms" in build(timeline.trace(), 1.0, h200, [COMPUTE]).method
    assert "a traced call" not in build(timeline.trace(), 1.5, h200, [COMPUTE], is_traced=True).method


def test_passes_that_change_no_value_are_avoidable(timeline, h200):
    timeline.step(0, 1000)
    timeline.op("aten::copy_", 0, 5, [[8, 8], [8, 8]])
    timeline.kernel("void cudnn::ops::nchwToNhwcKernel<__half>", launch=1, start=10, dur=100)
    timeline.kernel("void at::native::vectorized_elementwise_kernel<4, bfloat16_copy_kernel_cuda>", launch=6, start=110, dur=50)
    timeline.kernel("gemm", launch=7, start=160, dur=300)
    found = build(timeline.trace(), 0.45, h200, [COMPUTE])
    assert parts(found) == only(layout=0.1, casts=0.05, tensor=0.3)
    assert detail(found, "avoidable: layout") == "1 pass a call"


def test_a_copy_is_a_cast_a_layout_change_or_a_write_by_the_op_that_made_it(timeline, h200):
    timeline.step(0, 1000)
    elementwise = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>"
    timeline.op("aten::to", 0, 10)
    timeline.op("aten::copy_", 1, 5, [[8, 8], [8, 8]], dtypes=["float", "c10::Half"])
    timeline.kernel(elementwise, launch=2, start=20, dur=10)
    timeline.op("aten::contiguous", 12, 10)
    timeline.op("aten::copy_", 13, 5, [[8, 8], [8, 8]])
    timeline.kernel(elementwise, launch=14, start=30, dur=20)
    timeline.op("aten::copy_", 25, 5, [[8, 8], [8, 8]])  # into a cache
    timeline.kernel(elementwise, launch=26, start=50, dur=40)
    assert parts(build(timeline.trace(), 0.07, h200, [])) == only(casts=0.01, layout=0.02, memory=0.04)


def test_of_a_run_of_passes_over_the_same_elements_one_stays(timeline, h200):
    def add(at, dur, shape, name="vectorized_elementwise_kernel<CUDAFunctor_add>"):
        timeline.op("aten::add", at, 5, [shape, shape])
        timeline.kernel(name, launch=at + 1, start=1000 + at * 10, dur=dur)

    timeline.step(0, 5000)
    add(0, 10, [64, 64])
    add(10, 30, [64, 64])  # the longest stays
    add(20, 20, [64, 64])
    add(30, 7, [8, 8])  # over other elements: a run of its own, and lone
    timeline.kernel("gemm", launch=41, start=1400, dur=100)
    add(60, 11, [64, 64])  # beside a norm, which could do it
    timeline.op("aten::native_layer_norm", 70, 5, [[64, 64], [64], [64]])
    timeline.kernel("vectorized_layer_norm_kernel", launch=71, start=1700, dur=40)
    timeline.kernel("gemm", launch=81, start=1800, dur=100)
    add(90, 13, [64, 64])  # between two products: stays
    timeline.kernel("gemm", launch=101, start=2000, dur=100)
    found = build(timeline.trace(), 0.431, h200, [COMPUTE])
    assert parts(found) == only(unfused=0.010 + 0.020 + 0.011, memory=0.030 + 0.007 + 0.040 + 0.013, tensor=0.3)


def test_what_a_compiler_fused_is_not_called_unfused(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("triton_poi_fused_add_0", launch=1, start=10, dur=100)
    timeline.kernel("triton_poi_fused_mul_1", launch=2, start=110, dur=100)
    assert parts(build(timeline.trace(), 0.2, h200, [])) == only(memory=0.2)


def test_a_kernel_that_serves_two_ops_is_divided_by_their_times(timeline, h200):
    timeline.step(0, 1000)
    timeline.kernel("nvjet_hsh_x", launch=1, start=0, dur=400)
    timeline.kernel("nvjet_hsh_x", launch=2, start=400, dur=100)
    rows = [
        OpRecord(op="aten.mm", module="a", dtype="float16", flops=1e12, bytes=1e6, time_ns=400e3, kernels=("nvjet_hsh_x",)),
        OpRecord(op="aten.mm", module="b", dtype="float16", flops=1e6, bytes=1e6, time_ns=100e3, kernels=("nvjet_hsh_x",)),
    ]
    assert parts(build(timeline.trace(), 0.5, h200, rows)) == only(tensor=0.4, memory=0.1)


def test_times_are_means_over_the_steps_and_warm_up_is_left_out(timeline, h200):
    timeline.kernel("warm", launch=-500, start=-400, dur=300)
    for start, dur in ((0, 100), (1000, 300)):
        timeline.step(start, 500)
        timeline.kernel("gemm", launch=start + 1, start=start + 50, dur=dur)
    found = build(timeline.trace(), 0.2, h200, [COMPUTE])
    assert parts(found)["tensor-core compute"] == pytest.approx(0.2)
    assert "1 device events lay outside" in found.method


def test_on_a_cpu_the_profilers_time_is_taken_from_the_framework_first(timeline):
    timeline.step(0, 1000)
    timeline.op("aten::mm", 100, 400, [[2, 4], [4, 8]])
    found = build(timeline.trace("cpu"), 0.5, Ceilings(), [gemm(128.0, time_ns=400e3)])
    assert parts(found) == only(other=0.4, python=0.1)
    assert "tracing took 0.5 ms" in found.method


def test_on_a_cpu_ops_longer_than_the_wall_are_scaled_and_said_to_be(timeline):
    timeline.step(0, 1000)
    timeline.op("aten::mm", 100, 800, [[2, 4], [4, 8]])
    found = build(timeline.trace("cpu"), 0.4, Ceilings(), [gemm(128.0, time_ns=800e3)])
    assert parts(found) == only(other=0.4)
    assert "scaled by 0.500" in found.method


def test_views_and_dispatch_are_the_frameworks_time(timeline):
    timeline.step(0, 1000)
    timeline.op("aten::linear", 0, 1000)
    rows = [gemm(0.0, moved=0.0, time_ns=400.0, op="aten.linear"), gemm(0.0, moved=1e6, time_ns=600.0)]
    shown = parts(build(timeline.trace("cpu"), 1.0, Ceilings(), rows))
    assert (shown["python and framework"], shown["memory-bound"]) == pytest.approx((0.4, 0.6))


@pytest.mark.parametrize(
    "record, expected",
    [
        (COMPUTE, "compute"),
        (MEMORY, "memory"),
        (UNKNOWN, "unknown"),
        (gemm(1e6, moved=1e6), "memory"),  # intensity 1: below any ridge
        (gemm(1e12, dtype="int32"), "unknown"),  # no ceiling known
        (gemm(0.0, moved=None), "memory"),
        (gemm(0.0, moved=0.0), "overhead"),
    ],
)
def test_a_record_is_classed_by_the_larger_of_its_floors(record, expected, h200):
    assert bound_class(record, h200) == expected


def test_on_a_cpu_casts_copies_and_repeated_passes_are_told_apart(timeline, h200):
    timeline.step(0, 100)
    timeline.op("aten::relu", 0, 10, [[64]])
    timeline.op("aten::add", 10, 30, [[64], [64]])
    rows = [
        gemm(0.0, moved=1e6, time_ns=10e3, op="aten.relu"),
        gemm(0.0, moved=1e6, time_ns=30e3, op="aten.add"),
        gemm(0.0, moved=1e6, time_ns=20e3, op="aten._to_copy"),
        gemm(0.0, moved=1e6, time_ns=40e3, op="aten.clone"),
    ]
    timeline.op("aten::_to_copy", 40, 20, [[64]])
    timeline.op("aten::clone", 60, 40, [[64]])
    found = build(timeline.trace("cpu"), 0.1, h200, rows)
    assert parts(found) == only(unfused=0.010, memory=0.030, casts=0.02, layout=0.04)


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
    syncs=st.lists(span, max_size=4),
    steps=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    wall_us=st.floats(0.5, 5000),
    times=st.lists(st.tuples(st.sampled_from([COMPUTE, MEMORY, UNKNOWN]), st.integers(0, 1000)), max_size=5),
)
def test_parts_are_never_negative_and_always_sum_to_the_wall(new_timeline, h200, kernels, copies, syncs, steps, wall_us, times):
    line = new_timeline()
    start = 0
    for dur in steps:
        line.step(start, dur)
        line.op("aten::mm", start, dur / 2)
        start += dur + 1
    for at, dur, stream in kernels:
        line.kernel("elementwise" if dur % 2 else "k", launch=at, start=at + 5, dur=dur, stream=stream, graph=dur % 3)
    for at, dur, _ in syncs:
        line.sync("cudaStreamSynchronize", at, dur)
    for kind, memory, (at, dur, stream), call in copies:
        line.copy(kind, memory, launch=at, call=call, start=at + 3, dur=dur, size=1024, stream=stream)
    rows = [gemm(r.flops, moved=r.bytes, op=r.op, time_ns=float(t)) for r, t in times]
    found = build(line.trace(), wall_us / 1e3, h200, rows)
    assert all(p.ms >= 0 for p in found.parts)
    assert [p.name for p in found.parts] == list(PARTS)
    assert math.isclose(math.fsum(p.ms for p in found.parts), found.wall_ms, rel_tol=1e-12)
    assert math.isclose(found.wall_ms, wall_us / 1e3, rel_tol=1e-12)
    assert found.unaccounted_ms == found.parts[-1].ms


@pytest.mark.parametrize(
    ("count", "text"), [(1.0, "1 pass a call"), (1.0000001, "1 pass a call"), (0.9999, "1 pass a call"), (2.5, "2.5 passes a call")]
)
def test_one_pass_is_not_called_passes(count, text):
    assert _passes(count) == text


def test_a_trace_of_one_call_says_so(timeline, h200):
    timeline.step(0, 100)
    timeline.kernel("k", launch=1, start=10, dur=50)
    assert "a trace of 1 call " in build(timeline.trace(), 0.001, h200, [COMPUTE]).method
