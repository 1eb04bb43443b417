"""Who may load while others do: the longest build first and alone, then as many as memory holds; nobody waits for one that failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuopt.pipeline.admission import UNLIMITED, Door, free_bytes


class Guests:
    """Threads that go through a door and stay until they are told."""

    def __init__(self, door: Door, size: int = 10) -> None:
        self.door, self.size = door, size
        self.inside: list[str] = []
        self.most = 0
        self.go = {name: threading.Event() for name in "abcdef"}
        self.threads: list[threading.Thread] = []

    def come(self, name: str, *, fails: bool = False) -> None:
        def visit() -> None:
            try:
                with self.door.passing(name) as inside:
                    self.inside.append(name)
                    self.most = max(self.most, len(self.inside))
                    if fails:
                        raise ValueError(name)
                    inside.weighs(self.size)
                    self.go[name].wait(5)
                    self.inside.remove(name)
                    inside.leave()
            except ValueError:
                self.inside.remove(name)

        self.threads.append(threading.Thread(target=visit))
        self.threads[-1].start()

    def end(self) -> None:
        for event in self.go.values():
            event.set()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive(), "somebody still waits"


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 3
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def test_the_first_goes_first_and_the_others_as_memory_allows() -> None:
    guests = Guests(Door("c", available=lambda: 30))  # 0.8 x 30 holds two of 10 at once
    for name in "ab":
        guests.come(name)
    time.sleep(0.05)
    assert guests.inside == [], "nobody knows yet what one weighs"
    guests.come("c")
    assert until(lambda: len(guests.inside) == 2) and guests.inside[0] == "c"
    time.sleep(0.05)
    assert len(guests.inside) == 2
    guests.go["c"].set()
    assert until(lambda: sorted(guests.inside) == ["a", "b"])
    guests.end()
    assert guests.most == 2


def test_one_at_a_time_where_there_is_no_memory_for_two() -> None:
    guests = Guests(Door("a", available=lambda: 0))
    for name in "abc":
        guests.come(name)
    assert until(lambda: guests.inside == ["a"])
    guests.end()
    assert guests.most == 1


def test_a_first_that_fails_lets_the_others_in() -> None:
    guests = Guests(Door("a", available=lambda: UNLIMITED))
    guests.come("b")
    guests.come("a", fails=True)
    assert until(lambda: guests.inside == ["b"])
    guests.end()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max\n", 4096 * 1024), ("3000000\n", 3000000 - 2500000 + 500000)],
)
def test_a_container_may_have_less_than_the_machine(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9999 kB\nMemAvailable:    4096 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text("2500000\n")
    (group / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert free_bytes(tmp_path) == expected


def test_a_system_that_does_not_say_has_no_limit(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == UNLIMITED
