"""What a trace's tables say: real ones of an H200, and ones written down by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuopt.core.trace import CpuOp, Kernel, Step, Trace
from gpuopt.pipeline import elsewhere, tables

DATA = Path(__file__).parent / "data"


def _kernel(
    name: str, start: int, dur: int, *, device: int = 0, stream: int = 7, op: int | None = None, graph: int | None = None
) -> Kernel:
    return Kernel(name=name, start_ns=start, dur_ns=dur, stream=stream, correlation=None, op=op, step=0, graph_id=graph, device=device)


def _op(index: int, name: str, parent: int | None = None, line: str = "") -> CpuOp:
    return CpuOp(
        index=index,
        name=name,
        start_ns=0,
        dur_ns=10,
        self_ns=10,
        num_children=0,
        thread="1/1",
        parent=parent,
        module=None,
        step=0,
        line=line,
    )


ONE_CALL = Trace(device="cuda:0", steps=(Step(start_ns=0, dur_ns=1_000_000),))


def test_communication_is_exposed_where_nothing_else_runs_on_its_device() -> None:
    nccl = "ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    trace = replace(
        ONE_CALL,
        kernels=(
            _kernel("gemm", 0, 100_000),
            _kernel(nccl, 50_000, 100_000, stream=20),  # half under the product
            _kernel("gemm", 0, 400_000, device=1),
            _kernel(nccl, 100_000, 100_000, device=1, stream=20),  # all under it
        ),
    )
    assert tables.communication(trace) == {"kernels": 2.0, "time_ms": pytest.approx(0.2), "exposed_ms": pytest.approx(0.05)}
    assert tables.communication(replace(trace, kernels=trace.kernels[:1])) is None
    assert any("0.05 ms with nothing else running" in note for note in elsewhere.told(trace))


def test_each_device_is_told_by_itself() -> None:
    trace = replace(
        ONE_CALL, kernels=(_kernel("a", 0, 600_000), _kernel("b", 100_000, 300_000, device=1), _kernel("c", 0, 600_000, stream=8))
    )
    assert tables.devices(trace) == [
        {"device": 0, "busy_ms": pytest.approx(0.6), "kernels": 2.0},
        {"device": 1, "busy_ms": pytest.approx(0.3), "kernels": 1.0},
    ]
    assert any("0: 0.6 ms, 1: 0.3 ms" in note for note in elsewhere.told(trace))


def test_lines_have_the_time_of_what_they_launched() -> None:
    trace = replace(
        ONE_CALL,
        ops=(_op(0, "aten::mm", line="infer.py:3 in embed"), _op(1, "aten::add")),
        kernels=(_kernel("gemm", 0, 300, op=0), _kernel("add", 400, 100, op=1)),
    )
    assert tables.lines(trace) == [
        {"line": "infer.py:3 in embed", "count": 1.0, "time_ms": pytest.approx(0.0003), "pct": pytest.approx(75.0)}
    ]
    first, second = tables.kernels(trace)
    assert (first["kernel"], first["op"], first["line"]) == ("gemm", "aten::mm", "infer.py:3 in embed")
    assert (second["op"], second["line"]) == ("aten::add", "")


def test_a_generated_kernel_names_the_region_that_ran_it() -> None:
    trace = replace(
        ONE_CALL,
        ops=(_op(0, "Torch-Compiled Region: 0/0"), _op(1, "triton_poi_fused_gelu_0", parent=0)),
        kernels=(_kernel("triton_poi_fused_gelu_0", 0, 300, op=1), _kernel("eager", 400, 100)),
    )
    assert tables.kernels(trace)[0]["op"] == "Torch-Compiled Region: 0/0"
    assert tables.compiled(trace) == {"regions": 1.0, "pct": pytest.approx(75.0)}


def test_a_real_compiled_trace_names_its_region_and_leaves_nothing_unaccounted() -> None:
    (run,) = elsewhere.explain(DATA / "bert-inductor.json.gz").runs
    assert any("torch.compile: 1 compiled region a call, 100% of the kernel time in it" in note for note in run.notes)
    assert run.waterfall is not None and run.waterfall.unaccounted_ms < 0.02 * run.waterfall.wall_ms


def test_a_real_replayed_trace_says_what_it_cannot_say() -> None:
    report = elsewhere.explain(DATA / "llama-graph.json.gz")
    (run,) = report.runs
    assert any("100% of the kernel time was replayed from CUDA graphs" in note for note in run.notes)
    assert any("CUDA graph replays" in note and "no host ops" in note for note in run.notes)
    assert all(row["op"] == "" for row in report.tables["kernels"])
    parts = run.waterfall
    # Nobody timed these calls without the profiler: every gap in them is a gap, the host running ahead or not.
    assert parts is not None and parts.unaccounted_ms < 0.02 * parts.wall_ms and "untraced" not in parts.method
    assert next(p.detail for p in parts.parts if p.name == "launch gaps") == "from the launch of the CUDA graph to its first kernel"


def test_a_real_eager_trace_has_its_products_and_its_wait() -> None:
    report = elsewhere.explain(DATA / "bert-eager.json.gz")
    (run,) = report.runs
    product = next(p for p in run.roofline if p.name == "aten.addmm")
    assert product.flops and product.dtype == "float16" and product.pct_of_ceiling is not None and 0 < product.pct_of_ceiling < 100
    assert {f.code for f in report.findings} >= {"GPU104", "GPU404"}
    assert report.tables["kernels"][0]["op"] == "aten::addmm"
