"""A module that is bound and streams nothing -> the same object as it was before, for as long as that is entered: plain eager, on the same host, in the same process. Imports torch.

What differs between the two is looked up, not known: attributes and hooks that binding left on the module, and where its parameters' values lie. Both are changed in place, so that a
thousand times back and forth cost milliseconds each, and everything else (the module's parts, the interpreter's caches of them, the allocator, the clocks) is the same for either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpuopt.pipeline.streamed import measured

_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
"""Whose entries stay: a parameter that had no values was replaced by one that has, and buffers move as a whole, as `module.to()` moves them."""
_MISSING = object()


@dataclass(slots=True, eq=False)
class _Change:
    """An entry of a module's attributes, or of a dictionary among them."""

    where: dict[Any, Any]
    key: Any
    before: Any
    after: Any

    def put(self, value: Any) -> None:
        if value is _MISSING:
            self.where.pop(self.key, None)
        else:
            self.where[self.key] = value


class Plain:
    """Made before a module is bound; `note` at once after it; `learn` when it is wanted; `entered` as often as wanted; `close` before the module is given back."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [(part, dict(vars(part)), _entries(part)) for part in module.modules()]
        self._changes: list[_Change] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Parameter, its values in memory of their own, and where binding laid them out."""
        self._is_known = False

    def note(self) -> None:
        """What binding left on the module. Before anything is called: what a call keeps on a module for the next one is no part of it, and is not taken from plain eager."""
        self._changes = []
        for part, own, entries in self._parts:
            self._changes += _changes(vars(part), own)
            for name, before in entries.items():
                now = vars(part).get(name)
                if isinstance(now, dict):
                    self._changes += _changes(now, before)

    def learn(self, moved: Iterable[torch.Tensor], *, apart: bool) -> None:
        """Where values lie. moved: parameters that binding laid out itself; with `apart` each gets memory of its own, which may raise torch.OutOfMemoryError."""
        self.close()
        if apart:
            with torch.inference_mode(False), torch.no_grad():
                distinct = {id(tensor): tensor for tensor in moved}
                self._values = [(tensor, tensor.data.clone(), tensor.data) for tensor in distinct.values()]
        self._is_known = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Nothing of the binding is left on the module within, and all of it is back after, whatever happens."""
        assert self._is_known, "learn comes first"
        try:
            for change in self._changes:
                change.put(change.before)
            self._point(own=True)
            yield
        finally:
            for change in self._changes:
                change.put(change.after)
            self._point(own=False)

    def close(self) -> None:
        """Let the memory go; `learn` takes it again. Harmless twice."""
        self._values, self._is_known = [], False

    @property
    def is_known(self) -> bool:
        """Between `learn` and `close`."""
        return self._is_known

    @torch.inference_mode(False)
    @torch.no_grad()
    def _point(self, *, own: bool) -> None:
        for tensor, mine, bound in self._values:
            tensor.data = mine if own else bound


@contextmanager
def plainly(plain: Plain, bound: Any, device: str) -> Iterator[bool]:
    """`plain` of a module that is bound to a CUDA device may be entered within. Enters as whether its weights are its own, for which the device needs room."""
    plan, known = bound.plan, dict(bound.module.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        stack.enter_context(measured.let_out(plan, device))  # plain eager is no part of the plan that the allocator is held to
        stack.callback(plain.close)
        apart = plan.ledger.residents <= measured.ROOM * torch.cuda.mem_get_info(device)[0]
        plain.learn((known[place.name] for unit in plan.anatomy.units for place in unit.places), apart=apart)
        yield apart


def _entries(part: nn.Module) -> dict[str, dict[Any, Any]]:
    """Dictionaries among its attributes, hooks for the most part, as they are now."""
    return {name: dict(value) for name, value in vars(part).items() if isinstance(value, dict) and name not in _TABLES}


def _changes(now: dict[Any, Any], before: dict[Any, Any]) -> list[_Change]:
    keys = dict.fromkeys((*before, *now))
    pairs = ((key, before.get(key, _MISSING), now.get(key, _MISSING)) for key in keys)
    return [_Change(now, key, old, new) for key, old, new in pairs if old is not new]
