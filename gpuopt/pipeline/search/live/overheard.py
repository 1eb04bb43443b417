"""An object that holds modules, and one run of it -> its modules, and the calls that the run made of each: how often, with what, and for how long.

Only outermost calls count: a module called by another that is itself recorded is part of that one's call. What is entered by another way than its call
(`vae.decode(z)`, `model.generate(x)`) is seen one level below, in the modules that such a method calls.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gpuopt.pipeline.search.live import calls

MAX_DEPTH = 4
"""Levels of plain objects between what was given and a module."""
MAX_SIGNATURES = 16
"""Of one module; further ones are counted together and left alone."""


def modules_of(holder: Any) -> dict[str, nn.Module]:
    """Dotted names -> modules: `holder.components` where there are such (diffusers), else what its attributes hold, at any depth of plain objects, lists and
    dicts; of an nn.Module its children. A module under several names comes once, under the first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    if isinstance(holder, nn.Module):
        for name, child in holder.named_children():
            _gather(child, name, found, set(), 0)
    else:
        components = getattr(holder, "components", None)
        for source in (components, holder):
            if source is not None:
                _gather(source, "", found, set(), 0)
    return {name: module for name, module in found.values()}


def _gather(value: Any, name: str, found: dict[int, tuple[str, nn.Module]], seen: set[int], depth: int) -> None:
    if isinstance(value, nn.ModuleList | nn.ModuleDict):  # never called themselves
        for key, child in value.named_children():
            _gather(child, f"{name}.{key}", found, seen, depth)
        return
    if isinstance(value, nn.Module):
        found.setdefault(id(value), (name, value))
        return
    if id(value) in seen or depth > MAX_DEPTH:
        return
    seen.add(id(value))
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = iter(list(value.items()))
    elif isinstance(value, list | tuple | set):
        items = iter(enumerate(value))
    elif isinstance(value, type) or type(value).__module__ == "builtins" or isinstance(value, torch.Tensor):
        return
    else:
        items = iter(list(getattr(value, "__dict__", {}).items()))
    for key, item in items:
        _gather(item, f"{name}.{key}" if name else str(key), found, seen, depth + 1)


@dataclass(slots=True, kw_only=True)
class Group:
    """Calls of one module that differ in the values of their tensors alone."""

    name: str
    module: nn.Module
    text: str
    """Dtypes and shapes."""
    template: calls.Template | None = None
    """None where the call cannot be made again: `reason` says why."""
    first: tuple[torch.Tensor, ...] = ()
    last: tuple[torch.Tensor, ...] = ()
    shape: calls.Shape | None = None
    reason: str = ""
    calls: int = 0
    ns: int = 0


@dataclass(slots=True, kw_only=True)
class Recording:
    """One run."""

    groups: list[Group]
    """The longest time first."""
    ns: int
    output: Any = None


def outermost(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, nn.Module]:
    """Those of the modules, or of the modules inside them, that the run calls from outside all of them. Whatever the run raises is raised."""
    names: dict[int, tuple[str, nn.Module]] = {}
    for root, module in modules.items():
        for path, part in module.named_modules():
            names.setdefault(id(part), (f"{root}.{path}" if path else root, part))
    inside: list[int] = []
    called: Counter[int] = Counter()

    def enter(module: nn.Module, args: Any) -> None:
        if not inside:
            called[id(module)] += 1
        inside.append(id(module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    with _hooked([part for _, part in names.values()], enter, leave, with_kwargs=False):
        run()
    return {names[key][0]: names[key][1] for key in called}


def record(modules: Mapping[str, nn.Module], run: Callable[[], Any], synchronize: Callable[[], None]) -> Recording:
    """The calls that one run makes of these modules, each timed with the device at rest before and after it. Whatever the run raises is raised."""
    names = {id(module): name for name, module in modules.items()}
    book = _Book(names=names, synchronize=synchronize)
    with _hooked(list(modules.values()), book.enter, book.leave, with_kwargs=True):
        synchronize()
        began = time.perf_counter_ns()
        output = run()
        synchronize()
        total = time.perf_counter_ns() - began - book.own_ns
    groups = sorted(book.groups.values(), key=lambda g: -g.ns)
    return Recording(groups=groups, ns=total, output=output)


@dataclass(slots=True, kw_only=True)
class _Book:
    names: dict[int, str]
    synchronize: Callable[[], None]
    groups: dict[Any, Group] = field(default_factory=dict)
    depth: int = 0
    own_ns: int = 0
    """What keeping copies took: no part of the run."""
    open: tuple[Group, tuple[torch.Tensor, ...], list[int], int] | None = None

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        began = time.perf_counter_ns()
        group, tensors = self._group(module, args, kwargs)
        if group.template is not None:
            with torch.no_grad():
                group.last = tuple(t.detach().clone() for t in tensors)
            group.first = group.first or group.last
        versions = [-1 if t.is_inference() else t._version for t in tensors]
        self.synchronize()
        started = time.perf_counter_ns()
        self.own_ns += started - began
        self.open = (group, tensors, versions, started)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth or self.open is None:
            return
        self.synchronize()
        ended = time.perf_counter_ns()
        group, tensors, versions, started = self.open
        self.open = None
        group.calls += 1
        group.ns += ended - started
        if group.reason:
            return
        if any(v >= 0 and t._version != v for t, v in zip(tensors, versions, strict=True)):
            group.reason = "it writes into its inputs"
            return
        try:
            group.shape = calls.Shape.of(output)
        except calls.NotPlain as error:
            group.reason = f"it returns {error}"

    def _group(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Group, tuple[torch.Tensor, ...]]:
        name = self.names[id(module)]
        try:
            tensors, template = calls.taken(args, kwargs)
        except calls.NotPlain as error:
            key: Any = (name, str(error))
            return self.groups.setdefault(
                key, Group(name=name, module=module, text=f"with {error}", reason=f"it is called with {error}")
            ), ()
        text = calls.text(tensors)
        key = (name, template, text, tuple(str(t.device) for t in tensors))
        if key not in self.groups and sum(g.module is module for g in self.groups.values()) >= MAX_SIGNATURES:
            why = f"it is called with more than {MAX_SIGNATURES} signatures"
            return self.groups.setdefault((name, "others"), Group(name=name, module=module, text="others", reason=why)), ()
        group = self.groups.setdefault(key, Group(name=name, module=module, text=text, template=template))
        if not tensors:
            group.reason = "it is called without tensors"
        elif len(tensors) > calls.MAX_TENSORS:
            group.reason = f"it is called with {len(tensors)} tensors, and {calls.MAX_TENSORS} can be named"
        return group, tuple(tensors)


@contextmanager
def _hooked(modules: list[nn.Module], enter: Callable[..., None], leave: Callable[..., None], *, with_kwargs: bool) -> Iterator[None]:
    """Hooks that are gone afterwards, whatever happened."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks
            stack.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=with_kwargs).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=with_kwargs, always_call=True).remove)
        yield


def why_not(module: nn.Module) -> str:
    """Why a module cannot be given a stand-in, before anything is recorded; "" where it can."""
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return "torch.compile has it already"
    for name, part in module.named_modules():
        where = f"its part {name}" if name else "it"
        if part.training:
            return f"{where} is in training mode"
        if "forward" in vars(part):
            return f"the forward of {where if name else 'the object'} was replaced by somebody else"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{where} has forward hooks, which nothing that is built would call"
    return ""
