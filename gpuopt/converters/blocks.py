"""nn.Module -> its submodules whose own forward FX can read, innermost first, each as a graph in which layers are single nodes; and a changed graph back into its place.

A block keeps its object, its class name, its submodules and their names: only `forward` is new. So a profile still names the model's own modules, and isinstance still holds.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

DROPOUTS: tuple[type[nn.Module], ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_IN_PLACE = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem})


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A module and the graph of its forward; paths in it (`call_module` targets) start at the module."""

    name: str
    module: nn.Module
    graph: fx.Graph

    def layer(self, node: Any) -> nn.Module | None:
        """The module a node calls; None where it calls none, or one with hooks, whose call is more than its forward."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self.module.get_submodule(str(node.target))
        return None if _is_hooked(module) else module

    def is_own(self, node: Any) -> bool:
        """The module a node calls is called nowhere else in this block, and its weights are its own: another may take its place."""
        layer = self.layer(node)
        calls = sum(n.op == "call_module" and n.target == node.target for n in self.graph.nodes)
        return layer is not None and calls == 1 and not hasattr(layer, "parametrizations")

    def source(self, node: Any, through: tuple[type[nn.Module], ...] = ()) -> Any:
        """Where a value comes from, past modules that hand it on in eval mode and `through`. None where anybody else reads it on the way."""
        while isinstance(node, fx.Node) and len(node.users) == 1:
            layer = self.layer(node)
            if not (type(layer) is nn.Identity or (isinstance(layer, DROPOUTS) and not layer.training) or type(layer) in through):
                return node
            node = node.args[0] if node.args else None
        return None

    def is_written(self, value: Any, after: fx.Node, before: fx.Node) -> bool:
        """Whether anything between two nodes writes into this value in place, as far as its direct readers show."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        return any(order[after] < order[user] < order[before] and self._writes(user) for user in value.users)

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module.get_submodule(str(node.target)), "inplace", False))
        if node.op == "call_function":
            by_name = getattr(node.target, "__name__", "").endswith("_")
            return node.target in _IN_PLACE or by_name or bool(node.kwargs.get("inplace"))
        return node.op == "call_method" and str(node.target).endswith("_")

    def rewrite(self) -> None:
        """Put the graph in the place of the module's forward."""
        self.graph.lint()
        old = type(self.module)
        forward = type(fx.GraphModule(self.module, self.graph)).forward
        names = {"forward": forward, "__module__": old.__module__, "__qualname__": old.__qualname__, "__doc__": old.__doc__}
        self.module.__class__ = type(old.__name__, (old,), names)


def blocks(root: nn.Module, holding: type[nn.Module], leaves: Callable[[nn.Module], bool] = lambda module: False) -> Iterator[Block]:
    """Blocks that hold a module of exactly this type, innermost first; each is read when it is asked for, so changes to those before it are seen.

    Passed over: a forward of more than one parameter (which branch an optional one takes is not known) and one that FX cannot follow (its control flow depends on
    values or shapes). What is around such a one takes it as one node, as it does hooked modules, whose hooks would not run otherwise, and `leaves`.
    """
    closed: set[int] = set()
    """ids of modules that FX could not follow"""

    class Tracer(fx.Tracer):
        def __init__(self, *, is_wary: bool) -> None:
            super().__init__()
            self.is_wary = is_wary

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            is_closed = id(m) in closed or leaves(m) or _is_hooked(m) or (self.is_wary and not _has_one_parameter(m))
            return is_closed or super().is_leaf_module(m, module_qualified_name)

    def read(module: nn.Module) -> fx.Graph | None:
        before = [(part, dict(part.__dict__)) for part in module.modules()]
        for is_wary in (False, True):
            try:
                return Tracer(is_wary=is_wary).trace(module)
            # The module's own code runs on symbols and may raise anything at all: its forward stays as it is then.
            except Exception:  # noqa: BLE001
                continue
            finally:  # a forward that keeps what it computed has kept symbols
                for part, attributes in before:
                    part.__dict__.clear()
                    part.__dict__.update(attributes)
        closed.add(id(module))
        return None

    for name in _innermost_first(root):
        module = root.get_submodule(name)
        is_held = any(type(part) is holding for part in module.modules())
        if not is_held or type(module) is holding or leaves(module) or not _has_one_parameter(module) or _is_replaced(module):
            continue
        graph = read(module)
        if graph is not None:
            yield Block(name=name, module=module, graph=graph)


def _innermost_first(root: nn.Module) -> list[str]:
    """Names of all modules, each after what it holds; a shared one once."""
    seen: set[int] = set()
    found: list[str] = []

    def visit(module: nn.Module, name: str) -> None:
        seen.add(id(module))
        for child, part in module.named_children():
            if id(part) not in seen:
                visit(part, f"{name}.{child}" if name else child)
        found.append(name)

    visit(root, "")
    return found


def _has_one_parameter(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or _is_replaced(module)


def _is_replaced(module: nn.Module) -> bool:
    """Its forward is not its class's: patched by somebody, or a script's."""
    return "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule)
