"""Waves of candidates: timed in order, the next ones built meanwhile and standing still while somebody is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gpuopt.core.result import Device, Run, Status
from gpuopt.core.spec import BenchSpec, Candidate, Job, ModelRef
from gpuopt.pipeline import groups


class FakeChild:
    def __init__(self) -> None:
        self.is_paused = self.is_closed = False

    def kill(self) -> None:
        self.is_closed, self.is_paused = True, False

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False


@dataclass
class FakeSeat:
    candidate: Candidate
    child: FakeChild
    run: Run
    is_built: bool = False

    @property
    def ok(self) -> bool:
        return self.run.status is Status.OK


@dataclass
class World:
    """What `roll` asks for, faked: who was alive, built and paused when somebody was timed."""

    failing: dict[str, Status] = field(default_factory=dict)
    """Model -> how its first build ends."""
    slow: dict[str, float] = field(default_factory=dict)
    seats: list[FakeSeat] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)
    seen: list[dict[str, str]] = field(default_factory=list)
    most_building: int = 0
    most_alive: int = 0
    building: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def seated(self, candidate: Candidate, job: Job, progress: Any, environment: Any) -> Iterator[FakeSeat]:
        seat = FakeSeat(candidate, FakeChild(), Run(model=candidate.model.text, backend="eager", status=Status.OK))
        self.seats.append(seat)
        self.most_alive = max(self.most_alive, sum(not s.child.is_closed for s in self.seats))
        yield seat
        seat.child.is_closed = True

    def prepare(self, seat: FakeSeat, job: Job) -> None:
        name = seat.candidate.model.text
        with self.lock:
            self.building += 1
            self.most_building = max(self.most_building, self.building)
        time.sleep(self.slow.get(name, 0.005))
        while seat.child.is_paused:
            time.sleep(0.001)
        with self.lock:
            self.building -= 1
        if name in self.failing:
            seat.run = replace(seat.run, status=self.failing.pop(name))
        seat.is_built = True

    def time(self, live: list[FakeSeat], job: Job, machines: Any, progress: Any) -> None:
        self.timed += [seat.candidate.model.text for seat in live]
        self.seen.append(
            {s.candidate.model.text: "closed" if s.child.is_closed else "paused" if s.child.is_paused else "runs" for s in self.seats}
        )
        time.sleep(0.02)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(groups, "seated", made.seated)
    monkeypatch.setattr(groups, "prepare", made.prepare)
    monkeypatch.setattr(groups, "_timed", made.time)
    monkeypatch.setattr(groups, "machine_of", lambda candidate, machines: machines[0])
    return made


class Machine:
    device = Device(id="cuda:0", name="a GPU", kind="cuda")


def waves(*names: str) -> list[groups.Wave]:
    job = Job(verb="bench", bench=BenchSpec())
    return [
        groups.Wave(groups=[[Candidate(model=ModelRef(text=n)) for n in name.split()]], job=job, machines=[Machine()], progress=None)  # type: ignore[list-item,arg-type]
        for name in names
    ]


def rolled(given: list[groups.Wave], **options: Any) -> list[list[str]]:
    updates: list[int] = []
    found = [
        [f"{seat.candidate.model.text} {seat.run.status}" for seat in seats]
        for seats in groups.roll(given, on_update=lambda wave, runs: updates.append(wave), **options)
    ]
    assert updates == sorted(updates)
    return found


def test_later_waves_are_built_beside_and_stand_still_while_one_is_timed(world: World) -> None:
    assert rolled(waves("a b", "c d", "e f"), jobs=4, ahead=4) == [["a ok", "b ok"], ["c ok", "d ok"], ["e ok", "f ok"]]
    assert world.timed == ["a", "b", "c", "d", "e", "f"]
    assert world.seen[0] == {"a": "runs", "b": "runs", "c": "paused", "d": "paused"} | {k: "paused" for k in world.seen[0] if k in "ef"}
    assert world.seen[1]["a"] == world.seen[1]["b"] == "closed"
    assert world.seen[1]["c"] == world.seen[1]["d"] == "runs"
    assert world.seen[2] == dict(a="closed", b="closed", c="closed", d="closed", e="runs", f="runs")
    assert world.most_building <= 4 and world.most_alive <= 2 + 4
    assert not any(seat.child.is_paused for seat in world.seats)


def test_without_ahead_a_wave_is_alone(world: World) -> None:
    rolled(waves("a b", "c d"), jobs=4)
    assert world.seen[0] == {"a": "runs", "b": "runs"}
    assert world.most_alive == 2


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_no_more_build_at_once_than_may(world: World, jobs: int) -> None:
    rolled(waves("a b c", "d e", "f"), jobs=jobs, ahead=6)
    assert world.most_building <= jobs
    assert world.timed == list("abcdef")


def test_what_failed_for_memory_beside_another_wave_is_built_again_in_its_turn(world: World) -> None:
    world.failing = {"c": Status.OOM_DEVICE, "d": Status.CRASH}
    world.slow = {"a": 0.1}
    assert rolled(waves("a", "c d"), jobs=3, ahead=3) == [["a ok"], ["c ok", "d crash"]]
    assert world.timed == ["a", "c"]


def test_what_failed_for_memory_alone_has_failed(world: World) -> None:
    world.failing = {"a": Status.OOM_DEVICE}
    assert rolled(waves("a b"), jobs=2) == [["a oom_device", "b ok"]]


def test_an_error_in_a_builder_is_told_and_nobody_is_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seat: FakeSeat, job: Job) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(groups, "prepare", broken)
    with pytest.raises(ZeroDivisionError):
        rolled(waves("a b", "c"), jobs=2, ahead=2)
    assert not any(seat.child.is_paused for seat in world.seats)


def test_what_failed_for_memory_that_a_later_wave_held_is_built_again_without_it(world: World) -> None:
    world.slow = {"a": 0.1}
    world.failing = {"a": Status.OOM_DEVICE}
    alive: list[list[str]] = []
    prepare = groups.prepare

    def seen(seat: FakeSeat, job: Job) -> None:
        alive.append([s.candidate.model.text for s in world.seats if not s.child.is_closed])
        prepare(seat, job)  # type: ignore[arg-type]

    groups.prepare = seen  # type: ignore[assignment]
    try:
        assert rolled(waves("a", "c d"), jobs=3, ahead=3) == [["a ok"], ["c ok", "d ok"]]
    finally:
        groups.prepare = prepare
    again = [names for names in alive if names.count("a") == 2]
    assert again and not any("c" in names or "d" in names for names in again[:1])
    assert world.timed == ["a", "c", "d"]
