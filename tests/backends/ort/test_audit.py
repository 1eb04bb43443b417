"""The nodes that ran, weighed: against torch's own counter, arithmetic done by hand, and hand-made nodes for what no CPU runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gpuopt.backends import ort
from gpuopt.backends.ort.audit import audit_nodes, placement_notes
from gpuopt.backends.ort.flops import node_flops
from gpuopt.backends.ort.profile import NodeRun
from gpuopt.backends.ort.settings import CPU, CUDA
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision


def onnx_model(
    path: Path, nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, tuple[int, list[Any]]], constants: Any = ()
) -> Model:
    """A hand-made file."""

    def infos(values: dict[str, tuple[int, list[Any]]]) -> list[Any]:
        return [helper.make_tensor_value_info(n, t, s) for n, (t, s) in values.items()]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return Model(form="onnx", name=path.stem, path=path)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_fp32_is_honoured_and_every_flop_is_on_the_cpu_provider(name: str, exported: Callable[..., Any]) -> None:
    case = exported(name, torch.float32)
    audit = ort.build(case.model, case.inputs, {"precision": "fp32"}).audit()
    assert audit is not None and audit.honoured
    assert audit.shares == {"float32": 1.0}
    assert audit.placements == {"CPUExecutionProvider": 1.0}


@pytest.mark.parametrize("name", ["resnet", "bert"])
@pytest.mark.parametrize("preset", ["default", "basic"])
def test_fp16_on_the_cpu_provider_is_caught_as_fp32_behind_inserted_casts(name: str, preset: str, exported: Callable[..., Any]) -> None:
    case = exported(name, torch.float16)
    audit = ort.build(case.model, case.inputs, {"precision": "fp16", "preset": preset}).audit()
    assert audit is not None and not audit.honoured
    assert audit.shares.get("float16", 0.0) < 0.01
    assert audit.exceptions and "float32" in audit.exceptions[0]
    assert "float16" in audit.reason


def test_a_part_in_another_dtype_is_weighed_by_its_flops(tmp_path: Path) -> None:
    """[8,16]x[16,32] in fp64 and [8,32]x[32,4] in fp32: 4096 and 1024 multiply-adds."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="wide"),
        helper.make_node("Cast", ["h"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["c", "b"], ["y"], name="narrow"),
    ]
    constants = [
        helper.make_tensor("a", TensorProto.DOUBLE, [16, 32], [0.5] * 512),
        helper.make_tensor("b", TensorProto.FLOAT, [32, 4], [0.5] * 128),
    ]
    model = onnx_model(tmp_path / "m.onnx", nodes, {"x": (TensorProto.DOUBLE, [8, 16])}, {"y": (TensorProto.FLOAT, [8, 4])}, constants)
    audit = ort.build(model, Inputs(args=(torch.zeros(8, 16, dtype=torch.float64),)), {"precision": "fp64"}).audit()
    assert audit is not None and not audit.honoured
    assert audit.shares == pytest.approx({"float64": 0.8, "float32": 0.2})
    assert any("narrow" in line for line in audit.exceptions)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_the_flops_of_the_nodes_that_ran_are_those_of_the_module(name: str, exported: Callable[..., Any]) -> None:
    """Against torch's own counter on the source module: fusion, packing and layouts must lose nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    case = exported(name, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        case.module.float()(*case.inputs.args, **case.inputs.kwargs)
    ran = {}
    for preset in ("basic", "default"):
        runner = ort.build(case.model, case.inputs, {"preset": preset})
        nodes = runner._profiled(runner._feeds(zeros=True)).calls[-1].nodes
        ran[preset] = sum(node_flops(n) or 0.0 for n in nodes)
    assert ran["basic"] == pytest.approx(counter.get_total_flops(), rel=1e-9)
    # The CPU's blocked layout pads channels to blocks of 8 or 16, and computes the padding too.
    assert ran["basic"] <= ran["default"] < 1.25 * ran["basic"]


def node(
    op: str,
    inputs: list[tuple[str, tuple[int, ...]]],
    outputs: list[tuple[str, tuple[int, ...]]],
    provider: str = CUDA,
    name: str = "n",
) -> NodeRun:
    return NodeRun(name=name, op=op, provider=provider, inputs=tuple(inputs), outputs=tuple(outputs))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_a_gemm_is_counted_whether_or_not_a_is_transposed_or_the_weight_is_shown(m: int, k: int, n: int, transposed: bool) -> None:
    a = ("float16", (k, m) if transposed else (m, k))
    hidden = node("Gemm", [a, ("float16", (n,))], [("float16", (m, n))])
    shown = node("Gemm", [a, ("float16", (k, n)), ("float16", (n,))], [("float16", (m, n))])
    assert node_flops(hidden) == node_flops(shown) == 2.0 * m * n * k


def test_convolutions_are_counted_in_both_layouts_and_by_group() -> None:
    nchw = node("Conv", [("float16", (2, 8, 5, 5)), ("float16", (4, 2, 3, 3))], [("float16", (2, 4, 3, 3))])
    nhwc = node("NhwcFusedConv", [("float16", (2, 5, 5, 8)), ("float16", (4, 3, 3, 2))], [("float16", (2, 3, 3, 4))])
    assert node_flops(nchw) == node_flops(nhwc) == 2.0 * 2 * 4 * 9 * 2 * 9


def test_a_fused_attention_is_two_products_a_head() -> None:
    q = ("float16", (2, 4, 16, 8))
    assert node_flops(node("Attention", [q, q, q], [q])) == 2 * 2.0 * 2 * 4 * 16 * 16 * 8
    x, w = ("float16", (2, 16, 32)), ("float16", (32, 96))
    assert node_flops(node("Attention", [x, w, ("float16", (96,))], [x])) == 2.0 * 2 * 16 * 32 * 96 + 4.0 * 2 * 16 * 16 * 32


def test_a_node_that_cannot_be_weighed_is_weighed_by_the_source_graph_or_judged_by_its_dtype() -> None:
    lstm = {dtype: node("LSTM", [(dtype, (5, 2, 8))], [(dtype, (5, 1, 2, 8))], name="lstm_1/fused") for dtype in ("float16", "float32")}
    gemm = node("MatMul", [("float16", (4, 4)), ("float16", (4, 4))], [("float16", (4, 4))])
    assert audit_nodes((gemm, lstm["float16"]), requested=Precision.FP16).honoured
    assert not audit_nodes((gemm, lstm["float32"]), requested=Precision.FP16).honoured
    assert not audit_nodes((lstm["float32"],), requested=Precision.FP16).honoured
    weighed = audit_nodes((gemm, lstm["float32"]), requested=None, layer_flops={"lstm": (1.0, "float32"), "lstm_1": (384.0, "float32")})
    assert weighed.shares == {"float16": 0.25, "float32": 0.75}


def test_tf32_is_told_from_fp32_on_cuda_alone() -> None:
    product = [("float32", (4, 4)), ("float32", (4, 4))], [("float32", (4, 4))]
    nodes = (node("MatMul", *product), node("MatMul", *product, provider=CPU))
    audit = audit_nodes(nodes, requested=Precision.TF32, has_tf32=True)
    assert audit.shares == {"float32": 0.5, "tf32": 0.5} and not audit.honoured
    assert audit.placements == {CPU: 0.5, CUDA: 0.5}


def test_nodes_that_fell_to_the_cpu_are_named() -> None:
    nodes = (
        node("Conv", [], [("float16", (1,))]),
        node("NonMaxSuppression", [("float32", (9, 4))], [("int64", (3, 3))], provider=CPU, name="nms"),
        node("Gather", [("int64", (4,))], [("int64", (1,))], provider=CPU, name="shape"),
        node("MemcpyToHost", [("float32", (9, 4))], [("float32", (9, 4))], name="Memcpy_1"),
    )
    text = " | ".join(placement_notes(nodes))
    assert "nms (NonMaxSuppression)" in text
    assert "1 nodes on shapes" in text
    assert "1 copies between host and device" in text
