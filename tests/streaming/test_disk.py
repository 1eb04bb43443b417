"""The ring: right bytes in every order, on slow, failing and hanging disks, under copies that come late; and threads that end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.streaming import Anatomy, Place, Unit
from gpuopt.streaming import bound as binding
from gpuopt.streaming import disk, meta, packed, reading, shards
from gpuopt.streaming.engines.simulated import SimulatedEngine

SIZES = [40_000, 4096, 9_000_000, 123_456, 512, 17_000_000]


class Made:
    """Units of bytes from a seed."""

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        target.copy_(expected(unit))

    def fingerprint(self) -> str:
        return "made"


def expected(unit: Unit) -> torch.Tensor:
    return torch.randint(0, 256, (unit.num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(unit.order))


def unit_of(order: int, num_bytes: int) -> Unit:
    place = Place(name=f"w{order}", dtype="uint8", shape=(num_bytes,), stride=(1,), offset=0, num_bytes=num_bytes)
    return Unit(name=f"layers.{order}", ring="layers", order=order, num_bytes=num_bytes, places=(place,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "packed"
    anatomy = Anatomy(units=tuple(unit_of(i, n) for i, n in enumerate(SIZES)), fixed={})
    packed.pack(Made(), anatomy, path).close()
    return path


@pytest.fixture
def units() -> list[Unit]:
    return [unit_of(i, n) for i, n in enumerate(SIZES)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("gpuopt-")]


def engine(schedule: str = "early") -> SimulatedEngine:
    return SimulatedEngine(1e9, schedule=schedule)  # type: ignore[arg-type]


def taken(ring: disk.Ring, unit: Unit, link: SimulatedEngine) -> torch.Tensor:
    """As a streamer does it: ask, queue the copy, release."""
    target = torch.zeros(unit.num_bytes, dtype=torch.uint8)
    link.copy(target, ring.bytes_for_copy(unit.name))
    ring.release(unit.name)
    return target


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
@pytest.mark.parametrize(("num_buffers", "num_threads"), [(2, 1), (3, 8)])
def test_forward_after_forward_gets_the_right_bytes_however_late_copies_are(
    folder: Path, units: list[Unit], schedule: str, num_buffers: int, num_threads: int
) -> None:
    link = engine(schedule)
    with disk.Ring(link, folder, units, num_buffers, num_threads) as ring:
        copies = [(unit, taken(ring, unit, link)) for _ in range(3) for unit in units]
        link.drain()
        assert all(torch.equal(target, expected(unit)) for unit, target in copies)
        assert ring.misses == 0, "the order was the plan's, round and round"
        assert ring.bytes_read >= 3 * sum(SIZES) and (ring.bytes_per_s or 0) > 0


@pytest.mark.parametrize("seed", range(4))
def test_any_order_is_right_if_slower(folder: Path, units: list[Unit], seed: int) -> None:
    generator, link = random.Random(seed), engine("late")
    with disk.Ring(link, folder, units, generator.choice([2, 3, 4]), 4) as ring:
        wanted = [generator.choice(units) for _ in range(25)]
        copies = [(unit, taken(ring, unit, link)) for unit in wanted]
        link.drain()
        assert all(torch.equal(target, expected(unit)) for unit, target in copies)


def test_an_order_that_changes_for_good_is_learnt(folder: Path, units: list[Unit]) -> None:
    link = engine()
    decoder = units[3:]  # an encoder runs once, then a decoder again and again
    with disk.Ring(link, folder, units, 3, 4) as ring:
        for unit in units:
            taken(ring, unit, link)
        for _ in range(2):
            for unit in decoder:
                taken(ring, unit, link)
        before = ring.misses
        for _ in range(5):
            for unit in decoder:
                assert torch.equal(taken(ring, unit, link), expected(unit))
        assert ring.misses == before


def test_a_unit_asked_for_twice_before_its_release_is_one_buffer(folder: Path, units: list[Unit]) -> None:
    with disk.Ring(engine(), folder, units, 2, 2) as ring:
        one, two = ring.bytes_for_copy("layers.0"), ring.bytes_for_copy("layers.0")
        assert one.data_ptr() == two.data_ptr()
        ring.release("layers.0")
        assert torch.equal(ring.bytes_for_copy("layers.1"), expected(units[1]))
        assert torch.equal(one, expected(units[0])), "still held once"
        ring.release("layers.1")
        ring.release("layers.0")


def test_bytes_that_are_held_are_never_overwritten(folder: Path, units: list[Unit]) -> None:
    with disk.Ring(engine(), folder, units, 3, 8) as ring:
        held = ring.bytes_for_copy("layers.2")
        for unit in [units[3], units[5], units[0], units[5]]:
            assert torch.equal(ring.bytes_for_copy(unit), expected(unit))
            ring.release(unit)
        assert torch.equal(held, expected(units[2]))
        ring.release("layers.2")


def test_holding_every_buffer_is_said_and_does_not_hang(folder: Path, units: list[Unit]) -> None:
    with disk.Ring(engine(), folder, units, 2, 2) as ring:
        ring.bytes_for_copy("layers.0")
        ring.bytes_for_copy("layers.1")
        with pytest.raises(ValueError, match="all 2 buffers"):
            ring.bytes_for_copy("layers.2")


def test_an_aborted_forward_frees_what_it_held(folder: Path, units: list[Unit]) -> None:
    link = engine("late")
    with disk.Ring(link, folder, units, 2, 2) as ring:
        ring.bytes_for_copy("layers.0")
        ring.bytes_for_copy("layers.1")
        ring.abort()
        copies = [(unit, taken(ring, unit, link)) for unit in units]
        link.drain()
        assert all(torch.equal(target, expected(unit)) for unit, target in copies)


def slow(monkeypatch: pytest.MonkeyPatch, delay: Callable[[int, int], None]) -> None:
    real = os.preadv

    def read(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        delay(fd, offset)
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", read)


def test_the_next_unit_is_read_while_this_one_is_computed(folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, lambda *_: time.sleep(0.03))
    link = engine()
    with disk.Ring(link, folder, units, 4, 8) as ring:
        for unit in units:
            taken(ring, unit, link)
        time.sleep(0.5)  # a long computation
        waited = ring.waited_s
        for unit in units[:3]:
            taken(ring, unit, link)
        assert ring.waited_s - waited < 0.02


def test_an_error_of_the_disk_reaches_the_forward_and_the_next_one_may_succeed(
    folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = threading.Event()
    failing.set()

    def delay(fd: int, offset: int) -> None:
        if failing.is_set() and offset >= 4 << 20 and "unit-00002" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")

    slow(monkeypatch, delay)
    link = engine()
    with disk.Ring(link, folder, units, 3, 4) as ring:
        for unit in units[:2]:
            taken(ring, unit, link)
        with pytest.raises(ResourceError, match=r"unit-00002.bin: reading \d+ bytes at byte [4-8]\d{6} failed: Input/output error"):
            ring.bytes_for_copy(units[2])
        failing.clear()
        for unit in [units[2], *units]:
            assert torch.equal(taken(ring, unit, link), expected(unit))


def test_an_error_ahead_of_the_forward_does_not_disturb_what_comes_before(
    folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def delay(fd: int, offset: int) -> None:
        if "unit-00001" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")

    slow(monkeypatch, delay)
    link = engine()
    with disk.Ring(link, folder, units, 4, 2) as ring:
        time.sleep(0.1)
        assert torch.equal(taken(ring, units[0], link), expected(units[0]))
        assert torch.equal(taken(ring, units[2], link), expected(units[2])), "the failed one was skipped"
        with pytest.raises(ResourceError, match="unit-00001"):
            ring.bytes_for_copy(units[1])


def test_a_file_cut_off_under_a_running_ring_is_an_error(tmp_path: Path, units: list[Unit]) -> None:
    anatomy = Anatomy(units=tuple(units), fixed={})
    packed.pack(Made(), anatomy, tmp_path / "p").close()
    link = engine()
    with disk.Ring(link, tmp_path / "p", units, 2, 4) as ring:
        taken(ring, units[0], link)
        os.truncate(tmp_path / "p" / "unit-00005.bin", 8_400_000)
        with pytest.raises(BadInput, match="unit-00005.bin ends at byte 8400000"):
            for unit in units[1:]:
                taken(ring, unit, link)


def test_a_flipped_bit_is_noticed_the_first_time_a_unit_is_read(tmp_path: Path, units: list[Unit]) -> None:
    packed.pack(Made(), Anatomy(units=tuple(units), fixed={}), tmp_path / "p").close()
    with (tmp_path / "p" / "unit-00002.bin").open("r+b") as file:
        file.seek(8_900_000)
        byte = file.read(1)[0]
        file.seek(8_900_000)
        file.write(bytes([byte ^ 1]))
    link = engine()
    with disk.Ring(link, tmp_path / "p", units, 3, 8) as ring:
        taken(ring, units[0], link)
        taken(ring, units[1], link)
        for _ in range(2):  # and again: what is damaged stays so
            with pytest.raises(BadInput, match="unit-00002.bin .* is damaged"):
                ring.bytes_for_copy(units[2])


def test_a_disk_that_hangs_is_an_error_and_closing_does_not_wait_for_it(
    folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, hangs = threading.Event(), threading.Event()

    def delay(*_: int) -> None:
        if hangs.is_set():
            gone.wait(30)

    slow(monkeypatch, delay)
    monkeypatch.setattr(disk, "JOIN_S", 0.2)
    hangs.set()
    ring = disk.Ring(engine(), folder, units, 2, 2, stuck_s=0.6)
    with pytest.raises(ResourceError, match="not a byte came"):
        ring.bytes_for_copy("layers.0")
    began = time.monotonic()
    ring.close()
    assert time.monotonic() - began < 2 and "hang" in ring.notes[0]
    assert ring._buffers[0].home.bytes.numel(), "memory that a read may still write to is kept"
    gone.set()
    for thread in ring._threads:
        thread.join(5)
    disk._hanging.remove(ring)


def test_closing_ends_the_threads_promptly_in_the_middle_of_reads(folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, lambda *_: time.sleep(0.05))
    for _ in range(5):
        ring = disk.Ring(engine(), folder, units, 4, 8)
        began = time.monotonic()
        ring.close()
        ring.close()
        assert time.monotonic() - began < 1.0 and not any(thread.is_alive() for thread in ring._threads)
    with pytest.raises(ValueError, match="closed"):
        ring.bytes_for_copy("layers.0")


def test_the_rate_counts_the_time_in_which_something_was_read(folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, lambda *_: time.sleep(0.02))
    link = engine()
    with disk.Ring(link, folder, units, 2, 1) as ring:
        began = time.monotonic()
        for unit in units:
            taken(ring, unit, link)
        took = time.monotonic() - began
        time.sleep(0.4)  # nothing is read once the buffers are full
        rate = ring.bytes_per_s
        assert rate is not None and rate > sum(SIZES) / (took + 0.3) and rate < ring.bytes_read / 0.1


def test_the_true_bytes_can_be_read_past_the_ring(folder: Path, units: list[Unit]) -> None:
    with disk.Ring(engine(), folder, units, 2, 2) as ring:
        assert all(torch.equal(ring.read(unit.name), expected(unit)) for unit in units)


def test_a_ring_that_cannot_be_leaves_nothing_open(folder: Path, units: list[Unit]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match="cannot be locked"):
        disk.Ring(SimulatedEngine(1e9, max_pinned_bytes=0), folder, units)
    with pytest.raises(UsageError, match="holds no unit other"):
        disk.Ring(engine(), folder, [dataclasses.replace(units[0], name="other")])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_is_measured_past_the_page_cache_or_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, lambda *_: time.sleep(0.01))
    found = disk.measure_disk(folder, 0.3, num_threads=2)
    assert found.num_bytes > 0 and 0.1 < found.seconds < 5 and found.bytes_per_s == pytest.approx(found.num_bytes / found.seconds)
    assert found.is_direct == all("remembers" in note for note in found.notes)
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    cached = disk.measure_disk(folder, 1.0)
    assert not cached.is_direct and "page cache" in cached.notes[-1]
    assert cached.num_bytes == sum((n + 4095) // 4096 * 4096 for n in SIZES), "each byte once: the second time it would come from memory"


def test_a_model_read_from_a_disk_again_and_again_computes_what_it_did_in_memory(tmp_path: Path, planned: Callable[..., Any]) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 64)
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    torch.manual_seed(0)
    model, x = Chain().eval(), torch.randn(3, 8)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    with torch.no_grad():
        wanted = model(x)
    with shards.opened(tmp_path / "m.safetensors") as files:
        weights = meta.empty(Chain, files)
        weights.module.eval()
        plan = planned(weights.module, homes={f"layers.{i}": "disk" for i in (1, 3, 4, 5)}, resident=("layers.0",))
        on_disk = [unit for unit in plan.anatomy.units if plan.homes.get(unit.name) == "disk"]
        packed.pack(weights, plan.anatomy, tmp_path / "p").close()
        link = SimulatedEngine(1e9, schedule="late")
        with disk.Ring(link, tmp_path / "p", on_disk) as ring:
            with binding.bind(weights.module, plan, link, {unit.name: ring for unit in on_disk}, weights) as bound, torch.no_grad():
                for _ in range(4):
                    assert torch.equal(bound.module(x), wanted)
                assert link.races == []
            assert ring.bytes_read > 0 and ring.misses == 0


class Throttled:
    """A disk of a rate that takes a few requests at once to reach: each is served at a share of it, and all together at no more."""

    def __init__(self, bytes_per_s: float, depth: int = 4) -> None:
        self.bytes_per_s, self.depth = bytes_per_s, depth
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.read_into = reading.File.read_into

    def __call__(self, file: reading.File, offset: int, target: torch.Tensor) -> None:
        now = time.monotonic()
        with self._lock:
            self._free_at = max(self._free_at, now) + target.numel() / self.bytes_per_s
            done = max(self._free_at, now + target.numel() * self.depth / self.bytes_per_s)
        self.read_into(file, offset, target)
        time.sleep(max(0.0, done - time.monotonic()))


@pytest.mark.parametrize(("num_bytes", "num_buffers"), [(4 << 20, 3), (6 << 20, 2), (11 << 20, 3)])
def test_the_ring_keeps_a_disk_busy_at_85_percent_of_its_rate_or_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, num_buffers: int
) -> None:
    many = [unit_of(order, num_bytes) for order in range(6)]
    packed.pack(Made(), Anatomy(units=tuple(many), fixed={}), tmp_path / "packed").close()
    throttle = Throttled(100e6)
    monkeypatch.setattr(reading.File, "read_into", lambda file, offset, target: throttle(file, offset, target))
    link = engine()
    with disk.Ring(link, tmp_path / "packed", many, num_buffers) as ring:
        taken(ring, many[0], link)  # the first one, nobody could read ahead
        began, before = time.monotonic(), ring.bytes_read
        wanted = [*many[1:], *many]  # round once
        for unit in wanted:
            taken(ring, unit, link)
            time.sleep(0.1 * num_bytes / throttle.bytes_per_s)  # computed, while the next ones are read
        took = time.monotonic() - began
        assert ring.misses == 0 and before >= num_bytes
    assert len(wanted) * num_bytes / took >= 0.85 * throttle.bytes_per_s


class Killed(BaseException):
    """What ends a thread, as SystemExit does."""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_order_no_abort_and_no_failing_reader_stops_the_ring_or_gives_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.sampled_from([1, 511, 4096, 4097, 70_000, 1_100_000, 2_500_000]), min_size=1, max_size=6))
    many = [unit_of(order, size) for order, size in enumerate(sizes)]
    folder = tmp_path_factory.mktemp("ring") / "packed"
    packed.pack(Made(), Anatomy(units=tuple(many), fixed={}), folder).close()
    link = engine(data.draw(st.sampled_from(["late", "early", "random"])))
    failing = data.draw(st.sets(st.integers(0, 40), max_size=4))
    kind = data.draw(st.sampled_from([OSError(5, "Input/output error"), Killed(), MemoryError()]))
    steps = data.draw(
        st.lists(st.one_of(st.sampled_from(range(len(many))), st.just("abort"), st.just("hold"), st.just("round")), max_size=25)
    )
    count = itertools.count()
    real = reading.File.read_into

    def read_into(file: reading.File, offset: int, target: torch.Tensor) -> None:
        if next(count) in failing:
            raise kind
        real(file, offset, target)

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.File, "read_into", read_into)
        ring = disk.Ring(link, folder, many, data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4)), stuck_s=20.0)
        copies: list[tuple[Unit, torch.Tensor]] = []
        with ring:
            for step in [*steps, "round"]:
                try:
                    if step == "abort":
                        ring.abort()
                    elif step == "hold":  # a forward that breaks off between asking and releasing
                        ring.bytes_for_copy(many[0].name)
                        ring.abort()
                    else:
                        for unit in many if step == "round" else [many[step]]:
                            copies.append((unit, taken(ring, unit, link)))
                except (OSError, Killed, MemoryError):
                    ring.abort()
            failing.clear()
            for unit in many:  # and once nothing fails any more, it goes on
                copies.append((unit, retried(ring, unit, link)))
            link.drain()
    assert all(torch.equal(target, expected(unit)) for unit, target in copies)
    assert time.monotonic() - began < 15.0, "nobody waited for somebody who was gone"


def retried(ring: disk.Ring, unit: Unit, link: SimulatedEngine) -> torch.Tensor:
    """What was read ahead while reads failed says so once, to whom it belongs."""
    try:
        return taken(ring, unit, link)
    except (OSError, Killed, MemoryError):
        return taken(ring, unit, link)


def test_a_reader_that_is_killed_is_an_error_of_the_forward_at_once(
    folder: Path, units: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reading.File.read_into

    def read_into(file: reading.File, offset: int, target: torch.Tensor) -> None:
        if file.path.name == "unit-00002.bin":
            raise Killed("ended by somebody")
        real(file, offset, target)

    monkeypatch.setattr(reading.File, "read_into", read_into)
    link = engine()
    began = time.monotonic()
    with disk.Ring(link, folder, units, 2, 1) as ring:
        for unit in units[:2]:
            taken(ring, unit, link)
        with pytest.raises(Killed, match="ended by somebody"):
            ring.bytes_for_copy(units[2].name)
        ring.abort()
        assert torch.equal(taken(ring, units[3], link), expected(units[3]))
    assert time.monotonic() - began < 10.0


def test_a_disk_that_answers_faster_the_second_time_is_told_by_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, int]] = set()
    real = reading.File.read_into
    monkeypatch.setattr(reading.File, "heeds_direct", lambda file: True)

    def read_into(file: reading.File, offset: int, target: torch.Tensor) -> None:
        real(file, offset, target)
        if target.numel() > 4096 and (file.name, offset) not in seen:
            seen.add((file.name, offset))
            time.sleep(0.1)

    monkeypatch.setattr(reading.File, "read_into", read_into)
    found = disk.measure_disk(folder, 5.0, num_threads=1)
    if found.is_direct:
        assert "times as fast" in found.notes[-1] and found.num_bytes == sum((n + 4095) // 4096 * 4096 for n in SIZES)


def test_o_direct_that_is_accepted_and_not_heeded_is_no_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.File, "heeds_direct", lambda file: False)
    found = disk.measure_disk(folder, 0.5)
    assert not found.is_direct and "page cache" in found.notes[-1]
