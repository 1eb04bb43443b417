"""A graph that torch.compile traced -> the same graph, its products of one row in `gpuopt::matvecs`: those of the same row in one launch. Two of them that are used as
`act(gate) * up` and not otherwise become that, in `gpuopt::gated_matvec`.

In Inductor's pre-grad pass and not in the module, as `programs/flex.py`: any module has it so, and the prefill, whose products have many rows, is left as it is. Only products
without a bias: a bias added afterwards would be rounded twice.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from gpuopt.programs.ops import gated_matvec, matvec
from gpuopt.programs.passes import PreGrad

_LINEAR = (F.linear, torch.ops.aten.linear.default)
_ACTS: dict[Any, str] = {
    **dict.fromkeys((F.silu, torch.ops.aten.silu, torch.ops.aten.silu.default), "silu"),
    **dict.fromkeys((F.gelu, torch.ops.aten.gelu, torch.ops.aten.gelu.default), "gelu"),
    **dict.fromkeys((F.relu, torch.relu, "relu", torch.ops.aten.relu, torch.ops.aten.relu.default), "relu"),
}
_MULTIPLIES = (operator.mul, torch.mul, "mul", torch.ops.aten.mul, torch.ops.aten.mul.Tensor)
_IN_PLACE = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv, operator.imod}
    | {operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.iconcat}
)
LEAST_BYTES = 1 << 20
"""Of the matrices of one launch: smaller products are left to Inductor, which fuses them with what lies around them."""


class OneRow(PreGrad):
    """A pre-grad pass. `num_changed`: products, `num_launches`: what they became. `takes`: of an input and a weight, `matvec.takes` but in tests."""

    def __init__(self, takes: Callable[[Tensor, Tensor], bool] = matvec.takes, least_bytes: int = LEAST_BYTES) -> None:
        self.num_changed = self.num_launches = 0
        self._takes, self._least = takes, least_bytes

    def __call__(self, graph: fx.Graph) -> None:
        together: dict[tuple[Any, int], list[fx.Node]] = {}
        num_written = 0
        written = {value for node in graph.nodes if _writes(node) for value in (*node.args[:1], node.kwargs.get("out"))}
        for node in graph.nodes:
            # Products move up to the first of their row, so nothing may be written in between: this graph still has operations that do.
            num_written += _writes(node)
            if node.op == "call_function" and node.target in _LINEAR and self._is_taken(node) and _weight(node) not in written:
                together.setdefault((node.args[0], num_written), []).append(node)
        for products in together.values():
            products = self._gated(graph, products)
            for start in range(0, len(products), matvec.MOST):
                part = products[start : start + matvec.MOST]
                if sum(_bytes(_weight(product)) for product in part) >= self._least:
                    self._join(graph, part)

    def _gated(self, graph: fx.Graph, products: list[fx.Node]) -> list[fx.Node]:
        """The others, after those of one row that are the two halves of a gated layer have become it, where the first of them was: all it reads is there, and its users are behind."""
        left = list(products)
        for gate in products:
            act = _only_user(gate)
            result, name = _only_user(act), _activation(act)
            if act is None or result is None or name is None or result.target not in _MULTIPLIES or result.kwargs or len(result.args) != 2:
                continue
            up = result.args[result.args[0] is act]
            if not isinstance(up, fx.Node) or up not in left or _only_user(up) is not result:
                continue
            pair = [product for product in products if product in (gate, up)]
            weights = [_weight(gate), _weight(up)]
            if _shape(weights[0]) != _shape(weights[1]) or sum(map(_bytes, weights)) < self._least:
                continue
            with graph.inserting_before(pair[0]):
                found = graph.call_function(torch.ops.gpuopt.gated_matvec.default, (pair[0].args[0], *weights, name))
            found.meta = dict(result.meta)
            result.replace_all_uses_with(found)
            for node in (result, act, *pair):
                graph.erase_node(node)
            left = [product for product in left if product not in pair]
            self.num_changed += 2
            self.num_launches += 1
        return left

    def _join(self, graph: fx.Graph, products: list[fx.Node]) -> None:
        row = products[0].args[0]  # now: where one product reads another, that one has been replaced
        with graph.inserting_before(products[0]):
            call = graph.call_function(torch.ops.gpuopt.matvecs.default, (row, [_weight(product) for product in products]))
            call.meta["example_value"] = [product.meta.get("example_value") for product in products]
            for place, product in enumerate(products):
                found = graph.call_function(operator.getitem, (call, place))
                found.meta = dict(product.meta)
                product.replace_all_uses_with(found)
        for product in products:
            graph.erase_node(product)
        self.num_changed += len(products)
        self.num_launches += 1

    def _is_taken(self, node: fx.Node) -> bool:
        given = {**dict(zip(("input", "weight", "bias"), node.args)), **node.kwargs}
        if not node.args or given.get("bias") is not None:
            return False
        held = given.get("weight")
        # The kernel reads weights before the kernel in front of it has ended: they must be the module's own, not what that one writes.
        if not isinstance(held, fx.Node) or held.op not in ("placeholder", "get_attr"):
            return False
        row, weight = _value(given["input"]), _value(held)
        return row is not None and weight is not None and self._takes(row, weight)


def _writes(node: fx.Node) -> bool:
    """Whether a tensor may be changed in place: `x.add_(1)`, `x += 1`, `x[0] = 1`, `out=`."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.split(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or "out" in node.kwargs or node.target in _IN_PLACE


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _activation(node: fx.Node | None) -> str | None:
    """The name that `gated_matvec` has for it, where it writes to nothing."""
    if node is None or node.target not in _ACTS:
        return None
    given = {**dict(zip(("inplace",), node.args[1:])), **node.kwargs}
    if given.get("inplace") or "out" in given:
        return None
    form = given.get("approximate", "none")
    name = _ACTS[node.target] if form == "none" else f"{_ACTS[node.target]}_{form}"
    return name if name in gated_matvec.ACTS else None


def _weight(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def _value(node: Any) -> Tensor | None:
    """What it was while traced, where its sizes are known."""
    found = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) and all(isinstance(size, int) for size in found.shape) else None


def _shape(node: Any) -> torch.Size | None:
    value = _value(node)
    return None if value is None else value.shape


def _bytes(node: Any) -> int:
    value = _value(node)
    return math.prod(value.shape) * value.element_size() if value is not None else 0
