"""`with record() as seen:` -> `seen.script`: a program's models, their inputs and times, its loads, waits and copies, each with its source line.

Observes and never changes: arguments, results and exceptions pass through as they are. What it costs is measured by itself and told (`Script.overhead_s`).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gpuopt.core.script import CallSite, Load, ModelCalls, Script
from gpuopt.script import lines
from gpuopt.script.inputs import argument_names, save, spec_key, spec_texts

MAX_SITES = 500
"""Different lines kept of each kind; a program that generates code could have any number."""
MAX_TIMES = 100_000
"""Single times kept of one model: more change no median."""


@contextmanager
def record(*, save_inputs: str | os.PathLike[str] | None = None) -> Iterator[Recording]:
    """Observe everything this process does with torch until the block ends, in every thread.

    Parameters
    ----------
    save_inputs: a folder for the tensors of each model's first call, as `.safetensors`: `gpuopt profile MODEL --inputs FILE` takes them. It may hold users' data.

    >>> with gpuopt.record() as seen:
    ...     serve(requests)
    >>> seen.script.modules[0].num_calls
    """
    from gpuopt.script import patches

    recording = Recording(save_inputs=Path(save_inputs) if save_inputs is not None else None)
    patches.start(recording)
    try:
        yield recording
    finally:
        patches.stop(recording)
        recording.ended = time.perf_counter()


@dataclass(slots=True)
class _Calls:
    """One root module's calls; and those of other instances of its class from the same line, because a program may build its model anew for each."""

    key: int
    name: str
    module_class: str
    lines: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0
    wall_s: float = 0.0
    times: list[tuple[float, float, bool]] = field(default_factory=list)
    """(start, seconds, whether a profiler was on)."""
    is_data_parallel: bool = False
    inputs: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    device: str = ""
    saved: str | None = None
    failure: str | None = None
    has_parameters: bool = False
    num_grad_calls: int = 0


@dataclass(slots=True)
class _Site:
    count: int = 0
    seconds: float = 0.0
    bytes: float = 0.0
    in_calls: int = 0
    at_start: int = 0


class Recording:
    """What has been seen so far. `script` may be asked for at any time, also while it goes on."""

    def __init__(self, *, save_inputs: Path | None = None) -> None:
        self.save_inputs = save_inputs
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.overhead_s = 0.0
        self.tracing_s = 0.0
        self.num_nested = 0
        """Calls of submodules, which are passed on at once."""
        self.nested_s = 0.0
        """What passing one on takes, by a measurement at the start."""
        self.notes: list[str] = []
        self.on_call: Callable[[int, int, bool], None] | None = None
        """Told (number of the model, calls so far, True) before each call of a model with parameters, and with False after it."""
        self.is_profiling = False
        self._lock = threading.Lock()
        self._calls: list[_Calls] = []
        self._by_line: dict[tuple[str, str], _Calls] = {}
        self._by_module: WeakKeyDictionary[nn.Module, _Calls] = WeakKeyDictionary()
        self._loads: dict[tuple[str, str], _Site] = {}
        self._syncs: dict[tuple[str, str], _Site] = {}
        self._copies: dict[tuple[str, str], _Site] = {}

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], frame: FrameType | None) -> int:
        """A root call begins: the number of its model, with the inputs' specs noted."""
        where, found = lines.caller(frame)
        names, specs = argument_names(module), spec_key(args, kwargs)
        parameter = next(module.parameters(), None)
        records_gradients = torch.is_grad_enabled() and not module.training and any(p.requires_grad for p in module.parameters())
        with self._lock:
            calls = self._find(module, where, frame, found)
            is_first = not calls.inputs
            calls.lines[where] += 1
            calls.inputs[names, specs] += 1
            calls.has_parameters |= parameter is not None
            calls.num_grad_calls += records_gradients
            calls.device = str(parameter.device) if parameter is not None else ""
            num_calls = calls.num_calls
        if is_first and self.save_inputs is not None:
            calls.saved = save(self.save_inputs, calls.name or type(module).__name__, names, args, kwargs, self.notes)
        if self.on_call is not None and calls.has_parameters:
            self.on_call(calls.key, num_calls, True)
        return calls.key

    def _find(self, module: nn.Module, where: str, frame: FrameType | None, found: FrameType | None) -> _Calls:
        calls = self._by_module.get(module)
        if calls is not None:
            return calls
        kind = type(module).__qualname__
        calls = self._by_line.get((kind, where))
        if calls is None:
            inner = module.module if isinstance(module, nn.DataParallel) else getattr(module, "_orig_mod", None)
            calls = _Calls(
                key=len(self._calls),
                name=lines.name_of(frame, found),
                module_class=kind if inner is None else f"{kind}({type(inner).__qualname__})",
                is_data_parallel=isinstance(module, nn.DataParallel),
            )
            self._calls.append(calls)
            self._by_line[kind, where] = calls
        self._by_module[module] = calls
        return calls

    def left(self, key: int, began: float, seconds: float, error: BaseException | None) -> None:
        """A root call has returned or raised."""
        calls = self._calls[key]
        with self._lock:
            calls.num_calls += 1
            calls.wall_s += seconds
            if len(calls.times) < MAX_TIMES:
                calls.times.append((began, seconds, self.is_profiling))
            if error is not None:
                first = next((text for text in str(error).splitlines() if text.strip()), "")
                calls.failure = f"{type(error).__name__}: {first}"[:300]
            num_calls = calls.num_calls
        if self.on_call is not None and calls.has_parameters:
            self.on_call(key, num_calls, False)

    def load(self, what: str, where: str, seconds: float, num_bytes: float, in_call: bool) -> None:
        """Weights were read or moved."""
        self._add(self._loads, what, where, seconds, num_bytes, in_call)

    def sync(self, what: str, where: str, seconds: float, num_bytes: float, in_call: bool) -> None:
        """The host waited for a device."""
        self._add(self._syncs, what, where, seconds, num_bytes, in_call)

    def copy(self, what: str, where: str, seconds: float, num_bytes: float, in_call: bool) -> None:
        """A tensor went to or from a device."""
        self._add(self._copies, what, where, seconds, num_bytes, in_call)

    def _add(self, table: dict[tuple[str, str], _Site], what: str, where: str, seconds: float, num_bytes: float, in_call: bool) -> None:
        with self._lock:
            site = table.get((what, where))
            if site is None:
                if len(table) >= MAX_SITES:
                    where = "other lines"
                site = table.setdefault((what, where), _Site())
            site.count += 1
            site.seconds += seconds
            site.bytes += num_bytes
            site.in_calls += in_call
            site.at_start += not self._calls

    @property
    def script(self) -> Script:
        """Everything so far, the longest first."""
        with self._lock:
            ended = self.ended if self.ended is not None else time.perf_counter()
            modules = sorted((_modules(calls) for calls in self._calls), key=lambda m: -m.wall_s)
            return Script(
                modules=tuple(modules),
                loads=tuple(
                    Load(line=where, what=what, count=s.count, seconds=s.seconds, bytes=s.bytes, in_calls=s.in_calls, at_start=s.at_start)
                    for (what, where), s in _longest(self._loads)
                ),
                syncs=_sites(self._syncs),
                copies=_sites(self._copies),
                wall_s=ended - self.began,
                overhead_s=self.overhead_s + self.num_nested * self.nested_s,
                tracing_s=self.tracing_s,
                notes=tuple(self.notes),
            )


def _modules(calls: _Calls) -> ModelCalls:
    timed = [seconds for _, seconds, is_profiled in calls.times[1:] if not is_profiled] or [s for _, s, _ in calls.times[1:]]
    starts = [(start, is_profiled) for start, _, is_profiled in calls.times]
    # From one start to the next: what the program does around the model is part of an iteration.
    gaps = [(b - a, pa or pb) for (a, pa), (b, pb) in pairwise(starts[1:])]
    periods = [gap for gap, is_profiled in gaps if not is_profiled] or [gap for gap, _ in gaps]
    (names, specs), _ = calls.inputs.most_common(1)[0]
    return ModelCalls(
        name=calls.name,
        module_class=calls.module_class,
        num_calls=calls.num_calls,
        wall_s=calls.wall_s,
        line=calls.lines.most_common(1)[0][0],
        is_data_parallel=calls.is_data_parallel,
        inputs=spec_texts(names, specs),
        device=calls.device,
        typical_s=median(timed) if timed else None,
        period_s=median(periods) if periods else None,
        first_s=calls.times[0][1] if calls.times else None,
        saved_inputs=calls.saved,
        failure=calls.failure,
        num_grad_calls=calls.num_grad_calls,
    )


def _longest(table: dict[tuple[str, str], _Site]) -> list[tuple[tuple[str, str], _Site]]:
    return sorted(table.items(), key=lambda item: -item[1].seconds)


def _sites(table: dict[tuple[str, str], _Site]) -> tuple[CallSite, ...]:
    return tuple(
        CallSite(line=where, what=what, count=s.count, seconds=s.seconds, bytes=s.bytes, in_calls=s.in_calls)
        for (what, where), s in _longest(table)
    )


def is_remote(tensor: torch.Tensor) -> bool:
    """Whether reading it makes the host wait: it lies on a device that works by itself."""
    return tensor.device.type not in ("cpu", "meta")
