"""A child whose plan streams nothing -> what that adds to plain eager in the same process, and how far plain eager in other processes lies from it. The parent's side.

Blocks go in turns, in shuffled order (`pairs`); a figure is the median ratio of the pairs with its interval, since a difference of 1% is smaller than what a host does from one
second to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from gpuopt.core import stats
from gpuopt.core.progress import Progress
from gpuopt.core.result import Samples
from gpuopt.core.spec import BenchSpec
from gpuopt.core.streamed import OtherEager, OverEager, Ratio, StreamRequest
from gpuopt.pipeline import pairs
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.streamed.arms import BLOCK_CALLS, Arm
from gpuopt.pipeline.streamed.facts import Plained, Timed

TURNS = BenchSpec(num_pairs=60, max_time_s=30.0)
"""With the others. Blocks that scatter by 1% each know the ratio to 0.4% after sixty pairs."""
ALONE = BenchSpec(num_pairs=120, max_time_s=60.0)
"""And without them: a forward that waits for the host scatters by several percent, and the question is one percent."""
BLOCK_TOKENS = 16
"""Of a generation: many short blocks tell more than few long ones."""
_STREAMED, _EAGER = "streamed", "plain eager"


def over_eager(
    own: Arm,
    others: Mapping[str, Arm],
    request: StreamRequest,
    progress: Progress,
    *,
    on_lost: Callable[[str, str], None] = lambda name, reason: None,
    turns: BenchSpec | None = None,
) -> OverEager:
    """`own` is bound and warm, and `others`, by name, run everything resident. Raises ChildFailed where `own` is gone; one of the others that fails is told to `on_lost` and left out.

    turns: how many, and for how long at most, and no more without the others; TURNS and ALONE unless told.
    """
    tokens = min(request.generate, BLOCK_TOKENS) if request.generate else None
    count = 1 if tokens else BLOCK_CALLS

    def side(arm: Arm, *, plain: bool = False) -> Callable[[], Samples]:
        return lambda: Samples(samples_ns=arm.ask("block", Timed, count=count, tokens=tokens, plain=plain).samples_ns)

    def gone(name: str, error: Exception) -> None:
        if name in (_STREAMED, _EAGER) or not isinstance(error, ChildFailed):
            raise error
        on_lost(name, error.reason)

    try:
        made = own.ask("plain", Plained)
        sides = {_STREAMED: side(own), _EAGER: side(own, plain=True)}
        found = pairs.interleave(
            sides,
            turns or TURNS,
            beside={name: side(arm) for name, arm in others.items()},
            on_round=lambda share: progress.update(own.key, share if turns else share / 2, "timing in turns with plain eager"),
            on_failure=gone,
        )
        if turns is None:
            more = pairs.interleave(
                sides, ALONE, seed=1, on_round=lambda share: progress.update(own.key, (1 + share) / 2, "timing in turns with plain eager")
            )
            for name, timed in more.items():
                found[name] += timed
        own.ask("unplain", type(None))
    except ChildFailed as failure:
        if not own.child.alive:
            raise
        own.ask("unplain", type(None))
        return OverEager(reason=failure.reason)
    blocks = {name: [block.samples_ns for block in each] for name, each in found.items()}
    return told(blocks.pop(_STREAMED), blocks.pop(_EAGER), blocks, apart=made.apart)


def told(
    streamed: Sequence[Sequence[int]], eager: Sequence[Sequence[int]], others: Mapping[str, Sequence[Sequence[int]]], *, apart: bool
) -> OverEager:
    """Blocks of samples, nanoseconds, by rounds: whoever left early has the first ones."""
    return OverEager(
        over=ratio(streamed, eager),
        streamed_ms=_ms(streamed),
        eager_ms=_ms(eager),
        block_forwards=len(eager[0]),
        apart=apart,
        others=tuple(OtherEager(name=name, median_ms=_ms(blocks), over=ratio(blocks, eager)) for name, blocks in others.items() if blocks),
    )


def ratio(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> Ratio:
    """Of the medians of blocks, pair by pair."""
    found = stats.compare_pairs(above, below[: len(above)])
    if found.num_pairs < stats.MIN_PAIRS:
        return Ratio(ratio=found.ratio, num_pairs=found.num_pairs)
    return Ratio(ratio=found.ratio, low=found.ci95_low, high=found.ci95_high, num_pairs=found.num_pairs)


def _ms(blocks: Sequence[Sequence[int]]) -> float:
    return median(ns for block in blocks for ns in block) / stats.NS_PER_MS
