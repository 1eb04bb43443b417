"""A call of a module as its own code makes it -> its tensors in order, and all the rest of it as a template that is part of what is built.

Backends take and give tensors. Real calls pass `return_dict=False`, dicts of tensors, None; and give dataclasses back. `Fixed` is a module with the constants
of one call written into it, from tensors to tensors; `Shape` of its outputs puts the nest around them again.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

MAX_TENSORS = 24
"""Of one call: `Fixed.forward` names them, as files of inputs do."""

Template = tuple[Any, ...]
"""("t", index) for a tensor, ("c", type, value) for a constant, (container, keys, templates) for a nest: plain tuples, which can be compared, traced and saved."""

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, enum.Enum)


class NotPlain(Exception):
    """What in a call is neither a tensor, a constant nor a plain container of them."""


def taken(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], Template]:
    """The tensors of a call in order, and its template. Raises NotPlain: a cache or any other object may be changed by the call, and is no input."""
    tensors: list[torch.Tensor] = []
    return tensors, _taken((tuple(args), dict(kwargs)), tensors)


def _taken(value: Any, tensors: list[torch.Tensor]) -> Template:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise NotPlain(f"a {value.layout} tensor")
        tensors.append(value)
        return ("t", len(tensors) - 1)
    kind = type(value)
    if kind in (tuple, list):
        return (kind.__name__, None, tuple(_taken(item, tensors) for item in value))
    if kind in (dict, OrderedDict):
        return ("dict", tuple(value), tuple(_taken(item, tensors) for item in value.values()))
    if isinstance(value, _CONSTANTS):
        return ("c", kind.__name__, value)
    raise NotPlain(f"a {kind.__name__}")


def filled(template: Template, tensors: Sequence[torch.Tensor]) -> Any:
    """The value again."""
    kind = template[0]
    if kind == "t":
        return tensors[template[1]]
    if kind == "c":
        return template[2]
    items = [filled(item, tensors) for item in template[2]]
    if kind == "dict":
        return dict(zip(template[1], items, strict=True))
    return tuple(items) if kind == "tuple" else items


class Fixed(nn.Module):
    """`module` called as in one template: tensors in, its output's tensors out, as a tuple."""

    def __init__(self, module: nn.Module, template: Template) -> None:
        super().__init__()
        self.module = module
        self.template = template

    @property
    def config(self) -> Any:
        """Of the module, which some changes read."""
        return getattr(self.module, "config", None)

    # fmt: off
    def forward(
        self, t0: Any = None, t1: Any = None, t2: Any = None, t3: Any = None, t4: Any = None, t5: Any = None, t6: Any = None, t7: Any = None,
        t8: Any = None, t9: Any = None, t10: Any = None, t11: Any = None, t12: Any = None, t13: Any = None, t14: Any = None, t15: Any = None,
        t16: Any = None, t17: Any = None, t18: Any = None, t19: Any = None, t20: Any = None, t21: Any = None, t22: Any = None, t23: Any = None,
    ) -> tuple[torch.Tensor, ...]:
        # fmt: on
        """At most MAX_TENSORS of them, by name because a file of inputs names them."""
        tensors = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18, t19, t20, t21, t22, t23)
        args, kwargs = filled(self.template, tensors)
        return tuple(leaf for leaf in pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a module's own output looks: its nest, and the dtype of each tensor."""

    nest: Any
    """torch's TreeSpec."""
    leaves: tuple[Any, ...]
    """A dtype where there is a tensor, else the constant itself."""

    @classmethod
    def of(cls, output: Any) -> Shape:
        """Raises NotPlain for an output that holds something else than tensors and constants."""
        leaves, nest = pytree.tree_flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_CONSTANTS)):
                raise NotPlain(f"a {type(leaf).__name__}")
        return cls(nest=nest, leaves=tuple(_Typed(leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))

    def around(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The nest with these tensors in it, floating ones in the dtype the module itself gives. Raises ValueError for another number of them."""
        wanted = sum(isinstance(leaf, _Typed) for leaf in self.leaves)
        if len(outputs) != wanted:
            raise ValueError(f"{len(outputs)} tensors, where the module gives {wanted}")
        rest = iter(outputs)
        leaves = [_as(next(rest), leaf.dtype) if isinstance(leaf, _Typed) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.nest)


@dataclass(frozen=True, slots=True)
class _Typed:
    dtype: torch.dtype


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.dtype != dtype and tensor.is_floating_point() else tensor


def text(tensors: Sequence[torch.Tensor]) -> str:
    """What tells calls apart, for a reader: `float32[2,4,64,64] int64[]`."""
    return " ".join(f"{str(t.dtype).removeprefix('torch.')}[{','.join(str(d) for d in t.shape)}]" for t in tensors) or "no tensors"
