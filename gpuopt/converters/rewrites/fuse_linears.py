"""nn.Module + inputs -> the same module in which linear layers that read one tensor are one product: query, key and value; gate and up of a gated MLP.

Which layers those are is seen, not guessed: in a run on fake tensors, siblings that are given the very same tensor in every call of their parent form a group. Their
weights are put on top of each other in one nn.Linear, named after all of them, and each sibling's output is a slice of its output: the same FLOPs in one launch.

Within a call of the parent, its code meets a stand-in for `self` (`_Call`) that computes the product when the first sibling is called, and hands out the slices. What was
computed lives as long as that call and is known by the tensor it was computed from: no call can see another's, whichever thread makes it, and no graph keeps it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from gpuopt.converters.rewrites import dry
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs

WHAT = "make one product of linear layers that read the same tensor: query, key and value; gate and up"
APPROXIMATE = False
SETTINGS: tuple[str, ...] = ()

Group = tuple[str, ...]
"""Names of siblings, as their parent calls them."""


def applies(module: nn.Module) -> str | None:
    """None where some module holds two linear layers of one width of input. Whether they read the same tensor shows when it runs."""
    for part in module.modules():
        widths = [child.in_features for child in part.children() if type(child) is nn.Linear]
        if len(widths) > len(set(widths)) and _may_hold(part):
            return None
    return "no module holds two linear layers that could read the same tensor"


def apply(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
    """Fuse every group, in place. Raises Unsupported without inputs, where no group is found, and where the model does not run with its groups fused."""
    if inputs is None:
        raise Unsupported("without inputs it cannot be seen which linear layers read the same tensor", fix="--input 'name:dtype[dims]'")
    users = _users(module)
    found = {
        name: groups
        for name, seen in _seen(module, inputs).items()
        if (groups := list(_fusable(module.get_submodule(name), seen, users))) and _may_hold(module.get_submodule(name))
    }
    if not found:
        raise Unsupported("no two linear layers of one module read the same tensor alone", fix="leave --rewrite fuse_linears out")
    for name, groups in found.items():
        _fuse(module.get_submodule(name), groups)
    try:
        dry.run(module, inputs)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Unsupported(
            f"the model's own code does not go with fused linear layers: {reason}", fix="leave --rewrite fuse_linears out"
        ) from error
    kinds = dict.fromkeys(group for groups in found.values() for group in groups)
    layers = sum(len(group) for groups in found.values() for group in groups)
    products = sum(len(groups) for groups in found.values())
    told = ", ".join("+".join(kind) for kind in list(kinds)[:4]) + (", …" if len(kinds) > 4 else "")
    return f"{layers} linear layers became {products} products: {told}"


# -- seeing -----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Frame:
    """One call of a module that is running."""

    name: str
    read: dict[str, Any] = field(default_factory=dict)
    """Linear child -> what it was given: the tensor, and how often it had been written to."""


def _seen(module: nn.Module, inputs: Inputs) -> dict[str, set[Group]]:
    """Parent -> groups of its linear children that were given the same tensor, the same groups in each of its calls."""
    calls: dict[str, list[set[Group]]] = {}
    running: list[_Frame] = []

    def watched(twin: nn.Module) -> None:
        calls.clear()
        running.clear()
        for name, part in twin.named_modules():
            if type(part) is nn.Linear:
                part.register_forward_pre_hook(functools.partial(read, name), with_kwargs=True)
            else:
                part.register_forward_pre_hook(functools.partial(enter, name))
                part.register_forward_hook(leave)

    def enter(name: str, part: nn.Module, args: Any) -> None:
        running.append(_Frame(name))

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        frame = running.pop()
        groups: dict[Any, list[str]] = {}
        for child, (tensor, version) in frame.read.items():
            groups.setdefault((id(tensor), version), []).append(child)
        if frame.read:
            calls.setdefault(frame.name, []).append({tuple(group) for group in groups.values() if len(group) > 1})

    def read(name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        parent, _, own = name.rpartition(".")
        tensor = args[0] if len(args) == 1 and not kwargs else None
        if running and running[-1].name == parent and isinstance(tensor, torch.Tensor):
            before = running[-1].read.get(own)
            is_same = before is None or before[0] is tensor
            running[-1].read[own] = (tensor, tensor._version) if is_same else (object(), -1)  # given two: in no group

    dry.run(module, inputs, watched)
    return {name: set.intersection(*seen) for name, seen in calls.items()}


def _users(module: nn.Module) -> dict[int, int]:
    """Memory of a parameter -> under how many names it is used."""
    users: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        users[_memory(parameter)] = users.get(_memory(parameter), 0) + 1
    return users


def _memory(tensor: torch.Tensor) -> int:
    return id(tensor) if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def _may_hold(parent: nn.Module) -> bool:
    """Whether its forward is plain Python of its class, which can be run with a stand-in for `self`."""
    own = type(parent)
    copies = [getattr(own, name, None) is not getattr(nn.Module, name, None) for name in ("__deepcopy__", "__copy__")]
    return (
        isinstance(own.forward, types.FunctionType)
        and "forward" not in vars(parent)
        and not isinstance(parent, torch.jit.ScriptModule | fx.GraphModule)
        and not any(copies)
        and own.__reduce_ex__ is object.__reduce_ex__
    )


def _fusable(parent: nn.Module, groups: set[Group], users: dict[int, int]) -> Iterator[Group]:
    """The groups without those layers that somebody else uses, watches or has another dtype, sorted as the parent holds them."""
    order = {name: index for index, name in enumerate(parent._modules)}
    for group in sorted(groups, key=lambda g: order[g[0]]):
        alike: dict[Any, list[str]] = {}
        for name in sorted(group, key=order.__getitem__):
            layer: Any = parent.get_submodule(name)
            hooked = any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))
            plain = not hooked and not hasattr(layer, "parametrizations") and "forward" not in vars(layer)
            if plain and all(users[_memory(p)] == 1 for p in layer.parameters()):
                alike.setdefault((layer.weight.dtype, layer.weight.device, layer.weight.requires_grad, layer.training), []).append(name)
        yield from (tuple(names) for names in alike.values() if len(names) > 1)


# -- fusing -----------------------------------------------------------------------------------------------------------------------


def _fuse(parent: nn.Module, groups: list[Group]) -> None:
    parts: dict[str, tuple[str, int]] = {}
    sizes: dict[str, list[int]] = {}
    for group in groups:
        layers: list[nn.Linear] = [getattr(parent, name) for name in group]
        name = "_".join(group)
        while hasattr(parent, name):
            name += "_"
        fused = _stacked(layers)
        for own in group:
            delattr(parent, own)
        parent.add_module(name, fused)
        sizes[name] = [layer.out_features for layer in layers]
        parts |= {own: (name, index) for index, own in enumerate(group)}
    vars(parent).update(_gpuopt_parts=parts, _gpuopt_sizes=sizes, _gpuopt_methods=_methods(type(parent)) - vars(parent).keys())
    parent.__class__ = _with_parts(type(parent))  # type: ignore[arg-type]  # mypy takes Module's own __hash__ for the class's


def _stacked(layers: list[nn.Linear]) -> nn.Linear:
    """One layer that computes all of them; a layer without bias among those with one adds zeros."""
    first = layers[0]
    has_bias = any(layer.bias is not None for layer in layers)
    fused = nn.Linear(
        first.in_features, sum(layer.out_features for layer in layers), bias=has_bias, device="meta", dtype=first.weight.dtype
    )
    with torch.no_grad():
        weight = torch.cat([layer.weight.detach() for layer in layers])
        fused.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
        if has_bias:
            biases: list[torch.Tensor] = [
                layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features) for layer in layers
            ]
            fused.bias = nn.Parameter(torch.cat(biases), requires_grad=first.weight.requires_grad)
    return fused.train(first.training)


def _methods(own: type) -> frozenset[str]:
    """Methods that the parent's class adds to nn.Module's: one of them may call the layers, too, and then has to see their slices."""
    theirs = own.__mro__[: own.__mro__.index(nn.Module)]
    return frozenset(name for cls in theirs for name, value in vars(cls).items() if isinstance(value, types.FunctionType))


@functools.cache
def _with_parts(own: Any) -> Any:
    """A class like `own`, by name and by isinstance, whose forward runs with a `_Call` for `self`."""
    run = own.forward

    @functools.wraps(run)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(_Call(self), *args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        return _again, (own,), self.__getstate__()

    body = {
        "forward": forward,
        "__reduce_ex__": reduced,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    return type(own.__name__, (own,), body)


def _again(own: Any) -> Any:
    """For copy and pickle, which cannot find a class made at run time by its name."""
    made = _with_parts(own)
    return made.__new__(made)


class _Call:
    """`self` of one call of a parent: everything is the parent's but the fused layers, which are slices of products that live in here.

    Its methods are functions of the class bound to this, so that they see the slices, too. No `object.__getattribute__` and the like: torch.compile traces through here.
    """

    def __init__(self, parent: nn.Module) -> None:
        object.__setattr__(self, "parent", parent)
        object.__setattr__(self, "held", {})

    def __getattr__(self, name: str) -> Any:
        parent = self.__dict__["parent"]
        if name in parent._gpuopt_parts:
            return _Slice(self, name)
        if name in parent._gpuopt_methods:
            return functools.partial(getattr(type(parent), name), self)
        return getattr(parent, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["parent"], name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["parent"](*args, **kwargs)


class _Slice:
    """A fused layer, as the parent's code knows it: called with a tensor, or asked for its weight."""

    def __init__(self, call: Any, name: str) -> None:
        self.call = call
        self.fused, self.index = call.parent._gpuopt_parts[name]

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        held, parent = self.call.held, self.call.parent
        # Written to since: what was computed from it is old. Tensors of inference mode keep no count, and a graph being traced shows each write.
        version = 0 if torch.compiler.is_compiling() or input.is_inference() else input._version
        before = held.get(self.fused)
        if before is None or before[0] is not input or before[1] != version:
            outputs = torch.split(getattr(parent, self.fused)(input), parent._gpuopt_sizes[self.fused], dim=-1)
            before = held[self.fused] = (input, version, outputs)
        found: torch.Tensor = before[2][self.index]
        return found

    @property
    def weight(self) -> torch.Tensor:
        found: torch.Tensor = torch.split(getattr(self.call.parent, self.fused).weight, self.call.parent._gpuopt_sizes[self.fused])[
            self.index
        ]
        return found

    @property
    def bias(self) -> torch.Tensor | None:
        whole = getattr(self.call.parent, self.fused).bias
        return None if whole is None else torch.split(whole, self.call.parent._gpuopt_sizes[self.fused])[self.index]

    @property
    def in_features(self) -> int:
        return int(getattr(self.call.parent, self.fused).in_features)

    @property
    def out_features(self) -> int:
        return int(self.call.parent._gpuopt_sizes[self.fused][self.index])
