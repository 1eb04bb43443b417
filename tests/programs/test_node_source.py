"""What exporters write beside a node, read back: the real forms, and files that carry anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.programs.node_source import NodeSource, read

SCOPES, CLASSES, STACK = (f"pkg.torch.onnx.{key}" for key in ("name_scopes", "class_hierarchy", "stack_trace"))


def test_the_dynamo_exporters_metadata_names_module_class_op_and_line() -> None:
    stack = (
        'File "/opt/gpuopt/programs/export.py", line 73, in forward\n    return own(*args, **kwargs)\n'
        'File "/venv/site-packages/transformers/models/bert/modeling_bert.py", line 314, in forward\n    self.self(\n'
        'File "/venv/site-packages/transformers/models/bert/modeling_bert.py", line 177, in forward\n    value = self.value(x)\n'
        'File "/venv/site-packages/torch/nn/modules/linear.py", line 125, in forward\n    return F.linear(x)'
    )
    metadata = {
        SCOPES: "['', 'encoder', 'encoder.layer.0', 'encoder.layer.0.value', 'linear_2']",
        CLASSES: "['m.Bert', 'm.Encoder', 'm.Layer', 'torch.nn.modules.linear.Linear', 'aten.linear.default']",
        STACK: stack,
    }
    assert read("node_MatMul_7", "MatMul", metadata) == NodeSource(
        module="encoder.layer.0.value", module_class="Linear", line="modeling_bert.py:177", op="aten.linear.default"
    )


def test_a_library_function_is_a_tool_and_the_forward_that_calls_it_is_the_model() -> None:
    frames = [("/m/modeling.py", 10, "forward"), ("/m/modeling.py", 20, "helper"), ("/lib/sdpa.py", 5, "attention")]
    stack = "".join(f'File "{path}", line {line}, in {function}\n' for path, line, function in frames)
    assert read("n", "MatMul", {STACK: stack}).line == "modeling.py:20"


def test_what_the_root_itself_does_has_the_empty_name() -> None:
    assert read("n", "Add", {SCOPES: "['', 'add']"}).module == ""
    assert read("n", "Add", {SCOPES: "['add']"}).module == ""


def test_the_second_call_of_a_module_is_the_same_module() -> None:
    assert read("n", "Add", {SCOPES: "['', 'layer@1', 'layer@1.norm', 'add']"}).module == "layer.norm"


def test_a_product_that_took_up_its_batch_norm_belongs_to_the_module_that_holds_its_weight() -> None:
    metadata = {
        SCOPES: "['', 'stem', 'stem.normalization', 'bn']",
        CLASSES: "['R', 'S', 'BatchNorm2d', 'aten._native_batch_norm_legit_no_training.default']",
    }
    assert read("n", "Conv", metadata, ["x", "stem.convolution.weight", "b"]).module == "stem.convolution"
    assert read("n", "Conv", metadata, ["x", "val_3"]).module == "stem.normalization"
    assert read("n", "BatchNormalization", metadata, ["x", "stem.normalization.weight"]).module == "stem.normalization"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/encoder/layer.0/attention/self/query/MatMul", "encoder.layer.0.attention.self.query"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/features/features.0/features.0.1/BatchNormalization", "features.0.1"),
        ("/Gather_3", ""),
        ("Conv_12", None),
        ("", None),
    ],
)
def test_the_older_exporters_names_are_paths_of_scopes(name: str, module: str | None) -> None:
    assert read(name, "Conv", {}).module == module


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_no_text_in_a_file_breaks_it(scopes: str, classes: str, stack: str) -> None:
    for text in (scopes, f"[{scopes}]", f"['', {scopes!r}, 'x']"):
        found = read("n", "Conv", {SCOPES: text, CLASSES: classes, STACK: stack})
        assert found.module is None or isinstance(found.module, str)


def test_a_bomb_of_brackets_is_no_list() -> None:
    assert read("n", "Conv", {SCOPES: "[" * 50_000}).module is None
    assert read("n", "Conv", {SCOPES: "['a'," * 2_000_000}).module is None
