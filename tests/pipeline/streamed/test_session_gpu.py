"""`gpuopt stream` on a GPU: bit for bit the model, within its budget, near its bound and its prediction."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import streams

from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.streamed import eager
from gpuopt.pipeline.streamed.session import StreamSession

pytestmark = pytest.mark.gpu

LARGE = streams.FACTORY.replace("Stack().eval()", "Stack(depth=24, width=2048).half().eval()")
"""24 blocks of 32 MiB: large enough for the link's rate."""


@pytest.fixture
def session(tmp_path: Path) -> Iterator[StreamSession]:
    with streams.on_a_gpu(tmp_path, LARGE, N=1, S=4) as found:
        yield found


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_streamed_model_is_the_model_bit_for_bit(session: StreamSession, share: float) -> None:
    found = session.verify(StreamSpec(budget_share=share), forwards=40)
    assert {check.name: check.passed for check in found.checks} == dict.fromkeys(("checksums", "outputs", "races", "order"), True)


def test_a_model_compiled_block_by_block_is_that_model_bit_for_bit(session: StreamSession) -> None:
    found = session.verify(StreamSpec(budget_share=0.5, compile=True), forwards=20)
    assert {check.name: check.passed for check in found.checks} == dict.fromkeys(("checksums", "outputs", "races", "order"), True)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_forward_takes_what_the_plan_says_and_is_near_the_bound(session: StreamSession, share: float) -> None:
    ready = session.bind(StreamSpec(budget_share=share))
    torch.cuda.reset_peak_memory_stats()  # of laying out, and of calibrating with everything resident
    session.warm()
    assert ready.plan is not None and ready.pinned_bytes >= ready.plan.streamed_bytes
    ordered = sorted(session.block(30).samples_ns)
    middle = ordered[len(ordered) // 2] / 1e6
    assert middle == pytest.approx(ready.plan.predicted_ms, rel=0.10)
    assert 100 * ready.plan.bound_ms / middle >= 90
    assert session.demand_fetches == 0
    peak = torch.cuda.max_memory_allocated()
    ledger = ready.plan.ledger
    assert peak <= ledger.total - ledger.context


def test_everything_that_fits_costs_next_to_nothing(session: StreamSession) -> None:
    session.bind(StreamSpec(budget_share=1.0))
    session.warm()
    wanted, taken = session.answer(), torch.cuda.memory_allocated()
    assert session.plain().apart
    assert torch.cuda.memory_allocated() > 1.8 * taken, "plain eager has weights of its own"
    streamed, plain = [], []
    for number in range(40):  # in turns: the launching host is shared
        for is_plain in (False, True) if number % 2 else (True, False):
            (plain if is_plain else streamed).append(session.block(10, plain=is_plain).samples_ns)
    assert session.answer() == wanted
    over = eager.ratio(streamed, plain)
    assert over.under(1.0) != "missed", over
    session.unplain()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= 1.05 * taken
