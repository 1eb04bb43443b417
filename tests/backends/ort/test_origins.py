"""Nodes that ran, traced back to the file: by tensors where the optimised graph is known, by ONNX Runtime's own names where it is not."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from gpuopt.backends.ort.origins import Origins, nodes_of, weight_bytes
from gpuopt.backends.ort.profile import NodeRun

SCOPES = "pkg.torch.onnx.name_scopes"


def node(name: str, op: str, inputs: str, outputs: str, module: str | None = None) -> Any:
    made = helper.make_node(op, inputs.split(), outputs.split(), name=name)
    if module is not None:
        made.metadata_props.add(key=SCOPES, value=repr(["", module, "x"]))
    return made


def model(nodes: list[Any], weights: dict[str, tuple[int, ...]] | None = None) -> Any:
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, s, [0.0] * _size(s)) for n, s in (weights or {}).items()]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


LINEAR = [
    node("node_MatMul_5", "MatMul", "x w", "val_5", "block.dense"),
    node("node_linear", "Add", "val_5 b", "linear", "block.dense"),
    node("node_relu", "Relu", "linear", "relu", "block.act"),
    node("node_add", "Add", "relu x", "add", "block"),
    node("node_layer_norm", "LayerNormalization", "add g", "layer_norm", "block.norm"),
]
RAN = [
    node("gemm_input_reshape", "Reshape", "x s", "gemm_input_reshape_arg"),
    node("fused node_MatMul_5/MatMulAddFusion", "FusedGemm", "gemm_input_reshape_arg w b", "gemm_output_reshape_arg"),
    node("gemm_output_reshape", "Reshape", "gemm_output_reshape_arg s2", "relu"),
    node("SkipLayerNormalization_token_3", "SkipLayerNormalization", "relu x g", "layer_norm"),
]


def test_a_fused_node_is_every_node_between_its_tensors() -> None:
    found = Origins(LINEAR, model(RAN, {"w": (4, 4)})).of("fused node_MatMul_5/MatMulAddFusion")
    assert found.module == "block.dense"
    assert found.ops == ("MatMul", "Add", "Relu")
    assert found.modules == ("block.dense", "block.act")


def test_a_node_with_a_name_of_its_own_is_found_by_what_it_writes() -> None:
    origins = Origins(LINEAR, model(RAN, {"w": (4, 4)}))
    assert origins.of("SkipLayerNormalization_token_3").module == "block.norm"
    assert origins.of("SkipLayerNormalization_token_3").ops == ("Add", "LayerNormalization")


def test_an_inserted_layout_change_belongs_to_the_node_it_serves() -> None:
    origins = Origins(LINEAR, model(RAN, {"w": (4, 4)}))
    assert origins.of("gemm_input_reshape").module == "block.dense"
    assert origins.of("gemm_output_reshape").module == "block.dense"


def test_without_the_graph_a_sure_name_still_tells_and_another_one_does_not() -> None:
    origins = Origins(LINEAR)
    assert origins.of("fused node_MatMul_5/MatMulAddFusion").module == "block.dense"
    assert origins.of("node_MatMul_5/MatMulScaleFusion//MatmulTransposeFusion/").module == "block.dense"
    assert origins.of("node_relu").module == "block.act"
    for unknown in ("SkipLayerNormalization_token_3", "node_MatMul_55", "node_MatMul", "gemm_input_reshape", ""):
        assert origins.of(unknown).module is None


def test_a_blocked_convolution_is_found_behind_the_activation_it_is_named_after() -> None:
    source = [
        node("c1", "Conv", "x w1", "y1", "conv1"),
        node("r1", "Relu", "y1", "relu", "act1"),
        node("c2", "Conv", "relu w2", "y2", "conv2"),
        node("c3", "Conv", "x w3", "y3", "conv3"),
        node("a", "Add", "y2 y3", "sum", ""),
        node("r2", "Relu", "sum", "relu_1", "act2"),
        node("c4", "Conv", "relu_1 w4", "y4", "conv4"),
    ]
    ran = [
        node("relu_nchwc", "Conv", "x reorder", "reorder_token_0"),
        node("y3_nchwc", "Conv", "x reorder_token_1", "reorder_token_2"),
        node("y2_nchwc", "Conv", "reorder_token_0 reorder_token_3 reorder_token_2", "reorder_token_4"),
        node("y4_nchwc", "Conv", "reorder_token_4 reorder_token_5", "reorder_token_6"),
        node("ReorderOutput", "ReorderOutput", "reorder_token_6", "y4"),
    ]
    origins = Origins(source, model(ran))
    assert [origins.of(n.name).module for n in ran] == ["conv1", "conv3", "conv2", "conv4", "conv4"]


def test_packed_weights_are_inputs_again() -> None:
    origins = Origins(LINEAR, model(RAN, {"w": (4, 6), "b": (6,)}))
    packed = NodeRun(
        name="fused node_MatMul_5/MatMulAddFusion",
        op="FusedGemm",
        provider="",
        inputs=(("float32", (2, 4)), ("float32", (6,))),
        outputs=(("float32", (2, 6)),),
    )
    assert [shape for _, shape in origins.filled(packed).inputs] == [(2, 4), (4, 6), (6,)]


def test_a_file_without_modules_makes_each_node_its_own() -> None:
    origins = Origins([node("Conv_12", "Conv", "x w", "y")])
    assert origins.of("Conv_12").module == "Conv_12"


def test_nodes_inside_a_branch_are_nodes_of_the_file() -> None:
    inner = helper.make_graph([node("inside", "Add", "a b", "c", "branch")], "then", [], [])
    choice = helper.make_node("If", ["k"], ["y"], name="choose", then_branch=inner, else_branch=inner)
    assert [n.name for n in nodes_of(model([choice]))] == ["choose", "inside", "inside"]
    assert Origins(list(nodes_of(model([choice])))).of("inside").module == "branch"


def test_a_cycle_in_a_file_ends_the_walk() -> None:
    source = [node("a", "Add", "t2 x", "t1", "m"), node("b", "Add", "t1 x", "t2", "m")]
    assert Origins(source, model([node("q", "Fused", "x", "t1")])).of("q").module == "m"


def test_weights_are_weighed_by_their_type() -> None:
    assert weight_bytes(model([], {"w": (4, 6), "b": (6,)})) == 4 * 30
