"""A device -> the clock that times calls on it. When to synchronise is decided here and nowhere else."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any, Protocol

from gpuopt.core.errors import UsageError

Call = Callable[[], Any]
RESOLUTIONS_PER_SAMPLE = 50
"""A sample shorter than this many resolutions is quantised by over 2%: several calls then share one sample."""
EVENT_RESOLUTION_NS = 500
"""Of cudaEventElapsedTime, "around 0.5 microseconds" (CUDA Runtime API reference, Event Management)."""


class Clock(Protocol):
    """Times calls one by one."""

    name: str
    """`cuda-event`, `perf_counter` or `fake`."""
    resolution_ns: int
    """Smallest step it can tell apart, its own cost included."""

    def time_calls(self, call: Call, n: int, inner: int = 1) -> tuple[tuple[int, ...], int]:
        """n samples of `inner` calls each, back to back -> (ns a call for each sample, host wall ns over all, synchronised at both ends)."""

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""


@functools.cache
def for_device(device: str) -> Clock:
    """`cpu`, `cuda`, `cuda:1` or `null` -> its clock, one an id, as CUDA's keeps its events. Raises UsageError for any other."""
    kind = device.partition(":")[0]
    if kind == "cuda":
        return CudaClock(device)
    if kind in ("cpu", "null"):  # the null backend sleeps in real time
        return WallClock()
    raise UsageError(f"there is no clock for the device {device!r}", fix="--device cpu or --device cuda")


class WallClock:
    """The monotonic host clock, for calls that have ended when they return."""

    name = "perf_counter"

    def __init__(self) -> None:
        self.resolution_ns = _wall_resolution_ns()

    def time_calls(self, call: Call, n: int, inner: int = 1) -> tuple[tuple[int, ...], int]:
        now = time.perf_counter_ns
        samples: list[int] = []
        keep = samples.append
        begin = now()
        if inner == 1:
            for _ in range(n):
                start = now()
                call()
                keep(now() - start)
        else:
            for _ in range(n):
                start = now()
                for _ in range(inner):
                    call()
                keep((now() - start) // inner)
        return tuple(samples), now() - begin

    def synchronize(self) -> None:
        """Calls on the host have ended when they return."""


class CudaClock:
    """One pair of CUDA events a sample on the current stream, all of them recorded before any is read."""

    name = "cuda-event"
    resolution_ns = EVENT_RESOLUTION_NS

    def __init__(self, device: str) -> None:
        import torch  # here, so that a session on another device never starts CUDA

        self._cuda = torch.cuda
        self._device = torch.device(device)
        self._pairs: list[tuple[Any, Any]] = []

    def time_calls(self, call: Call, n: int, inner: int = 1) -> tuple[tuple[int, ...], int]:
        pairs = self._events(n)
        stream = self._cuda.current_stream(self._device)
        repeats = range(inner)
        # Nothing but the calls and two records happens between the synchronisations: reading an event would wait for the device
        # and hide how well the host keeps ahead of it.
        self.synchronize()
        begin = time.perf_counter_ns()
        if inner == 1:
            for start, end in pairs:
                start.record(stream)
                call()
                end.record(stream)
        else:
            for start, end in pairs:
                start.record(stream)
                for _ in repeats:
                    call()
                end.record(stream)
        self.synchronize()
        wall_ns = time.perf_counter_ns() - begin
        return tuple(round(start.elapsed_time(end) * 1e6 / inner) for start, end in pairs), wall_ns

    def synchronize(self) -> None:
        """Waits for every stream of the device, not only the current one: a backend may use its own."""
        self._cuda.synchronize(self._device)

    def _events(self, n: int) -> list[tuple[Any, Any]]:
        """Pairs made once and used again. CUDA creates an event lazily at its first record, so a new one is recorded here, outside the timed loop."""
        if len(self._pairs) < n:
            stream = self._cuda.current_stream(self._device)
            new = [(self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)) for _ in range(n - len(self._pairs))]
            for start, end in new:
                start.record(stream)
                end.record(stream)
            self._pairs += new
        return self._pairs[:n]


class FakeClock:
    """Times from a script, for tests: every call is made, and takes what the script says. A script that ends starts again."""

    name = "fake"

    def __init__(self, times_ns: Iterable[int], *, resolution_ns: int = 1) -> None:
        self.resolution_ns = resolution_ns
        self.num_calls = 0
        self._times = cycle(times_ns)

    def time_calls(self, call: Call, n: int, inner: int = 1) -> tuple[tuple[int, ...], int]:
        samples, wall_ns = [], 0
        for _ in range(n):
            total = 0
            for _ in range(inner):
                call()
                self.num_calls += 1
                total += next(self._times)
            samples.append(total // inner)
            wall_ns += total
        return tuple(samples), wall_ns

    def synchronize(self) -> None:
        """Nothing runs behind its back."""


def overhead_ns(call: Call, clock: Clock, n: int = 200, rounds: int = 5) -> float:
    """Host ns a call that the timed loop adds over a bare loop of the same calls with one synchronisation at either end.

    Best of `rounds`, alternating, because the smallest time is the one least disturbed by neighbours.
    """
    bare, timed = [], []
    for _ in range(rounds):
        clock.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(n):
            call()
        clock.synchronize()
        bare.append(time.perf_counter_ns() - begin)
        timed.append(clock.time_calls(call, n)[1])
    return (min(timed) - min(bare)) / n


def _wall_resolution_ns() -> int:
    """Smallest step seen between two readings in a row: the clock's tick or its cost, whichever is larger."""
    steps = []
    for _ in range(200):
        first = second = time.perf_counter_ns()
        while second == first:
            second = time.perf_counter_ns()
        steps.append(second - first)
    return min(steps)
