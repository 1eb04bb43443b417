"""Which line of the model's own code a counted op belongs to."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Ceilings, OpRecord
from gpuopt.profiling import lines
from gpuopt.profiling.attribute import attribute
from gpuopt.profiling.count import count, summarize
from gpuopt.profiling.roofline import points

HERE = Path(__file__).name
X = Inputs(args=(torch.zeros(2, 8),))


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 2  # the helper's line


def at(text: str) -> str:
    """`test_lines.py:N` of the only line of this file that holds this comment."""
    found = [n for n, line in enumerate(Path(__file__).read_text().splitlines(), start=1) if line.endswith(f"# {text}")]
    assert len(found) == 1, text
    return f"{HERE}:{found[0]}"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.product(x)  # the layer's product
        x = scaled(x)  # where it calls the helper
        return torch.relu(x)  # the layer's relu


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)  # first tanh
        x = self.layer(x)
        return torch.tanh(x)  # second tanh


def by_op(target: Any, inputs: Inputs = X) -> dict[str, str | None]:
    return {record.op: record.line for record in count(target, inputs).records}


def test_an_op_has_the_innermost_line_of_its_models_own_file_not_torchs() -> None:
    found = by_op(Layer())
    assert found["aten.addmm"] == at("the layer's product")
    assert found["aten.mul"] == at("the helper's line")
    assert found["aten.relu"] == at("the layer's relu")


def test_two_lines_that_no_trace_could_tell_apart_are_told_together() -> None:
    first, second = at("first tanh"), at("second tanh").rpartition(":")[2]
    assert by_op(Twice())["aten.tanh"] == f"{first},{second}"


def test_what_a_library_does_for_the_model_is_the_line_that_called_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "borrowed_attention.py").write_text("def attend(x):\n    return x.softmax(-1)\n")
    (tmp_path / "borrowed_model.py").write_text(
        "import torch\nfrom borrowed_attention import attend\n\n"
        "class Model(torch.nn.Module):\n    def forward(self, x):\n        return attend(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import borrowed_model  # type: ignore[import-not-found]

    try:
        assert by_op(borrowed_model.Model())["aten._softmax"] == "borrowed_model.py:6"
    finally:
        for name in ("borrowed_model", "borrowed_attention"):
            sys.modules.pop(name, None)


def test_a_model_made_of_torchs_modules_alone_has_no_line_and_its_callers_are_not_blamed() -> None:
    assert set(by_op(nn.Sequential(nn.Linear(8, 8), nn.ReLU())).values()) == {None}


def test_a_function_has_its_own_lines_though_no_module_is_there() -> None:
    assert by_op(scaled)["aten.mul"] == at("the helper's line")


def test_the_real_run_that_stands_in_for_fake_tensors_tells_lines_too() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum().item() > 0:
                return x
            return torch.tanh(x)  # after a value was read

    found = count(Reads(), X)
    assert "real run" in found.method
    assert {r.op: r.line for r in found.records}["aten.tanh"] == at("after a value was read")


def test_lines_of_several_files_are_joined_by_file() -> None:
    assert lines.joined(["a.py:3", "b.py:9", "a.py:5"]) == "a.py:3,5, b.py:9"
    assert lines.joined([]) is None


def test_the_walk_stops_at_the_models_call() -> None:
    def seen() -> str | None:
        return lines.outermost(lines.of_model)

    assert seen() is None
    assert lines.of_model() == f"{HERE}:{inspect.currentframe().f_lineno}"  # type: ignore[union-attr]


def test_a_record_keeps_the_line_of_its_count_and_what_each_kernel_took(timeline: Any) -> None:
    timeline.step(0, 900)
    timeline.module("", "Net", 1, 800)
    timeline.op("aten::mm", 10, 50, [[2, 4], [4, 8]])
    timeline.kernel("splitk", launch=15, start=300, dur=10)
    timeline.kernel("reduce", launch=18, start=310, dur=2)
    row = OpRecord(op="aten.mm", module="", dtype="float16", flops=128.0, bytes=1.0, shapes="2x4, 4x8", line="net.py:7")
    (record,) = attribute(timeline.trace(), summarize((row,), method="by hand"))
    (point,) = points([record], Ceilings(), cache_bytes=None)
    assert record.line == point.line == "net.py:7"
    assert [(k.name, k.time_ns, k.count) for k in point.kernels] == [("splitk", 10_000, 1), ("reduce", 2_000, 1)]


def test_two_files_with_the_same_code_at_the_same_lines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code objects are equal: Python does not compare file names."""
    names = ("twin_model_a", "twin_model_b")
    for name in names:
        (tmp_path / f"{name}.py").write_text(
            "import torch\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return torch.tanh(x)\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    models = [__import__(name).Model() for name in names]
    try:
        assert type(models[0]).forward.__code__ == type(models[1]).forward.__code__
        assert [by_op(model)["aten.tanh"] for model in models] == [f"{name}.py:5" for name in names]
    finally:
        for name in names:
            sys.modules.pop(name, None)
