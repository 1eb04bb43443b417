"""The protocol on its own, without modules."""

import pytest
import torch

from gpuopt.core.errors import UsageError
from gpuopt.streaming.engines.simulated import SimulatedEngine
from gpuopt.streaming.streamer import Streamer


class Bytes:
    """A source that writes down what it is asked for."""

    def __init__(self, plan) -> None:
        self.calls: list[tuple[str, str]] = []
        self.slabs = {u.name: torch.full((u.num_bytes,), i + 1, dtype=torch.uint8) for i, u in enumerate(plan.anatomy.units)}
        self.fails_on = ""

    def bytes_for_copy(self, unit):
        self.calls.append(("copy", unit))
        if unit == self.fails_on:
            raise OSError("the disk is gone")
        return self.slabs[unit]

    def release(self, unit):
        self.calls.append(("release", unit))

    def abort(self):
        self.calls.append(("abort", ""))

    def read(self, unit):
        return self.slabs[unit]

    def close(self):
        pass


@pytest.fixture
def made(stack, planned):
    def make(num_slots=2, **options):
        plan = planned(stack(), num_slots=num_slots, **options)
        source = Bytes(plan)
        engine = SimulatedEngine(1e9, schedule="late")
        return Streamer(plan, engine, dict.fromkeys(plan.binding, source), poison=True), source

    return make


def run(streamer, order):
    """Units, one after the other; each must find its own bytes."""
    streamer.start_forward()
    for index in order:
        name = f"blocks.{index}"
        lane = streamer.lanes[name]
        streamer.before(name)
        assert lane.target.eq(index + 1).all()
        with streamer.engine.segment(name, lane.slot.buffer):
            pass
        streamer.after(name)


def test_units_are_fetched_a_round_ahead_and_released(made):
    streamer, source = made()
    run(streamer, range(6))
    copied = [unit for call, unit in source.calls if call == "copy"]
    assert copied == [f"blocks.{i}" for i in (0, 1, 2, 3, 4, 5, 0, 1)]
    assert [unit for call, unit in source.calls if call == "release"] == copied
    assert streamer.demand_fetches == 0 and streamer.copies == 8 and streamer.bytes == 8 * 1536


def test_an_order_that_stays_another_is_learnt_from_one_forward(made):
    streamer, _ = made()
    for _ in range(2):
        run(streamer, [5, 0, 4, 1, 3, 2])
    learnt = streamer.demand_fetches
    assert learnt > 0
    for _ in range(3):
        run(streamer, [5, 0, 4, 1, 3, 2])
    assert streamer.demand_fetches == learnt and streamer.engine.races == []
    run(streamer, range(6))
    run(streamer, range(6))
    again = streamer.demand_fetches
    run(streamer, range(6))
    assert streamer.demand_fetches == again > learnt


def test_a_forward_that_leaves_units_out_teaches_nothing(made):
    streamer, _ = made()
    run(streamer, [3, 1])
    run(streamer, range(6))
    before = streamer.demand_fetches
    run(streamer, range(6))
    assert streamer.demand_fetches == before


def test_a_source_that_fails_leaves_no_slot_that_passes_for_full(made):
    streamer, source = made()
    run(streamer, range(6))
    source.fails_on = "blocks.2"
    with pytest.raises(OSError, match="the disk is gone"):
        run(streamer, range(6))
    streamer.abort()
    assert ("abort", "") in source.calls and streamer.generation == 1
    source.fails_on = ""
    run(streamer, range(6))
    assert streamer.engine.races == []


def test_a_slot_whose_reader_is_under_way_is_not_given_to_another_unit(made):
    streamer, _ = made()
    streamer.start_forward()
    streamer.before("blocks.0")
    with pytest.raises(UsageError, match=r"blocks\.2 was called while blocks\.0 was running"):
        streamer.before("blocks.2")
    streamer.before("blocks.1")
    streamer.after("blocks.1")
    streamer.after("blocks.0")


def test_a_single_forward_fetches_each_unit_once(made):
    streamer, _ = made(once=True)
    run(streamer, range(6))
    assert streamer.copies == 6
    run(streamer, range(6))
    assert streamer.copies == 12 and streamer.demand_fetches == 0


def test_slots_are_as_large_as_the_plan_says(made):
    streamer, _ = made(num_slots=3)
    assert [slot.buffer.numel() for slot in streamer.slots["blocks"]] == [1536] * 3
