"""One call of a unit -> what it gives, and whether replaying it would give the same: a replay repeats kernels on addresses, and no Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpuopt.streaming.arguments import Layout, Refused, filled, flat

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
_ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Results of a call that can be replayed."""

    spec: Any
    """As `arguments.flat`."""
    passed: tuple[int | None, ...]
    """Of each tensor in it: the argument that it is, where it is one."""
    places: tuple[int, ...]
    """Of those that are new: which they are."""
    layouts: tuple[Layout, ...]
    """Theirs."""


def look(
    module: nn.Module,
    call: Callable[..., Any],
    plain: Callable[..., Any],
    args: Any,
    kwargs: Any,
    given: Sequence[torch.Tensor],
    spec: Any,
    layouts: tuple[Layout, ...],
    device: torch.device,
    storages: set[int],
) -> tuple[Any, Look | str]:
    """(what `call` gave, a Look or why a replay would not do).

    Parameters
    ----------
    plain: the forward before it was compiled, which shows what it does; called on copies.
    given, spec, layouts: the tensors of args and kwargs, and the rest of them, as `arguments.flat`.
    storages: addresses of what lies where it lies as long as there are graphs: parameters and buffers.
    """
    try:
        copies = [layout.copy(tensor) for layout, tensor in zip(layouts, given, strict=True)]
    except Refused as why:
        return call(*args, **kwargs), f"it is called with {why}"
    state, drawn = list(_attributes(module)), _drawn(device)
    outputs = call(*args, **kwargs)
    reason = _changed(state, list(_attributes(module)))
    if not reason and not torch.equal(drawn, _drawn(device)):
        reason = "it draws random numbers"
    # Kernels that are launched past PyTorch show here alone.
    if not reason and not all(_same(tensor, copied) for tensor, copied in zip(given, copies, strict=True)):
        reason = "it writes into its arguments"
    if reason:
        return outputs, reason
    result = _results(outputs, given, {t.untyped_storage().data_ptr() for t in given} | storages, device)
    if isinstance(result, str):
        return outputs, result
    # A call of its own: compiled code does not run under a watch, so the forward's own results would be another kernel's. It ends before the first operation that is against it.
    static_args, static_kwargs = filled(spec, copies)
    try:
        with _Watch({t.untyped_storage().data_ptr() for t in copies} | storages, device):
            plain(*static_args, **static_kwargs)
    except _Against as why:
        return outputs, str(why)
    return outputs, result


def _results(outputs: Any, given: Sequence[torch.Tensor], known: set[int], device: torch.device) -> Look | str:
    found: list[torch.Tensor] = []
    try:
        spec = flat(outputs, found)
        layouts = [Layout.of(tensor, device) for tensor in found]
        if any(layout.overlaps for layout in layouts):
            raise Refused("a tensor whose elements overlap in memory")
    except Refused as why:
        return f"it returns {why}"
    passed = tuple(next((i for i, argument in enumerate(given) if is_same(tensor, argument)), None) for tensor in found)
    places = tuple(place for place, index in enumerate(passed) if index is None)
    addresses = [address for place in places if (address := found[place].untyped_storage().data_ptr())]
    if known & set(addresses):
        return "it returns a view of an argument or a weight"
    if len(set(addresses)) < len(addresses):
        return "it returns several views of the same memory"
    return Look(spec=spec, passed=passed, places=places, layouts=tuple(layouts[place] for place in places))


def is_same(tensor: torch.Tensor, argument: torch.Tensor) -> bool:
    """The same object, or what compiled code hands out for it."""
    if tensor is argument:
        return True
    at = tensor.data_ptr()
    return bool(at) and (at, tensor.shape, tensor.stride(), tensor.dtype) == (
        argument.data_ptr(),
        argument.shape,
        argument.stride(),
        argument.dtype,
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    words = _WORDS.get(one.element_size())
    if words is None:
        one, other, words = torch.view_as_real(one), torch.view_as_real(other), torch.int64
    return torch.equal(one.view(words), other.view(words))


def _drawn(device: torch.device) -> torch.Tensor:
    """Where the generator stands."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


_Attribute = tuple[str, str, Any, tuple[Any, ...]]
"""(module, attribute, value, what is in it where it is a container)."""


def _attributes(module: nn.Module) -> Iterator[_Attribute]:
    """All that forwards could set or put something into."""
    for prefix, each in module.named_modules():
        for name, value in (*vars(each).items(), *each._buffers.items()):
            yield prefix, name, value, _contents(value)


def _contents(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return tuple(value) if isinstance(value, list | set | deque) else ()


def _changed(before: Sequence[_Attribute], after: Sequence[_Attribute]) -> str:
    was = {(prefix, name): (value, contents) for prefix, name, value, contents in before}
    for prefix, name, value, contents in after:
        old, held = was.get((prefix, name), (_same, ()))
        same = _unchanged(old, value) and len(held) == len(contents) and all(map(_unchanged, held, contents))
        if not same:
            return f"it sets {f'{prefix}.' if prefix else ''}{name}, and a replay runs no Python"
    return ""


def _unchanged(old: Any, value: Any) -> bool:
    return old is value or (type(old) is type(value) and isinstance(value, int | float | str) and bool(old == value))


class _Against(BaseException):
    """Why a replay would not do. Not for a forward to catch."""


class _Watch(TorchDispatchMode):
    """Looks at each operation that a call dispatches. Raises _Against before one that a replay could not repeat."""

    supports_higher_order_operators = True

    def __init__(self, known: set[int], device: torch.device) -> None:
        """known: addresses of storages that a replay may read: arguments, parameters and buffers."""
        super().__init__()
        self._known = known
        self._made: set[int] = set()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._refuse(func, args, kwargs)
        found = func(*args, **kwargs)
        made = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        if func.overloadpacket in _COPIES and len({t.device.type for t in (*_tensors(args, kwargs), *made)}) > 1:
            raise _Against(f"{func} copies between the host and the device")
        for tensor in made:
            if type(tensor) is torch.Tensor and (address := tensor.untyped_storage().data_ptr()) not in self._known:
                self._made.add(address)
        return found

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            raise _Against(f"{func} cannot be looked into")
        if any(tag in func.tags for tag in _ASKS):
            raise _Against(f"{func} needs a value from the device")
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...), made a moment ago
            self._made |= {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)}
        for tensor in _tensors(args, kwargs):
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                raise _Against(f"it computes with a {type(tensor).__name__}")
            address = tensor.untyped_storage().data_ptr()
            if address and address not in self._made and (address not in self._known or tensor.device != self._device):
                raise _Against(f"{func} reads memory that is neither an argument nor a weight on the device")
        for index, declared in enumerate(func._schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                target = args[index] if index < len(args) else kwargs.get(declared.name)
                if any(tensor.untyped_storage().data_ptr() in self._known for tensor in _tensors(target)):
                    raise _Against(f"{func} writes into an argument or a weight")


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
