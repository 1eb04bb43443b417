"""A unit and what computes it: its own forward, or that compiled, or graphs of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from gpuopt.streaming import guards

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Runs as it stands when somebody compiles around it: events are not for a graph."""
    found: _Function = torch.compiler.disable(function)
    return found


@dataclass(slots=True, eq=False)
class Stage:
    """A unit's forward, with the protocol around it."""

    name: str
    """`""` is the whole model."""
    module: nn.Module
    forward: Callable[..., Any]
    """The module's own."""
    call: Callable[..., Any]
    """What computes: `forward`, or what was made of it."""
    slot: torch.Tensor | None = None
    """None: the unit is resident."""


def compile_all(stages: Sequence[Stage], options: Mapping[str, Any]) -> Callable[[], None]:
    """`torch.compile` each. Gives what puts the compiler's own settings back."""
    # Blocks of a class share their code, and each may be a case of its own to the compiler (layer_idx), of which it keeps 8.
    config = torch._dynamo.config
    limit = config.recompile_limit
    config.recompile_limit = max(limit, 4 * len(stages))
    for stage in stages:
        stage.call = torch.compile(stage.call, **options)

    def back() -> None:
        config.recompile_limit = limit

    return back


@contextmanager
def compiled(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The units of these names compiled as in a module that is bound, and nothing bound: what such a module is held against, since compiled code rounds otherwise than eager."""
    stages = [Stage(name, part, part.forward, part.forward) for name in names if name for part in [module.get_submodule(name)]]
    with ExitStack() as undo:
        undo.callback(compile_all(stages, {}))
        for stage in stages:
            undo.callback(guards.put(stage.module, "forward", stage.call))
        yield
