"""Kineto's JSON -> Trace."""

from __future__ import annotations

import pytest

from gpuopt.profiling.events import copy_kind, from_chrome, runtime_kind


def test_a_kernel_belongs_to_the_innermost_op_running_when_it_was_launched(timeline):
    timeline.step(0, 100)
    timeline.module("", "Net", 1, 80)
    timeline.module("fc", "Linear", 2, 50)
    timeline.op("aten::linear", 3, 40, [[2, 4], [8, 4], [8]])
    timeline.op("aten::t", 4, 2, [[8, 4]])
    timeline.op("aten::addmm", 8, 20, [[8], [2, 4], [4, 8]])
    timeline.kernel("gemm", launch=12, start=60, dur=10)
    trace = timeline.trace()
    kernel = trace.kernels[0]
    assert [o.name for o in trace.chain(kernel.op)] == ["aten::addmm", "aten::linear"]
    assert (trace.ops[kernel.op].module, trace.ops[kernel.op].module_class) == ("fc", "Linear")
    assert trace.ops[kernel.op].shapes == ((8,), (2, 4), (4, 8))
    assert kernel.step == 0
    linear = trace.ops[0]
    assert (linear.self_ns, linear.num_children) == (40_000 - 22_000, 2)


def test_a_kernel_whose_launch_was_not_recorded_is_joined_by_its_external_id(timeline):
    timeline.step(0, 100)
    external = timeline.op("aten::mm", 3, 10, [[2, 4], [4, 8]])
    timeline.kernel("gemm", launch=0, start=40, dur=5, external=external, lost_launch=True)
    trace = timeline.trace()
    assert trace.ops[trace.kernels[0].op].name == "aten::mm"


def test_a_launch_between_two_ops_belongs_to_the_op_around_them(timeline):
    timeline.step(0, 100)
    timeline.op("aten::outer", 1, 50)
    timeline.op("aten::first", 2, 5)
    timeline.kernel("k", launch=10, start=20, dur=1)
    timeline.op("aten::second", 15, 5)
    trace = timeline.trace()
    assert trace.ops[trace.kernels[0].op].name == "aten::outer"


def test_threads_do_not_mix(timeline):
    timeline.step(0, 100)
    timeline.op("aten::main", 1, 50)
    timeline._add("cpu_op", "aten::worker", 5, 10, tid=2)
    trace = timeline.trace()
    worker = next(o for o in trace.ops if o.name == "aten::worker")
    assert worker.parent is None
    assert next(o for o in trace.ops if o.name == "aten::main").self_ns == 50_000


def test_events_outside_the_steps_are_counted_as_lost_and_used_by_nobody(timeline):
    timeline.step(100, 50)
    timeline.kernel("warm-up", launch=10, start=20, dur=5)
    timeline.kernel("work", launch=110, start=120, dur=5)
    trace = timeline.trace()
    assert [(k.name, k.step) for k in trace.kernels] == [("warm-up", None), ("work", 0)]
    assert trace.num_lost == 1


def test_graph_replays_keep_their_graph_id(timeline):
    timeline.step(0, 100)
    timeline.kernel("gemm", launch=5, start=10, dur=5, graph=42)
    assert timeline.trace().kernels[0].graph_id == 42
    del timeline.events[-1]["args"]["graph id"]
    assert timeline.trace().kernels[0].graph_id == timeline.correlation


def test_timestamps_of_a_machine_long_up_keep_their_nanoseconds():
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::a", "pid": 1, "tid": 1, "ts": 4404853936688.239, "dur": 10.001, "args": {}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::b", "pid": 1, "tid": 1, "ts": 4404853936698.740, "dur": 0.5, "args": {}},
    ]
    first, second = from_chrome({"traceEvents": events}, device="cpu").ops
    assert abs(second.start_ns - first.start_ns - 10_501) <= 1
    assert second.parent is None


def test_a_child_that_rounding_pushed_past_its_parent_is_still_a_child():
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::parent", "pid": 1, "tid": 1, "ts": 0.0, "dur": 10.0, "args": {}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::child", "pid": 1, "tid": 1, "ts": 5.0, "dur": 5.001, "args": {}},
    ]
    parent, child = from_chrome({"traceEvents": events}, device="cpu").ops
    assert (child.parent, parent.self_ns, child.dur_ns) == (parent.index, 5000, 5000)


def test_how_a_kernel_was_launched_is_kept(timeline):
    timeline.step(0, 100)
    shape = {"grid": [132, 1, 1], "block": [384, 1, 1], "registers per thread": 168, "shared memory": 231424, "blocks per SM": 1.0}
    timeline.kernel("nvjet", launch=5, start=10, dur=5, **shape)
    (kernel,) = timeline.trace().kernels
    assert (kernel.grid, kernel.block, kernel.registers, kernel.shared_bytes, kernel.blocks_per_sm) == (
        (132, 1, 1),
        (384, 1, 1),
        168,
        231424,
        1.0,
    )


@pytest.mark.parametrize(
    "odd", [{}, {"grid": "132", "block": [1, 2], "blocks per SM": "inf"}, {"grid": [None, 1, 1], "blocks per SM": -99}]
)
def test_a_launch_that_kineto_did_not_describe_is_unknown(timeline, odd):
    timeline.step(0, 100)
    timeline.kernel("k", launch=5, start=10, dur=5, **odd)
    (kernel,) = timeline.trace().kernels
    assert (kernel.grid, kernel.block, kernel.registers, kernel.blocks_per_sm) == (None, None, None, None)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Memcpy HtoD (Pageable -> Device)", ("h2d", "pageable")),
        ("Memcpy HtoD (Pinned -> Device)", ("h2d", "pinned")),
        ("Memcpy DtoH (Device -> Pageable)", ("d2h", "pageable")),
        ("Memcpy DtoD (Device -> Device)", ("d2d", "")),
        ("Memcpy PtoP (Device -> Device)", ("p2p", "")),
        ("something new", ("d2d", "")),
    ],
)
def test_copies_are_told_apart_by_their_names(name, expected):
    assert copy_kind(name) == expected


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cudaLaunchKernel", "launch"),
        ("cudaLaunchKernelExC", "launch"),
        ("cuLaunchKernelEx", "launch"),
        ("cudaGraphLaunch", "graph"),
        ("cudaMemcpyAsync", "copy"),
        ("cudaStreamSynchronize", "sync"),
        ("cudaDeviceSynchronize", "sync"),
        ("cudaMalloc", "alloc"),
        ("cudaHostAlloc", "alloc"),
        ("cudaFuncGetAttributes", "other"),
    ],
)
def test_runtime_calls_are_told_apart_by_their_names(name, kind):
    assert runtime_kind(name) == kind


def test_an_empty_trace_is_an_empty_value():
    trace = from_chrome({}, device="cpu")
    assert (trace.ops, trace.kernels, trace.steps, trace.on_device) == ((), (), (), False)


# As torch 2.13 writes them, on a thread that also makes the calls.
FETCH = {
    "ph": "X", "cat": "user_annotation", "name": "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", "pid": 16764, "tid": 16764,
    "ts": 4420502530717.807, "dur": 2889.491, "args": {"External id": 5, "Record function id": 0, "Ev Idx": 4},
}  # fmt: skip
COLLATE = {
    "ph": "X", "cat": "cpu_op", "name": "aten::stack", "pid": 16764, "tid": 16764, "ts": 4420502531717.807, "dur": 100.0,
    "args": {"External id": 6, "Input Dims": [[[4], [4]], []], "Input type": ["TensorList", "Scalar"]},
}  # fmt: skip
CALL = {
    "ph": "X", "cat": "user_annotation", "name": "gpuopt::step", "pid": 16764, "tid": 16764, "ts": 4420502533641.238, "dur": 2632.429, "args": {"External id": 17},
}  # fmt: skip


@pytest.mark.parametrize("category", ["user_annotation", "cpu_op"])
def test_batches_asked_of_a_data_loader_are_kept_apart_from_ops(category):
    trace = from_chrome({"traceEvents": [CALL, {**FETCH, "cat": category}, COLLATE]}, device="cpu")
    (fetch,) = trace.fetches
    assert (fetch.name, fetch.start_ns, fetch.dur_ns, fetch.thread) == (FETCH["name"], 0, 2_889_491, "16764/16764")
    # Its time is Python's, not an op's; ops inside it are ops like any other.
    assert [(op.name, op.parent) for op in trace.ops] == [("aten::stack", None)]


def test_other_annotations_are_nothing_to_anybody():
    trace = from_chrome({"traceEvents": [CALL, {**FETCH, "name": "my loop"}]}, device="cpu")
    assert trace.fetches == () and trace.ops == ()


def test_the_torch_installed_here_marks_its_data_loader_so(tmp_path):
    """Recorded, not written down: a new name would silence the rule."""
    import json

    import torch
    from torch.utils.data import DataLoader, TensorDataset

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        batches = list(DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = from_chrome(json.loads((tmp_path / "trace.json").read_text()), device="cpu")
    assert len(trace.fetches) == len(batches) + 1, "the last one finds the end"
    assert {fetch.name for fetch in trace.fetches} == {FETCH["name"]}
