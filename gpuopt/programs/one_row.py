"""A graph that torch.compile traced -> the same graph, its products of one row in `gpuopt::matvecs`: those of the same row in one launch.

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

from gpuopt.programs.ops import matvec
from gpuopt.programs.passes import PreGrad

_LINEAR = (F.linear, torch.ops.aten.linear.default)
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
            for start in range(0, len(products), matvec.MOST):
                part = products[start : start + matvec.MOST]
                if sum(_bytes(_weight(product)) for product in part) >= self._least:
                    self._join(graph, part)

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


def _weight(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def _value(node: Any) -> Tensor | None:
    """What it was while traced, where its sizes are known."""
    found = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) and all(isinstance(size, int) for size in found.shape) else None


def _bytes(node: Any) -> int:
    value = _value(node)
    return math.prod(value.shape) * value.element_size() if value is not None else 0
