"""A model's own nest survives a bundle, and a process that knows nothing of the model gets the nearest plain one; no bundle makes objects it may not make."""

from __future__ import annotations

import collections
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs
from gpuopt.pipeline import nests

MADE: list[str] = []


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None

    def __post_init__(self) -> None:
        MADE.append("Answer")


def modelled() -> Any:
    transformers = pytest.importorskip("transformers.modeling_outputs")
    return transformers.BaseModelOutputWithPooling(last_hidden_state=torch.ones(2, 3), pooler_output=torch.zeros(2))


X, Y = torch.arange(3.0), torch.ones(2)
OUTPUTS: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, [Y], None),
    "dict": {"b": X, "a": {"c": Y, "flag": True, "n": 3, "t": "text"}},
    "namedtuple": Pair(X, Pair(Y, None)),
    "dataclass": Answer(X, (Y, Y + 1)),
    "one tensor twice": {"x": X, "again": X},
    "of torch": torch.ones(3, 2).max(dim=0),
    "empty": {"x": X, "none": (), "also": []},
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return same(vars(one), vars(other)) if hasattr(one, "__dict__") else bool(one == other)


@pytest.mark.parametrize("name", [*OUTPUTS, "transformers"])
def test_named_tensors_come_back_in_the_nest_of_the_model(name: str, tmp_path: Path) -> None:
    outputs = modelled() if name == "transformers" else OUTPUTS[name]
    nest = nests.of(outputs)
    if name == "of torch":
        assert nest is None, "its class takes its parts in one sequence: as it came is what it stays"
        return
    assert nest is not None
    nests.write(nest, tmp_path)
    around = nests.Around(nests.read(tmp_path / nests.FILE), may_construct=True)
    from gpuopt.accuracy import compare

    named = compare.flatten(outputs)
    in_order = tuple(tensor for _, tensor in named)
    for given in (dict(named), in_order):
        assert same(outputs, around(given)), around(given)


def test_a_class_that_is_not_here_comes_as_a_plain_one_of_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = nests.of(Pair(X, Answer(Y, None)))
    assert nest is not None
    monkeypatch.delitem(sys.modules, __name__, raising=False)
    found = nests.Around(nest, may_construct=True)((X, Y))
    assert found.first is X and found._fields == ("first", "second") and isinstance(found, tuple)
    assert found.second == {"logits": Y, "hidden": None}


def test_a_bundle_of_mere_data_makes_no_dataclass_and_imports_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = nests.of(Answer(X, None))
    assert nest is not None
    MADE.clear()
    assert nests.Around(nest, may_construct=False)((X,)) == {"logits": X, "hidden": None} and MADE == []
    for named in ("antigravity:Answer", "os:system", "builtins:eval", "transformers:nothing", "torch:load"):
        for kind in ("dataclass", "mapping", "namedtuple"):
            node = nests.Node(kind=kind, count=1, type=named)
            hostile = nests.Nest(nodes=(node, nests.Node(kind="tensor", key="a", place=0)), names=("a",))
            found = nests.Around(hostile, may_construct=True)((X,))
            assert isinstance(found, (dict, tuple)), named
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (nests.Node(kind="list", count=2), nests.Node(kind="tensor")),
        (nests.Node(kind="list", count=-1),),
        (nests.Node(kind="tensor", place=7),),
        (nests.Node(kind="tensor", place=-1),),
    ],
)
def test_a_file_that_holds_no_nest_is_refused_when_it_is_read(nodes: tuple[nests.Node, ...], tmp_path: Path) -> None:
    nests.write(nests.Nest(nodes=nodes, names=("a",)), tmp_path)
    with pytest.raises(BadInput):
        nests.read(tmp_path / nests.FILE)


def test_outputs_that_do_not_fit_come_as_they_are() -> None:
    nest = nests.of(Pair(X, Y))
    assert nest is not None
    assert nests.Around(nest, may_construct=True)({"only": X}) == {"only": X}


def test_what_only_the_model_can_make_is_no_nest() -> None:
    assert nests.of({"x": X, "cache": object()}) is None
    assert nests.of({1: X}) is None


def test_a_nest_is_found_without_running_the_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            assert x.device.type == "meta" or type(x).__name__ == "FakeTensor"
            return collections.OrderedDict(logits=self.last(x), loss=None)

    found = nests.of_call(Net(), Inputs(args=(torch.ones(3, 4),)))
    assert found is not None and [n.key for n in found.nodes] == ["", "logits", "loss"]

    class Refuses(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return self.last(x) if bool(x.sum() > 0) else x

    assert nests.of_call(Refuses(), Inputs(args=(torch.ones(3, 4),))) is None
