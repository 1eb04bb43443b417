"""ONNX Runtime's profile as a trace, on the CPU for real; as launches of a GPU, from recordings of one (H200, ONNX Runtime 1.30: the first 4 layers of BERT-large, ResNet-101)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper

from gpuopt.backends import ort
from gpuopt.backends.ort import profile, tracing
from gpuopt.backends.ort.origins import Origin, Origins
from gpuopt.backends.ort.profile import Call, NodeRun, Profile
from gpuopt.core.errors import Unsupported
from gpuopt.core.launches import module_of
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import Count
from gpuopt.profiling.attribute import attribute, coverage
from gpuopt.profiling.count import count
from gpuopt.profiling.events import from_chrome

DATA = Path(__file__).parent / "data"
NOTHING = Count(records=(), flops=0.0, flops_by_dtype={}, bytes=0.0, coverage=0.0, method="")


# -- a CPU ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "bert"])
@pytest.mark.parametrize("preset", ["default", "basic"])
def test_every_node_that_ran_belongs_to_a_module_and_its_work_is_known(name: str, preset: str, exported: Callable[..., Any]) -> None:
    case = exported(name, torch.float32)
    runner = ort.build(case.model, case.inputs, {"preset": preset})
    runner(*case.inputs.args, **case.inputs.kwargs)
    trace = runner.trace(2)
    assert len(trace.steps) == 2 and not trace.on_device
    assert {op.module for op in trace.ops} <= {n for n, _ in case.module.named_modules()}
    records = attribute(trace, count(case.module.float(), case.inputs))
    assert coverage(records) == 1.0
    assert sum(r.time_ns or 0.0 for r in records) == pytest.approx(sum(op.self_ns for op in trace.ops) / 2)
    for step, around in enumerate(trace.steps):
        mine = [op for op in trace.ops if op.step == step]
        assert mine and all(around.start_ns <= op.start_ns <= around.start_ns + around.dur_ns for op in mine)
        assert sum(op.self_ns for op in mine) <= around.dur_ns


def test_products_land_in_the_modules_that_the_source_computes_them_in(exported: Callable[..., Any]) -> None:
    """Unoptimised, so that each product is one of the file's: FLOPs by module as torch counts them, attention's inside its module."""
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {"preset": "basic"})
    runner(*case.inputs.args, **case.inputs.kwargs)
    found: dict[str, float] = {}
    for record in attribute(runner.trace(1), NOTHING):
        found[record.module] = found.get(record.module, 0.0) + (record.flops or 0.0)
    wanted: dict[str, float] = {}
    for record in count(case.module.float(), case.inputs).records:
        wanted[record.module] = wanted.get(record.module, 0.0) + (record.flops or 0.0)
    products = {module: flops for module, flops in wanted.items() if flops}
    assert len(products) > 10
    assert {module: flops for module, flops in found.items() if flops} == pytest.approx(products)


def test_records_name_the_operator_and_the_models_own_line(exported: Callable[..., Any]) -> None:
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    runner(*case.inputs.args, **case.inputs.kwargs)
    (dense,) = [r for r in attribute(runner.trace(1), NOTHING) if r.module.endswith("layer.1.intermediate.dense") and r.flops]
    assert dense.op.startswith("onnx.") and dense.dtype == "float32"
    assert dense.line is not None and dense.line.startswith("modeling_bert.py:")


def test_the_trace_sees_the_inputs_of_the_last_call_while_they_live(tmp_path: Path) -> None:
    """How many elements NonZero finds shows which values the profiled session was given."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="where"),
        helper.make_node("Cast", ["where"], ["y"], to=TensorProto.FLOAT, name="cast"),
    ]
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None])]
    path = tmp_path / "n.onnx"
    path.write_bytes(
        helper.make_model(
            helper.make_graph(nodes, "g", *infos), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
        ).SerializeToString()
    )
    x = torch.tensor([0.0, 1, 0, 2, 0, 3])
    runner = ort.build(Model(form="onnx", name="n", path=path), Inputs(args=(x,)), {"optimization": "off"})
    runner(x)
    assert {op.shapes for op in runner.trace(1).ops} == {((6,),), ((1, 3),)}
    del x
    assert {op.shapes for op in runner.trace(1).ops if op.name == "onnx::NonZero"} == {((6,),)}
    assert {op.shapes for op in runner.trace(1).ops if op.name == "onnx::Cast"} == {((1, 0),)}


def test_a_runner_that_was_never_called_has_nothing_to_trace(exported: Callable[..., Any], tmp_path: Path) -> None:
    case = exported("resnet", torch.float32)
    files = ort.build(case.model, case.inputs, {}).save(tmp_path)
    loaded = ort.load(tmp_path, files, {}, "cpu")
    with pytest.raises(Unsupported, match="nothing was called yet"):
        loaded.trace(1)  # type: ignore[attr-defined]


def test_a_graph_that_cannot_be_written_is_said_and_names_still_tell(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = profile.open_session

    def refusing(path: Path, settings: Any, index: int, stream: Any, profile: Path | None = None, optimised: Path | None = None) -> Any:
        if optimised is not None:
            raise Unsupported("no space left")
        return real(path, settings, index, stream, profile)

    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    runner(*case.inputs.args, **case.inputs.kwargs)
    monkeypatch.setattr(profile, "open_session", refusing)
    trace = runner.trace(1)
    assert "no space left" in trace.notes
    products = [op for op in trace.ops if op.name in ("onnx::Gemm", "onnx::MatMul", "onnx::FusedMatMul")]
    assert products and all(op.module != tracing.UNKNOWN_MODULE for op in products)


def test_a_graph_larger_than_the_disk_may_hold_is_not_written(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = exported("resnet", torch.float32)
    runner = ort.build(case.model, case.inputs, {"preset": "basic"})
    runner(*case.inputs.args, **case.inputs.kwargs)
    monkeypatch.setattr("gpuopt.backends.ort.runner.LARGEST_GRAPH_BYTES", 0)
    trace = runner.trace(1)
    assert any("too large" in note for note in trace.notes)
    assert {op.module for op in trace.ops if op.name == "onnx::Conv"} <= {n for n, _ in case.module.named_modules()}


def test_what_runs_inside_a_branch_is_not_counted_twice() -> None:
    runs = (
        run("if", "If", 0, 100_000),
        run("add", "Add", 10_000, 30_000),
        run("mul", "Mul", 40_000, 60_000),
        run("relu", "Relu", 100_000, 5_000),
    )
    found = Profile(calls=(Call(start_ns=0, dur_ns=120_000, nodes=runs),), began_ns=0)
    trace = tracing.trace_of(found, Origins([]), {}, device="cpu", calls=1)
    assert [(op.self_ns, op.parent) for op in trace.ops] == [(10_000, None), (30_000, 0), (60_000, 0), (5_000, None)]


def test_the_calls_that_others_disturbed_are_not_the_ones_shown() -> None:
    def call(start_ns: int, dur_ns: int) -> Call:
        return Call(start_ns=start_ns, dur_ns=dur_ns, nodes=(run("a", "Relu", start_ns + 1_000, dur_ns - 2_000),))

    calls = (call(0, 5_000), call(10_000, 20_000), call(40_000, 7_000), call(50_000, 90_000), call(150_000, 6_000), call(160_000, 6_500))
    trace = tracing.trace_of(Profile(calls=calls, began_ns=0), Origins([]), {}, device="cpu", calls=2, warmup=1)
    assert [(step.start_ns, step.dur_ns) for step in trace.steps] == [(0, 7_000), (120_000, 6_500)]
    assert [(op.start_ns, op.dur_ns, op.step) for op in trace.ops] == [(1_000, 5_000, 0), (121_000, 4_500, 1)]


def test_two_nodes_in_one_microsecond_are_not_nested() -> None:
    runs = (run("a", "Relu", 5_000, 1_000), run("b", "Relu", 5_000, 0))
    trace = tracing.trace_of(
        Profile(calls=(Call(start_ns=0, dur_ns=9_000, nodes=runs),), began_ns=0), Origins([]), {}, device="cpu", calls=1
    )
    assert [(op.self_ns, op.parent) for op in trace.ops] == [(1_000, None), (0, None)]


def run(name: str, op: str, start_ns: int, dur_ns: int) -> NodeRun:
    tensor = ("float32", (2, 3))
    return NodeRun(name=name, op=op, provider="", inputs=(tensor,), outputs=(tensor,), start_ns=start_ns, dur_ns=dur_ns)


def test_a_node_whose_shapes_do_not_tell_takes_the_count_of_what_it_stems_from() -> None:
    lstm = run("lstm", "LSTM", 0, 1)
    assert tracing.flops_of(lstm, Origin(nodes=("a", "b")), {"a": (5.0, "float32"), "b": (2.0, "float32")}) == 7.0
    assert tracing.flops_of(lstm, Origin(nodes=("a", "b")), {"a": (None, "float32")}) is None
    assert tracing.flops_of(lstm, Origin(), {}) is None


# -- a GPU, recorded ------------------------------------------------------------------------------------------------------------------


class Prop:
    def __init__(self, key: str, value: str) -> None:
        self.key, self.value = key, value


class Node:
    """A NodeProto of which the recording kept the name, operator and metadata, not the tensors."""

    input: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    attribute = ()

    def __init__(self, name: str, op: str, meta: dict[str, str]) -> None:
        self.name, self.op_type, self.metadata_props = name, op, [Prop(k, v) for k, v in meta.items()]


def recorded(name: str) -> tuple[Profile, dict[str, Any], Origins]:
    data = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    found = Profile(calls=profile.calls_of(data["profile"]), began_ns=data["start"])
    return found, data["chrome"], Origins([Node(n["name"], n["op"], n["meta"]) for n in data["nodes"]])


@pytest.mark.parametrize(("name", "share"), [("bert", 0.97), ("resnet", 0.999)])
def test_the_kernels_of_another_call_are_attributed_by_the_launches_of_one(name: str, share: float) -> None:
    """Both traced calls against the launches read from the second. Without the optimised graph, which was not recorded: fused layer norms have no sure name."""
    found, chrome, origins = recorded(name)
    launches = tracing.launches_of(found, tracing.kernels_of(chrome), origins, {})
    trace = from_chrome(chrome, device="cuda:0")
    total = sum(k.dur_ns for k in trace.kernels if k.step is not None)
    records = attribute(trace, NOTHING, launches=launches)
    placed = sum(r.time_ns or 0.0 for r in records if r.module != "?") * len(trace.steps)
    assert placed / total > share
    assert len(launches) * len(trace.steps) == sum(k.step is not None for k in trace.kernels)
    known = [r for r in records if r.module != "?"]
    assert coverage(known) == 1.0
    assert sum(r.flops or 0.0 for r in known) == pytest.approx(sum(launch.flops or 0.0 for launch in launches if launch.home is not None))
    assert all(r.op.startswith("onnx.") and r.dtype == "float16" for r in known if r.flops)


def test_each_launch_carries_its_nodes_module_and_its_work_once() -> None:
    found, chrome, origins = recorded("bert")
    launches = tracing.launches_of(found, tracing.kernels_of(chrome), origins, {})
    first = next(launch for launch in launches if launch.ops == ("onnx.Gemm",))
    assert (first.name, first.home) == ("node_MatMul_52/MatMulAddFusion", "encoder.layer.0.attention.self.key")
    assert all(len(launch.kernels) == 1 and launch.kind == "node" for launch in launches)
    nodes = found.calls[-1].nodes
    assert sum(launch.flops or 0.0 for launch in launches) == sum(tracing.flops_of(n, Origin(), {}) or 0.0 for n in nodes)
    # 4 layers of BERT-large on 8 x 512 tokens: 12 products of a layer's width squared a token, and attention's two.
    tokens, width = 8 * 512, 1024
    assert sum(launch.flops or 0.0 for launch in launches) == pytest.approx(
        4 * (24 * tokens * width**2 + 4 * tokens * 512 * width), rel=1e-3
    )
    assert {module_of(launch) for launch in launches if launch.flops} >= {f"encoder.layer.{i}.output.dense" for i in range(4)}


def test_a_kernel_launched_between_two_nodes_belongs_to_none() -> None:
    nodes = (run("a", "Relu", 1_000, 2_000), run("b", "Relu", 10_000, 2_000))
    found = Profile(calls=(Call(start_ns=0, dur_ns=20_000, nodes=nodes),), began_ns=1_000_000)
    kernels = [
        tracing.DeviceKernel(name=f"k{at}", launched_ns=1_000_000 + at, dur_ns=1) for at in (500, 1_500, 7_000, 11_000, 11_500, 30_000)
    ]
    launches = tracing.launches_of(found, tuple(kernels), Origins([]), {})
    assert [(launch.name, launch.kernels) for launch in launches] == [("a", ("k1500",)), ("b", ("k11000",)), ("b", ("k11500",))]


def test_kernels_come_in_the_order_of_their_launches_whatever_the_stream_did() -> None:
    def event(category: str, name: str, ts: float, number: int) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": 1.0, "args": {"correlation": number}}

    events = [
        event("kernel", "late", 50.0, 1),
        event("cuda_runtime", "cudaLaunchKernel", 2.0, 1),
        event("gpu_memset", "Memset (Device)", 40.0, 2),
    ]
    events += [event("cuda_driver", "cuLaunchKernel", 3.5, 2), event("kernel", "lost", 60.0, 9), event("gpu_memcpy", "Memcpy HtoD", 1.0, 1)]
    found = tracing.kernels_of({"baseTimeNanoseconds": 7_000, "traceEvents": events})
    assert [(k.name, k.launched_ns) for k in found] == [("late", 9_000), ("Memset (Device)", 10_500)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_launches_of_a_session_are_those_of_its_nodes(name: str, exported: Callable[..., Any]) -> None:
    case = exported(name, torch.float16)
    inputs = case.inputs.map(lambda t: t.cuda())
    runner = ort.build(case.model, inputs, {"precision": "fp16"})
    runner(*inputs.args, **inputs.kwargs)
    launches = runner.launches()
    modules = {n for n, _ in case.module.named_modules()}
    assert launches and all(launch.home in modules for launch in launches)
    assert sum(bool(launch.flops) for launch in launches) > 5
