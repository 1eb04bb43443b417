"""Live children on one device -> samples of each, block by block in shuffled order, so that whatever the machine does meets them all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from gpuopt.core.result import Samples
from gpuopt.core.spec import BenchSpec
from gpuopt.core.stats import MIN_PAIRS

Key = TypeVar("Key")


def interleave(
    sides: Mapping[Key, Callable[[], Samples]],
    spec: BenchSpec,
    *,
    beside: Mapping[Key, Callable[[], Samples]] | None = None,
    seed: int = 0,
    on_round: Callable[[float], None] | None = None,
    on_failure: Callable[[Key, Exception], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Key, list[Samples]]:
    """`sides` maps a key to a function that times one block; `beside` too, for what goes along and is no reason to go on. Returns each key's blocks in the order of the rounds.

    A side that raises is reported to `on_failure` and leaves; the others go on. Stops after `spec.num_pairs` rounds, or after
    `spec.max_time_s` a side once there are as many rounds as a verdict needs (stats.MIN_PAIRS).
    """
    order = random.Random(seed)
    calls = {**sides, **(beside or {})}
    blocks: dict[Key, list[Samples]] = {key: [] for key in calls}
    live: list[Key] = list(calls)
    began = clock()
    budget_s = spec.max_time_s * max(1, len(live))
    for number in range(spec.num_pairs):
        for key in order.sample(live, len(live)):
            try:
                blocks[key].append(calls[key]())
            except Exception as error:
                if on_failure is None:
                    raise
                live.remove(key)
                on_failure(key, error)
        if not any(key in sides for key in live):
            break
        if on_round is not None:
            on_round(max((number + 1) / spec.num_pairs, min(1.0, (clock() - began) / budget_s)))
        if number + 1 >= MIN_PAIRS and clock() - began > budget_s:
            break
    return blocks


def joined(blocks: Sequence[Samples]) -> Samples:
    """All blocks of one side as one value; `block_sizes` keeps them apart."""
    total = Samples()
    for block in blocks:
        total = total + block
    return total


def split(samples: Samples) -> list[tuple[int, ...]]:
    """The blocks again, from `block_sizes`."""
    found, start = [], 0
    for size in samples.block_sizes:
        found.append(samples.samples_ns[start : start + size])
        start += size
    return found
