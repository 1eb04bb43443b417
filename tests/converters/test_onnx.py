"""ONNX files: names, open dimensions, dtypes, and that a wrong file is never published."""

from __future__ import annotations

import numpy as np
import onnx as onnx_library
import pytest
import torch
from torch import nn

from gpuopt.converters import apply, onnx
from gpuopt.core.errors import GateFailed, Unsupported
from gpuopt.core.live import Model
from gpuopt.core.spec import Precision, Transforms
from gpuopt.programs import node_source
from gpuopt.trust import gate


def session_of(path):
    return gate.onnx_session(path, ["CPUExecutionProvider"])


def values_of(graph_values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph_values}


def test_a_resnet_in_fp16_runs_at_every_batch_under_its_own_names(resnet, tmp_path, capfd):
    model, inputs = resnet
    changed = apply(model, Precision.FP16, Transforms(fold_batch_norm=True, channels_last=True), inputs)
    path = onnx.export(changed, inputs.map(lambda t: t.half()), tmp_path / "m.onnx", {"N": (1, 8)})
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    graph = onnx_library.load(path).graph
    assert values_of(graph.input) == {"pixel_values": ["N", 3, 32, 32]}
    assert values_of(graph.output) == {"logits": ["N", 10]}
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)
    session = session_of(path)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32).half()
        (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
        assert found.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(found), changed.module(x).logits, rtol=2e-2, atol=2e-2)
    assert "".join(capfd.readouterr()) == ""


def test_a_t5_keeps_integers_whole_and_its_dimensions_apart(t5, tmp_path):
    model, inputs = t5
    path = onnx.export(model, inputs, tmp_path / "m.onnx", {"N": (1, 4), "S": (1, 16), "T": (1, 16)})
    graph = onnx_library.load(path).graph
    assert values_of(graph.input) == {"input_ids": ["N", "S"], "decoder_input_ids": ["N", "T"]}
    assert {v.type.tensor_type.elem_type for v in graph.input} == {onnx_library.TensorProto.INT64}
    ids, decoder = torch.randint(99, (3, 11)), torch.randint(99, (3, 2))
    wanted = model.module(ids, decoder_input_ids=decoder)
    names = ["logits", "encoder_last_hidden_state"]
    found = session_of(path).run(names, {"input_ids": ids.numpy(), "decoder_input_ids": decoder.numpy()})
    for name, value in zip(names, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("name", ["resnet", "t5"])
def test_every_node_still_says_which_module_and_line_it_is_from(name, precision, request, tmp_path):
    """Through the exporter's own optimiser, which folds batch norms into convolutions, and through the constant folding that stands in for it in bf16."""
    model, inputs = request.getfixturevalue(name)
    given = inputs.map(lambda t: t.to(getattr(torch, precision.dtype)) if t.is_floating_point() else t)
    path = onnx.export(apply(model, precision, Transforms()), given, tmp_path / "m.onnx", check=False)
    nodes = [n for n in onnx_library.load(path).graph.node if n.op_type != "Constant"]
    modules = {n: type(m).__name__ for n, m in model.module.named_modules()}
    for node in nodes:
        source = node_source.of_node(node)
        assert source.module in modules, f"{node.name}: {source}"
        assert source.line.startswith(("modeling_", "activations.py")), f"{node.name}: {source}"
        if node.op_type == "Conv":
            assert modules[source.module] == "Conv2d", f"{node.name}: {source}"


def test_bf16_is_written_and_its_not_being_run_is_said(make, inputs, tmp_path):
    model = apply(make(nn.Linear(4, 8)), Precision.BF16, Transforms())
    given = inputs("x:float32[N,4]", dims={"N": 2}).map(lambda t: t.bfloat16())
    path = onnx.export(model, given, tmp_path / "m.onnx")
    assert onnx_library.load(path).graph.input[0].type.tensor_type.elem_type == onnx_library.TensorProto.BFLOAT16
    assert any("was not run" in note for note in model.notes)


def test_a_bf16_batch_norm_does_not_leave_fp32_weights_in_its_convolution(make, inputs, stirred, tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    stirred(module)
    model = apply(make(module), Precision.BF16, Transforms())
    given = inputs("x:float32[N,3,8,8]", dims={"N": 2}).map(lambda t: t.bfloat16())
    graph = onnx_library.load(onnx.export(model, given, tmp_path / "m.onnx", {"N": (1, 8)})).graph
    dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 1
    held = {dtypes[name] for node in convolutions for name in node.input[1:] if name in dtypes}
    assert held == {onnx_library.TensorProto.BFLOAT16}
    assert onnx_library.TensorProto.FLOAT not in dtypes.values()
    assert not {"CastLike", "Expand"} & {node.op_type for node in graph.node}, "TensorRT wants shapes and biases as constants"


class Shapes(nn.Module):
    """Outputs of every nesting, an input that is never read, and an output called like an input."""

    def forward(self, x, unused=None, y=None):
        return {"x": x * 2, "nested": (y + 1, [x.sum()]), "count": (x > 0).sum()}


def test_names_of_outputs_are_their_paths_and_never_those_of_inputs(make, inputs, tmp_path):
    model = make(Shapes())
    model.dtype = "float32"
    given = inputs("x:float32[N,4]", "unused:float32[N,2]", "y:float32[N,4]", dims={"N": 2})
    path = onnx.export(model, given, tmp_path / "m.onnx", {"N": (1, 8)})
    graph = onnx_library.load(path).graph
    assert [v.name for v in graph.output] == ["x_out", "nested.0", "nested.1.0", "count"]
    held = [v.name for v in graph.input]
    assert set(held) >= {"x", "y"}
    assert ("unused" in held) != any("does not take unused" in note for note in model.notes)


def test_a_bare_tensor_is_called_output_and_a_tuple_by_number(make, inputs, tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    given = inputs("x:float32[N,4]", dims={"N": 2})
    for module, names in ((nn.Linear(4, 2), ["output"]), (Two(), ["0", "1"])):
        path = onnx.export(make(module), given, tmp_path / "m.onnx")
        assert [v.name for v in onnx_library.load(path).graph.output] == names


def test_a_file_that_gives_another_answer_is_never_published(make, inputs, tmp_path, monkeypatch):
    real = onnx._write

    def wrong(program, path, *args):
        real(program, path, *args)
        held = onnx_library.load(path)
        weight = next(t for t in held.graph.initializer if "bias" in t.name or t.dims[:] == [8])
        values = onnx_library.numpy_helper.to_array(weight) + 0.05
        weight.CopyFrom(onnx_library.numpy_helper.from_array(values.astype(np.float32), weight.name))
        onnx_library.save(held, path)

    monkeypatch.setattr(onnx, "_write", wrong)
    with pytest.raises(GateFailed, match="'output' is off by"):
        onnx.export(make(nn.Linear(4, 8)), inputs("x:float32[N,4]", dims={"N": 3}), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_the_file_and_both_load(make, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_INLINE_BYTES", 100)
    path = onnx.export(make(nn.Linear(64, 64)), inputs("x:float32[N,64]", dims={"N": 3}), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 64 * 64 * 4
    assert session_of(path).run(None, {"x": np.zeros((3, 64), np.float32)})[0].shape == (3, 64)


def test_an_op_without_an_onnx_form_is_unsupported_with_the_exporters_reason(make, inputs, tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x)

    with pytest.raises(Unsupported) as caught:
        onnx.export(make(Odd()), inputs("x:float32[N,4]", dims={"N": 4}), tmp_path / "m.onnx")
    assert len(caught.value.message) < 500 and caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_cannot_be_exported_leaves_nothing(inputs, tmp_path):
    with pytest.raises(Unsupported):
        onnx.export(Model(form="torchscript", name="s"), inputs("x:float32[N,4]", dims={"N": 4}), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (torch.ones(3), torch.ones(3) * 1.0001, None),
        (torch.ones(3), torch.ones(3) * 1.01, "off by 0.01"),
        (torch.ones(3), torch.ones(4), "(4,), not"),
        (torch.ones(3), torch.ones(3).half(), "float16"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "NaN or Inf"),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("inf")]), None),
        (torch.zeros(3), torch.zeros(3), None),
        (torch.zeros(3), torch.full((3,), 1e-3), "off by"),
    ],
)
def test_differences_are_found_and_rounding_is_not(ours, theirs, reason):
    found = onnx._difference(ours, theirs, 1e-3)
    assert (found is None) if reason is None else (reason in found)
