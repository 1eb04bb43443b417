"""Building ahead: who is started, who stands still, who is ended, and that a search finds what it finds without it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.core.result import Device, Status
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate
from gpuopt.pipeline import cores, figures
from gpuopt.pipeline.search import ahead, tune
from gpuopt.pipeline.search.ahead import Ahead
from gpuopt.pipeline.search.optimize import optimize

Models = Callable[[str], str]


@dataclass
class FakeSeat:
    candidate: Candidate
    did: list[str] = field(default_factory=list)
    status: Status = Status.OK

    @property
    def child(self) -> FakeSeat:
        return self

    @property
    def run(self) -> Any:
        return replace(figures.started(self.candidate), status=self.status)

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.did.append(name)


class Yard:
    """Seats as they are started, and a gate that their builds wait at."""

    def __init__(self, tools: Any) -> None:
        self.seats: dict[str, FakeSeat] = {}
        self.ended: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.status = Status.OK
        self.candidates = [tools.candidate("net", f"null:sleep_ms={ms}") for ms in range(1, 7)]
        self.ahead = Ahead(seated=self.seated, build=self.build)  # type: ignore[arg-type]

    def seated(self, candidate: Candidate, stack: ExitStack) -> FakeSeat:
        key = tune.key(candidate)
        seat = self.seats[key] = FakeSeat(candidate)
        stack.callback(lambda: self.ended.append(key))
        return seat

    def build(self, seat: FakeSeat) -> None:
        self.go.wait(10)
        seat.did.append("build")
        seat.status = self.status

    def key(self, number: int) -> str:
        return tune.key(self.candidates[number])


@pytest.fixture
def yard(tools: Any) -> Yard:
    return Yard(tools)


def test_the_likeliest_are_built_and_those_that_are_known_are_not(yard: Yard) -> None:
    yard.ahead.expect(yard.candidates, known={yard.key(0): None}, most=2)
    assert list(yard.ahead.coming) == [yard.key(1), yard.key(2)]
    found = yard.ahead.take(yard.key(1))
    assert found is not None and found[0].did == ["build"] and not yard.ended  # type: ignore[attr-defined]
    yard.ahead.expect(yard.candidates[2:], known={}, most=2)
    assert list(yard.ahead.coming) == [yard.key(2), yard.key(3)], "one that builds already is not begun again"
    yard.ahead.close()
    assert sorted(yard.ended) == sorted([yard.key(2), yard.key(3)]) and "kill" in yard.seats[yard.key(3)].did


def test_who_is_not_likely_any_more_is_ended(yard: Yard) -> None:
    yard.ahead.expect(yard.candidates[:2], known={}, most=2)
    yard.ahead.expect(yard.candidates[1:3], known={}, most=2)
    assert yard.ended == [yard.key(0)] and list(yard.ahead.coming) == [yard.key(1), yard.key(2)]
    yard.ahead.close()


def test_all_stand_still_while_one_is_timed_and_go_on_whatever_happens(yard: Yard) -> None:
    yard.go.clear()
    yard.ahead.expect(yard.candidates, known={}, most=3)
    with pytest.raises(ValueError), yard.ahead.still():
        assert all(seat.did == ["pause"] for seat in yard.seats.values()) and len(yard.seats) == 3
        raise ValueError
    assert all(seat.did == ["pause", "resume"] for seat in yard.seats.values())
    yard.go.set()
    yard.ahead.close()


@pytest.mark.parametrize("status", [Status.OOM_DEVICE, Status.OOM_HOST, Status.TIMEOUT])
def test_one_that_failed_for_what_others_took_is_built_again_by_whoever_asks(yard: Yard, status: Status) -> None:
    yard.status = status
    yard.ahead.expect(yard.candidates[:1], known={}, most=2)
    assert yard.ahead.take(yard.key(0)) is None and yard.ended == [yard.key(0)] and not yard.ahead.coming
    assert yard.ahead.take(yard.key(4)) is None, "nobody built it"


def test_one_that_failed_by_itself_is_handed_over_with_its_failure(yard: Yard) -> None:
    yard.status = Status.COMPILE_ERROR
    yard.ahead.expect(yard.candidates[:1], known={}, most=2)
    found = yard.ahead.take(yard.key(0))
    assert found is not None and found[0].run.status is Status.COMPILE_ERROR


def test_a_build_that_raises_leaves_no_child(yard: Yard) -> None:
    def broken(seat: Any) -> None:
        raise KeyError("a bug")

    yard.ahead.build = broken
    yard.ahead.expect(yard.candidates[:1], known={}, most=1)
    with pytest.raises(KeyError):
        yard.ahead.take(yard.key(0))
    assert yard.ended == [yard.key(0)]


def test_a_cpu_builds_one_at_a_time_and_a_gpu_as_many_as_the_host_has_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = (Device(id=kind, name="", kind=kind) for kind in ("cuda", "cpu"))
    for number, jobs in ((2, 1), (8, 2), (16, 4), (64, 4)):
        monkeypatch.setattr(cores.cpu, "num_cores", lambda n=number: n)
        assert ahead.jobs_of_search(BenchSpec(), gpu) == jobs
    assert ahead.jobs_of_search(BenchSpec(), cpu) == 1 and ahead.jobs_of_search(BenchSpec(build_jobs=3), cpu) == 3


def test_a_search_that_builds_ahead_finds_the_same_and_leaves_nobody(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    search = SearchSpec(
        precisions=("fp32",), rewrites=(), backends=("null:sleep_ms=4", "null:fail=nan", "null:fail=compile", "null:sleep_ms=60")
    )
    base = replace(tools.candidate(models("net"), N=4), backend=BackendSpec.parse("null:sleep_ms=40"))
    told = []
    for jobs in (1, 3):
        bench = replace(tools.QUICK, min_iterations=2, block_ms=2.0, warmup_s=0.0, max_warmup_s=0.02, max_time_s=0.05, build_jobs=jobs)
        report = optimize(tools.job("optimize", base, search=search, bench=bench))
        assert report.search is not None and report.search.choice is not None
        told.append(({t.label: t.outcome for t in report.search.trials}, report.search.choice.key))
        assert all(child.session is None for child in local)
    assert told[0] == told[1]
