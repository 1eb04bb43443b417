"""Tests of what rules ask of a module: tensors and their owners, lines, pairs of layer and batch norm."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import evidence
from torch import nn

from gpuopt.doctor import modules, sources


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(4))
        self.bare = torch.ones(4)
        self.tables = {"a": [torch.ones(2), torch.ones(3)]}
        self.hidden = [nn.Linear(4, 4, bias=False)]
        self.reference = [self.fc]
        self.same = [self.fc.weight]
        self.name = "holder"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner(x)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bare if self.kept is not None else x + self.tables["a"][0].to(x.device)

    def unreached(self) -> torch.Tensor:
        return self.same[0]


def test_every_tensor_is_found_once_with_its_owner_and_kind() -> None:
    found = {(h.name, h.kind) for h in modules.tensors(Holder())}
    assert found == {
        ("fc.weight", "parameter"), ("fc.bias", "parameter"), ("kept", "buffer"), ("bare", "plain"), ("tables", "plain"), ("hidden", "unregistered"),
    }  # fmt: skip
    assert len(list(modules.tensors(Holder()))) == 7


@pytest.mark.parametrize(
    "odd",
    [
        nn.Module(),
        nn.LazyLinear(3),
        nn.LSTM(4, 4),
        nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()),
        nn.ParameterList([nn.Parameter(torch.ones(2))]),
        nn.Linear(3, 3, device="meta"),
        torch.jit.script(nn.Linear(3, 3)),
        torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_unusual_modules_are_walked_without_an_error(odd: nn.Module) -> None:
    assert all(h.tensor.numel() >= 0 for h in modules.tensors(odd))
    modules.own_dtype(odd)
    modules.norm_pairs(odd)
    assert modules.line(odd, "") is None or ":" in str(modules.line(odd, ""))


def test_lazy_parameters_have_no_shape_and_are_left_out() -> None:
    assert list(modules.tensors(nn.LazyLinear(3))) == []


def test_a_line_is_that_of_the_nearest_module_that_is_not_torchs_own() -> None:
    root = nn.Sequential(Holder())
    wanted = f"test_modules.py:{Holder.forward.__code__.co_firstlineno}"
    assert modules.line(root, "0.fc") == modules.line(root, "0") == wanted
    assert modules.line(root, "") is None


@pytest.mark.parametrize(
    ("asked", "stored", "runs"),
    [
        (None, "float32", "float32"),
        ("fp16", "float32", "float16"),
        ("tf32", "float64", "float32"),
        ("int8", "float32", "bfloat16"),
        ("w8", "float32", "bfloat16"),
        ("fp16", "int64", "int64"),
        ("made up", "float32", "float32"),
    ],
)
def test_the_dtype_it_runs_in_follows_the_candidates_precision(asked: str | None, stored: str, runs: str) -> None:
    assert modules.running(evidence(precision=asked), stored) == runs


@pytest.mark.parametrize(
    ("names", "around"),
    [(["layers.0.fc", "layers.1.fc"], "layers"), (["a.b", "a.b"], "a.b"), (["a.b", "a"], "a"), (["layers.1", "layers.10"], "layers"), (["a", "b"], ""), (["", "a"], "")],
)  # fmt: skip
def test_what_lies_around_several_modules_is_their_nearest_common_one(names: list[str], around: str) -> None:
    assert modules.common(names) == around


def test_a_namesake_of_another_library_is_not_torchs_class() -> None:
    other: Any = type("Linear", (nn.Module,), {})
    assert not modules.is_a(other(), "Linear")
    assert modules.is_a(type("MyLinear", (nn.Linear,), {})(2, 2), "Linear")


# -- uses of an attribute ---------------------------------------------------------------------------------------------------------


def test_a_read_in_a_method_that_forward_calls_is_a_use_and_others_are_not() -> None:
    bare = sources.uses(Holder(), "bare")
    assert bare is not None and [u.is_moved for u in bare] == [False] and bare[0].line.startswith("test_modules.py:")
    assert [u.is_moved for u in sources.uses(Holder(), "tables") or ()] == [True]
    assert [u.is_moved for u in sources.uses(Holder(), "kept") or ()] == [True]
    assert sources.uses(Holder(), "same") == ()


def test_without_source_nothing_is_claimed() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x + self.bare\n", space)
    assert sources.uses(space["Made"](), "bare") is None
    assert modules.line(space["Made"](), "") is None or "<string>" not in str(modules.line(space["Made"](), ""))


def test_a_forward_that_was_replaced_on_the_instance_is_no_obstacle() -> None:
    model = Holder()
    model.forward = functools.partial(Holder.forward, model)  # type: ignore[method-assign]
    assert sources.uses(model, "bare")


# -- pairs ------------------------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if float(x.sum()) > 0 else x


class Storing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.conv(x)
        return self.norm(self.last)


def pair(**changes: Any) -> nn.Sequential:
    given = {"layer": nn.Conv2d(2, 4, 1), "norm": nn.BatchNorm2d(4), **changes}
    return nn.Sequential(*given.values()).eval()


def test_pairs_are_found_in_a_sequence_in_untraceable_and_in_nested_modules() -> None:
    assert modules.norm_pairs(pair()) == [("0", "1")]
    assert modules.norm_pairs(Branching().eval()) == [("conv", "norm")]
    assert modules.norm_pairs(nn.Sequential(pair(), pair())) == [("0.0", "0.1"), ("1.0", "1.1")]


def test_tracing_leaves_nothing_behind_in_the_users_model() -> None:
    model = Storing().eval()
    assert modules.norm_pairs(model) == [("conv", "norm")]
    assert not hasattr(model, "last")


@pytest.mark.parametrize(
    "model",
    [
        pair().train(),
        pair(norm=nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval(),
        pair(norm=nn.LayerNorm(4)),
        pair(layer=nn.ConvTranspose2d(2, 4, 1, groups=2)),
    ],
    ids=["training", "no statistics", "relu between", "layer norm", "grouped transposed"],
)
def test_what_cannot_be_folded_is_no_pair(model: nn.Module) -> None:
    assert modules.norm_pairs(model) == []


def test_a_batch_norm_used_twice_or_a_hooked_layer_is_no_pair() -> None:
    shared = nn.BatchNorm2d(2)
    assert modules.norm_pairs(nn.Sequential(nn.Conv2d(2, 2, 1), shared, nn.Conv2d(2, 2, 1), shared).eval()) == []
    hooked = pair()
    hooked[0].register_forward_hook(lambda m, a, o: o)
    assert modules.norm_pairs(hooked) == []


def test_nested_outputs_are_named() -> None:
    value = {"a": (torch.ones(1), [torch.ones(1)]), "b": SimpleNamespace()}
    assert [name for name, _ in modules.given(value)] == ["a[0]", "a[1][0]"]
