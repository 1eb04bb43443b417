"""The ONNX counter against arithmetic done by hand, and against the ATen counter on the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs
from gpuopt.profiling.count import count
from gpuopt.profiling.count_onnx import from_onnx, layer_flops

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture
def save(tmp_path):
    def write(nodes, inputs, outputs=("y",), weights=(), opset=20, dtype=FLOAT):
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
            [helper.make_tensor_value_info(o, dtype, None) for o in outputs],
            [numpy_helper.from_array(np.zeros(s, d), n) for n, d, s in weights],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("my.ops", 1)]
        )
        path = tmp_path / "m.onnx"
        onnx.save(model, path)
        return path

    return write


def node(op, inputs, outputs=("y",), name="n", domain="", **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attributes)


def w(name, *shape, dtype=np.float32):
    return (name, dtype, shape)


CASES = {
    "Conv": (node("Conv", "xwb", strides=[2, 2], pads=[1, 1, 1, 1]), ["N", 4, 9, 9], [w("w", 6, 4, 3, 3), w("b", 6)], 2 * 2 * 6 * 25 * 4 * 9),
    "grouped Conv": (node("Conv", "xw", group=2), ["N", 4, 9], [w("w", 6, 2, 3)], 2 * 2 * 6 * 7 * 2 * 3),
    "ConvTranspose": (node("ConvTranspose", "xw", strides=[2, 2]), ["N", 4, 5, 5], [w("w", 4, 3, 3, 3)], 2 * 2 * 4 * 25 * 3 * 9),
    "MatMul": (node("MatMul", "xw"), ["N", 3, 7], [w("w", 7, 5)], 2 * 2 * 3 * 7 * 5),
    "MatMul by a vector": (node("MatMul", "xw"), ["N", 3, 7], [w("w", 7)], 2 * 2 * 3 * 7),
    "Gemm": (node("Gemm", "xwb", transB=1), ["N", 7], [w("w", 5, 7), w("b", 5)], 2 * 2 * 7 * 5),
    "Gemm of a transposed left side": (node("Gemm", "xw", transA=1), [7, "N"], [w("w", 7, 5)], 2 * 2 * 7 * 5),
    "Einsum": (node("Einsum", "xw", equation="bij,jk->bik"), ["N", 3, 7], [w("w", 7, 5)], 2 * 2 * 3 * 7 * 5),
    "Einsum with dots": (node("Einsum", "xw", equation="...ij,jk->...ik"), ["N", 3, 7], [w("w", 7, 5)], 2 * 2 * 3 * 7 * 5),
    "LSTM": (node("LSTM", "xwr", hidden_size=8), [5, "N", 4], [w("w", 1, 32, 4), w("r", 1, 32, 8)], 2 * 10 * 32 * (4 + 8)),
    "bidirectional GRU": (
        node("GRU", "xwr", hidden_size=8, direction="bidirectional"), [5, "N", 4], [w("w", 2, 24, 4), w("r", 2, 24, 8)], 2 * 10 * 2 * 24 * (4 + 8)
    ),
    "FusedMatMul": (node("FusedMatMul", "xw", domain="com.microsoft", transB=1), ["N", 3, 7], [w("w", 5, 7)], 2 * 2 * 3 * 7 * 5),
    "FusedConv": (node("FusedConv", "xw", domain="com.microsoft", activation="Relu"), ["N", 4, 9, 9], [w("w", 6, 4, 3, 3)], 2 * 2 * 6 * 49 * 4 * 9),
    "MatMulNBits": (
        node("MatMulNBits", "xws", domain="com.microsoft", K=64, N=32, bits=4, block_size=32), ["N", 3, 64], [w("w", 32, 2, 16, dtype=np.uint8), w("s", 64)], 2 * 2 * 3 * 64 * 32
    ),
    "Attention of ORT": (
        node("Attention", "xwb", domain="com.microsoft", num_heads=2), ["N", 6, 16], [w("w", 16, 48), w("b", 48)], 2 * 2 * 6 * 16 * 48 + 4 * 2 * 6 * 6 * 16
    ),
    "MultiHeadAttention of ORT": (node("MultiHeadAttention", ["x", "x", "x"], domain="com.microsoft", num_heads=2), ["N", 6, 16], [], 4 * 2 * 6 * 6 * 16),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_node_costs_its_multiply_adds(name, save):
    made, shape, weights, expected = CASES[name]
    path = save([made], [("x", FLOAT, shape)], weights=weights)
    found = from_onnx(path, {"N": 2})
    assert (found.flops, found.unknown_ops, found.coverage) == (expected, (), 1.0)
    assert layer_flops(path, {"N": 2}) == {"n": (expected, "float32")}
    assert from_onnx(path, {"N": 4}).flops > expected


def test_standard_attention_counts_scores_and_mixture(save):
    path = save(
        [node("Attention", ["q", "k", "v"], q_num_heads=4, kv_num_heads=2)],
        [("q", FLOAT, ["N", 6, 32]), ("k", FLOAT, ["N", 10, 16]), ("v", FLOAT, ["N", 10, 16])],
        opset=23,
    )
    assert from_onnx(path, {"N": 2}).flops == 2 * 2 * 4 * 6 * 10 * (8 + 8)


def test_integer_products_compute_in_integers(save):
    path = save(
        [node("MatMulInteger", ["x", "w"])],
        [("x", TensorProto.UINT8, ["N", 7])],
        weights=[w("w", 7, 5, dtype=np.int8)],
        dtype=TensorProto.INT32,
    )
    assert layer_flops(path, {"N": 2}) == {"n": (2.0 * 2 * 7 * 5, "uint8")}


def test_a_product_between_dequantise_and_quantise_computes_in_what_is_dequantised(save):
    nodes = [
        node("DequantizeLinear", ["x", "s"], ["xf"], name="dq_x"),
        node("DequantizeLinear", ["w", "s"], ["wf"], name="dq_w"),
        node("Transpose", ["wf"], ["wt"], name="t", perm=[1, 0]),
        node("MatMul", ["xf", "wt"], ["y"], name="mm"),
        node("MatMul", ["y", "plain"], ["z"], name="float_mm"),
    ]
    path = save(nodes, [("x", TensorProto.INT8, ["N", 7])], outputs=("z",), weights=[w("w", 5, 7, dtype=np.int8), w("s"), w("plain", 5, 3)])
    assert {k: d for k, (_, d) in layer_flops(path, {"N": 2}).items()} == {"mm": "int8", "float_mm": "float32"}


def test_half_precision_and_tf32_show_in_the_dtype(save):
    path = save(
        [node("MatMul", "xw")], [("x", TensorProto.FLOAT16, ["N", 7])], weights=[w("w", 7, 5, dtype=np.float16)], dtype=TensorProto.FLOAT16
    )
    assert from_onnx(path, {"N": 2}).flops_by_dtype == {"float16": 140.0}
    path = save([node("MatMul", "xw")], [("x", FLOAT, ["N", 7])], weights=[w("w", 7, 5)])
    assert from_onnx(path, {"N": 2}, tf32=True).flops_by_dtype == {"tf32": 140.0}


def test_an_unknown_op_and_an_unbound_dimension_are_unknown_never_zero(save):
    path = save([node("Mystery", "x", domain="my.ops")], [("x", FLOAT, ["N", 7])])
    found = from_onnx(path, {"N": 2})
    assert found.coverage == 0.0
    assert (found.unknown_ops, found.records[0].flops) == (("my.ops.Mystery",), None)
    path = save([node("MatMul", "xw")], [("x", FLOAT, ["N", "S", 7])], weights=[w("w", 7, 5)])
    found = from_onnx(path, {"N": 2})
    assert found.unknown_ops == ("MatMul",)
    assert any("x[1] (S)" in note for note in found.notes)
    assert from_onnx(path, {"N": 2, "S": 3}).flops == from_onnx(path, {"x": (2, 3, 7)}).flops == 2 * 6 * 7 * 5


def test_shapes_computed_inside_the_graph_are_followed(save):
    nodes = [
        node("Shape", ["x"], ["s"], name="shape", start=0, end=1),
        node("Concat", ["s", "tail"], ["target"], name="cat", axis=0),
        node("Reshape", ["x", "target"], ["r"], name="reshape"),
        node("MatMul", ["r", "w"], ["y"], name="mm"),
    ]
    tail = numpy_helper.from_array(np.array([6, 2], np.int64), "tail")
    path = save(nodes, [("x", FLOAT, ["N", 12])], weights=[w("w", 2, 5)])
    model = onnx.load(path)
    model.graph.initializer.append(tail)
    onnx.save(model, path)
    assert layer_flops(path, {"N": 3})["mm"] == (2.0 * 3 * 6 * 2 * 5, "float32")


def test_of_a_branch_the_dearer_side_counts(save):
    def branch(inner):
        return helper.make_graph(
            [node("MatMul", ["x", "w"], ["o"], name=f"b{inner}")] * inner, "b", [], [helper.make_tensor_value_info("o", FLOAT, None)]
        )

    path = save(
        [
            node(
                "If",
                ["c"],
                then_branch=branch(1),
                else_branch=helper.make_graph([node("Identity", ["x"], ["o"])], "e", [], [helper.make_tensor_value_info("o", FLOAT, None)]),
            )
        ],
        [("x", FLOAT, ["N", 7]), ("c", TensorProto.BOOL, [])],
        weights=[w("w", 7, 7)],
    )
    assert from_onnx(path, {"N": 2}).flops == 2 * 2 * 7 * 7


def test_a_node_without_a_name_goes_by_its_output_as_tensorrt_calls_it(save):
    path = save([node("MatMul", "xw", name="")], [("x", FLOAT, ["N", 7])], weights=[w("w", 7, 5)])
    assert list(layer_flops(path, {"N": 2})) == ["node_of_y"]


def test_what_is_no_model_is_bad_input(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model at all")
    with pytest.raises(BadInput):
        from_onnx(path, {})
    with pytest.raises(BadInput):
        from_onnx(tmp_path / "missing.onnx", {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "module, shape",
    [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)),
            (4, 3, 8, 8),
        ),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (4, 5, 16)),
    ],
)
def test_an_exported_model_counts_as_its_module_does(module, shape, tmp_path):
    pytest.importorskip("onnxscript")
    module.eval()
    x = torch.randn(shape)
    path = tmp_path / "m.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, dynamic_shapes=({0: torch.export.Dim("N", min=1, max=64)},), verbose=False)
    for batch in (1, 6):
        bound = torch.randn(batch, *shape[1:])
        assert from_onnx(path, {"N": batch}).flops == count(module, Inputs(args=(bound,))).flops


def test_large_weights_are_not_read_only_measured(save):
    path = save([node("MatMul", "xw")], [("x", FLOAT, ["N", 2000])], weights=[w("w", 2000, 2000)])
    assert from_onnx(path, {"N": 2}).flops == 2 * 2 * 2000 * 2000
    assert from_onnx(path, {"N": 2}).num_parameters == 2000 * 2000


def test_rows_carry_the_modules_that_the_exporter_wrote_and_what_has_none_is_the_roots(save):
    first, bare, last = (
        node("MatMul", "xw", "t"),
        node("Relu", "t", "u", name="bare"),
        node("MatMul", "uv", "y", name="/block/block.1/MatMul"),
    )
    first.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'block', 'block.0', 'mm']")
    first.metadata_props.add(key="pkg.torch.onnx.class_hierarchy", value="['m.Net', 'm.Block', 'torch.nn.Linear', 'aten.mm.default']")
    first.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/m/net.py", line 7, in forward')
    path = save([first, bare, last], [("x", FLOAT, ["N", 4])], weights=[w("w", 4, 6), w("v", 6, 2)])
    rows = from_onnx(path, {"N": 3}).records
    assert [(r.op, r.module, r.flops) for r in rows] == [("MatMul", "block.0", 144.0), ("Relu", "", 0.0), ("MatMul", "block.1", 72.0)]
    assert (rows[0].module_class, rows[0].line) == ("Linear", "net.py:7")
    assert set(layer_flops(path, {"N": 3})) == {"n", "/block/block.1/MatMul"}
