"""Clocks count every call, synchronise where they must, and cost nearly nothing."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from gpuopt.core.errors import UsageError
from gpuopt.timing import clocks


def test_each_device_has_its_clock_and_always_the_same_one() -> None:
    assert isinstance(clocks.for_device("cpu"), clocks.WallClock)
    assert isinstance(clocks.for_device("null"), clocks.WallClock)
    assert clocks.for_device("cpu") is clocks.for_device("cpu")
    with pytest.raises(UsageError, match="tpu"):
        clocks.for_device("tpu")


@pytest.mark.parametrize(("n", "inner"), [(1, 1), (7, 1), (5, 3)])
@pytest.mark.parametrize("clock", [clocks.WallClock(), clocks.FakeClock([100, 200])])
def test_a_clock_makes_exactly_the_calls_asked_for(clock: clocks.Clock, n: int, inner: int) -> None:
    calls: list[int] = []
    samples, wall_ns = clock.time_calls(lambda: calls.append(1), n, inner)
    assert len(samples) == n
    assert len(calls) == n * inner
    assert wall_ns > 0


def test_the_wall_clock_sees_a_sleep_and_divides_it_by_the_calls_of_a_sample() -> None:
    clock = clocks.WallClock()
    alone, _ = clock.time_calls(lambda: time.sleep(0.004), 3)
    assert all(3.9e6 < sample for sample in alone)
    together, wall_ns = clock.time_calls(lambda: time.sleep(0.004), 2, 3)
    assert all(3.9e6 < sample < 12e6 for sample in together)
    assert wall_ns >= 6 * 3.9e6
    assert 0 < clock.resolution_ns < 100_000


def test_a_fake_clock_follows_its_script_over_and_over() -> None:
    clock = clocks.FakeClock([10, 20, 30])
    assert clock.time_calls(lambda: None, 4) == ((10, 20, 30, 10), 70)
    assert clock.time_calls(lambda: None, 2, 2) == ((25, 15), 80)
    assert clock.num_calls == 8


class FakeCuda:
    """torch.cuda as far as the clock uses it: a log of what happened, and a device time that each call advances by 2 ms."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0
        self.made = 0

    def current_stream(self, device: Any) -> str:
        return f"stream of {device}"

    def synchronize(self, device: Any) -> None:
        self.log.append("sync")

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        self.made += 1
        return FakeEvent(self)

    def call(self) -> None:
        self.log.append("call")
        self.now_ms += 2.0


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self._at = cuda, 0.0

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self._cuda.log.append("record")
        self._at = self._cuda.now_ms

    def elapsed_time(self, other: FakeEvent) -> float:
        self._cuda.log.append("read")
        return other._at - self._at


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_the_cuda_clock_records_a_pair_around_each_sample_and_reads_none_before_the_last(cuda: FakeCuda) -> None:
    clock = clocks.CudaClock("cuda:1")
    clock.time_calls(cuda.call, 3)  # makes the events
    cuda.log.clear()
    samples, _ = clock.time_calls(cuda.call, 3)
    assert samples == (2_000_000,) * 3
    assert cuda.log == ["sync", *["record", "call", "record"] * 3, "sync", *["read"] * 3]
    cuda.log.clear()
    samples, _ = clock.time_calls(cuda.call, 2, 4)
    assert samples == (2_000_000,) * 2
    assert cuda.log == ["sync", *["record", *["call"] * 4, "record"] * 2, "sync", *["read"] * 2]


def test_the_cuda_clock_makes_and_warms_events_outside_the_timed_loop_and_keeps_them(cuda: FakeCuda) -> None:
    clock = clocks.CudaClock("cuda:1")
    clock.time_calls(cuda.call, 3)
    assert cuda.log[: cuda.log.index("sync")] == ["record"] * 6
    assert cuda.made == 6
    clock.time_calls(cuda.call, 2)
    assert cuda.made == 6
    clock.time_calls(cuda.call, 4)
    assert cuda.made == 8


def test_the_timed_loop_adds_under_one_percent_to_a_millisecond_on_the_host() -> None:
    """Rounds of microseconds, so that on a busy machine some of them run undisturbed."""
    assert clocks.overhead_ns(lambda: None, clocks.WallClock(), n=50, rounds=100) < 0.01 * 1e6


@pytest.mark.gpu
def test_the_timed_loop_adds_under_one_percent_over_a_bare_event_loop_on_a_gpu() -> None:
    """The bare loop is the shortest that gives a time a call: two events around each, read at the end. Median of pairs, each
    taken in both orders: products heat the card, and whoever comes second meets that."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    out = torch.empty_like(a)
    clock = clocks.CudaClock("cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(200)]

    def call() -> None:
        torch.mm(a, a, out=out)

    def bare() -> int:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return time.perf_counter_ns() - begin

    def timed() -> int:
        return clock.time_calls(call, 200)[1]

    ratios = []
    for _ in range(24):  # one of each order a time: what heat does to whoever comes second cancels out
        taken = {bare: 0, timed: 0}
        for one in (bare, timed, timed, bare):
            taken[one] += one()
        ratios.append(taken[timed] / taken[bare])
    assert statistics.median(ratios[2:]) < 1.01


@pytest.mark.gpu
def test_cuda_samples_add_up_to_the_wall_time_when_the_device_is_busy() -> None:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    clock = clocks.CudaClock("cuda")
    clock.time_calls(lambda: a @ a, 20)
    samples, wall_ns = clock.time_calls(lambda: a @ a, 50)
    assert 0.95 < sum(samples) / wall_ns < 1.01
