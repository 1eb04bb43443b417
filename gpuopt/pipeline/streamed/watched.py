"""An engine -> the same engine that also times what is computed: what the host takes to queue a unit, and the device to run it once all of it is queued. Imports torch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

HELD = 1.3
"""Of the time the host takes to queue a unit: how long the device is held back meanwhile."""
HELD_MS = (0.05, 50.0)
"""More than that, and at most."""
_SPIN = 2_000_000
"""Cycles of a sleep that is timed: a millisecond or so."""


@dataclass(slots=True)
class Pair:
    """Two events around something on the stream that computes."""

    begin: Any
    end: Any

    @property
    def ms(self) -> float:
        """After both have happened."""
        return float(self.begin.elapsed_time(self.end))


@dataclass(slots=True)
class Seen:
    """One forward of the model."""

    begin: Any = None
    """The event at its start."""
    whole: Pair | None = None
    units: dict[str, list[Pair]] = field(default_factory=dict)
    held: list[Pair] = field(default_factory=list)
    """The device was held back."""
    host_ms: dict[str, float] = field(default_factory=dict)
    """`""` is the whole forward."""


class Still:
    """The source of units whose slots keep what they hold: a host that prepared their bytes would be timed with them."""

    def __init__(self) -> None:
        self._nothing = torch.empty(0, dtype=torch.uint8)

    def bytes_for_copy(self, unit: str) -> torch.Tensor:
        """Nobody copies them."""
        return self._nothing

    def release(self, unit: str) -> None:
        """Nothing was taken."""

    def read(self, unit: str) -> torch.Tensor:
        """Never asked for: the shelf has the bytes."""
        raise AssertionError(f"{unit} was read while its slot stays as it is")

    def abort(self) -> None:
        """Nothing was taken."""

    def close(self) -> None:
        """Nothing is held."""


class Watched:
    """An engine that also times what is computed, in one of three ways (`watching`): `host`, `device`, and `whole` for forwards alone. Everything else is the engine's own."""

    listens = True

    def __init__(self, engine: Any, cuda: Any = torch.cuda, now: Callable[[], float] = time.perf_counter) -> None:
        self._engine, self._cuda, self._now = engine, cuda, now
        self.watching = ""
        self.is_still = False
        """Nothing is copied to slots any more: they keep what they hold."""
        self.forwards: list[Seen] = []
        self.queued_ms: Mapping[str, float] = {}
        """Of the host, for each unit: how long to hold the device back."""
        self.cycles_per_ms = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def event(self) -> Any:
        """The engine's own."""
        return self._engine.event()

    def mark(self) -> Any:
        """An event that tells the time, recorded now."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._engine.device))
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, home: str = "pinned") -> None:
        """The engine's, unless everything is to stay as it is."""
        if not self.is_still:
            self._engine.copy(target, source, home=home)

    @contextmanager
    def segment(self, unit: str, slot: Any = None) -> Iterator[None]:
        """The engine's, timed; `""` is a forward."""
        if not self.watching or (self.watching == "whole" and unit):
            with self._engine.segment(unit, slot):
                yield
            return
        if not unit or not self.forwards:  # an encoder may be called by itself, outside a forward of the model
            self.forwards.append(Seen(begin=self.mark()))
        seen = self.forwards[-1]
        if self.watching != "device":
            began = self._now()
            with self._engine.segment(unit, slot):
                yield
            seen.host_ms[unit] = seen.host_ms.get(unit, 0.0) + 1e3 * (self._now() - began)
            if not unit:
                seen.whole = Pair(seen.begin, seen.begin)
            return
        before = self.mark()
        self._hold(self.queued_ms.get(unit, 0.0))
        begin = self.mark()
        seen.held.append(Pair(before, begin))
        with self._engine.segment(unit, slot):
            yield
        pair = Pair(begin, self.mark())
        if unit:
            seen.units.setdefault(unit, []).append(pair)
        else:
            seen.whole = pair

    def tune(self) -> None:
        """Learn how long the device sleeps for a number of cycles."""
        for _ in range(2):
            begin = self.mark()
            self._cuda._sleep(_SPIN)
            end = self.mark()
            self._engine.drain()
            self.cycles_per_ms = _SPIN / max(1e-3, begin.elapsed_time(end))

    def _hold(self, queued_ms: float) -> None:
        least, most = HELD_MS
        self._cuda._sleep(int(min(most, HELD * queued_ms + least) * self.cycles_per_ms))

    def around(self, unit: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A resident unit's forward, timed like a streamed one's: nothing else stands around it."""

        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.segment(unit):
                return forward(*args, **kwargs)

        return timed
