"""Weights that travel: the split of a loader's time, the prices of the cure's steps, and what is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import GPU, MS, evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import LAYERS, LINK, PAGEABLE, TENSORS, Loading, model, overlapped, serial, too_small

from gpuopt.core.result import Finding
from gpuopt.doctor import streamed
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import rules

STEPS = ("GPU112", "GPU113", "GPU114", "GPU115", "GPU116", "GPU117")
MINE = {code: rules()[code] for code in (*STEPS, "GPU108")}


def told(subject: Evidence) -> dict[str, Finding]:
    return {f.code: f for f in diagnose(subject, table=MINE)}


def test_the_worst_loader_is_split_and_every_step_of_its_cure_has_a_price() -> None:
    """Reads each layer anew, from pageable memory, tensor by tensor, and waits for each."""
    tape = serial(memory="pageable", pieces=TENSORS, rate=PAGEABLE, read_ns=5 * MS, is_waiting=True, wakes_ns=40_000)
    subject = too_small(tape)
    found = streamed.streamed(subject)
    assert found is not None
    assert found.stall.load_ms == pytest.approx(LAYERS * 5, rel=0.05)
    assert found.stall.wait_ms == pytest.approx(LAYERS * TENSORS * 0.041, rel=0.3)
    assert found.stall.total_ms + found.compute_ms == pytest.approx(tape.ms, rel=0.02)
    parts = told(subject)
    assert {"GPU112", "GPU113", "GPU115", "GPU116", "GPU108"} <= set(parts)
    assert parts["GPU108"].gain_high_ms is None and "the host loads or prepares" in parts["GPU108"].message


@settings(max_examples=40, deadline=None)
@given(
    memory=st.sampled_from(["pageable", "pinned"]),
    pieces=st.sampled_from([1, 2, 4]),
    rate=st.floats(1e9, LINK),
    read_ns=st.integers(0, 8 * MS),
    is_waiting=st.booleans(),
    wakes_ns=st.integers(0, MS),
)
def test_the_steps_prices_never_add_up_to_more_than_the_device_waits(
    memory: str, pieces: int, rate: float, read_ns: int, is_waiting: bool, wakes_ns: int
) -> None:
    subject = too_small(
        serial(memory=memory, pieces=pieces, rate=rate, read_ns=read_ns, is_waiting=is_waiting, wakes_ns=wakes_ns), peak_bytes=300 * 2**20
    )
    found = streamed.streamed(subject)
    assert found is not None
    steps = (found.reload_ms, found.pin_ms, found.large_ms, found.wait_ms, found.overlap_ms, found.resident_ms)
    assert all(ms >= 0 for ms in steps)
    assert sum(steps) <= found.stall.total_ms * 1.0001 + 1e-6


def test_weights_that_fit_are_told_to_stay_and_nothing_else() -> None:
    assert set(told(evidence(serial(), module=model()))) == {"GPU108"}


def test_layers_that_stay_beside_others_that_travel_are_a_budget_even_where_all_would_fit() -> None:
    tape = Loading()
    for number in range(LAYERS):
        if number >= LAYERS // 2:
            index = tape.op("aten::copy_", dur_ns=0, module=f"{number}.0")
            tape.move("h2d", 32 * 2**20, 700_000, op=index)
        tape.layer(number)
    subject = evidence(tape, module=model())
    found = streamed.streamed(subject)
    assert found is not None and len(found.resident) == len(found.moved) == LAYERS // 2 and found.is_contiguous
    assert "GPU116" in told(subject)  # nothing overlaps at all: that comes before where layers lie


def test_free_memory_is_worth_the_layers_it_would_hold() -> None:
    subject = too_small(overlapped(copy_ns=3 * MS), peak_bytes=100 * 2**20)
    parts = told(subject)
    assert "GPU117" in parts and "free at the peak" in parts["GPU117"].message and "--budget" in parts["GPU117"].fix
    assert "GPU117" not in told(replace(subject, peak_bytes=int(0.95 * 400 * 2**20)))


def test_without_a_measured_link_nothing_is_priced_by_it() -> None:
    bare = replace(GPU, memory_bytes=400 * 2**20, ceilings=replace(GPU.ceilings, rows=()))
    found = streamed.streamed(too_small(serial(memory="pageable", rate=PAGEABLE), device=bare, peak_bytes=1))
    assert found is not None and found.pin_ms == 0 and found.resident_ms == 0
