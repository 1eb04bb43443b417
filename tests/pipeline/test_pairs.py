"""Interleaving: every round meets every side, order is shuffled, one side's failure is its own."""

from __future__ import annotations

import pytest

from gpuopt.core.result import Samples
from gpuopt.core.spec import BenchSpec
from gpuopt.core.stats import MIN_PAIRS
from gpuopt.pipeline import pairs


def one(ns: int) -> Samples:
    return Samples(samples_ns=(ns, ns + 1), wall_ns=2 * ns, clock="fake", block_sizes=(2,))


def test_every_side_gets_one_block_a_round_in_shuffled_order() -> None:
    calls: list[str] = []

    def side(name: str, ns: int):
        def take() -> Samples:
            calls.append(name)
            return one(ns)

        return take

    blocks = pairs.interleave({"a": side("a", 10), "b": side("b", 20), "c": side("c", 30)}, BenchSpec(num_pairs=12))
    assert {k: len(v) for k, v in blocks.items()} == {"a": 12, "b": 12, "c": 12}
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_a_failing_side_leaves_and_the_others_go_on() -> None:
    count = 0

    def bad() -> Samples:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("gone")
        return one(5)

    lost: list[str] = []
    blocks = pairs.interleave({"good": lambda: one(1), "bad": bad}, BenchSpec(num_pairs=8), on_failure=lambda k, e: lost.append(k))
    assert lost == ["bad"]
    assert len(blocks["good"]) == 8 and len(blocks["bad"]) == 2


def test_without_a_handler_a_failure_is_not_swallowed() -> None:
    def bad() -> Samples:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        pairs.interleave({"bad": bad}, BenchSpec(num_pairs=2))


def test_time_runs_out_after_enough_pairs() -> None:
    now = 0.0

    def take() -> Samples:
        nonlocal now
        now += 10.0
        return one(1)

    blocks = pairs.interleave({"a": take, "b": take}, BenchSpec(num_pairs=100, max_time_s=1.0), clock=lambda: now)
    assert len(blocks["a"]) == len(blocks["b"]) == MIN_PAIRS


def test_blocks_survive_joining() -> None:
    blocks = [one(1), one(5), one(9)]
    joined = pairs.joined(blocks)
    assert joined.wall_ns == 30
    assert pairs.split(joined) == [b.samples_ns for b in blocks]
