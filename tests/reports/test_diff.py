"""Two reports -> verdicts a CI may act on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core import codec
from gpuopt.core.result import Report, Run, Stats, Status
from gpuopt.reports import diff, pairs

REPORT = codec.read_json(Report, Path(__file__).parents[1] / "golden" / "reports" / "bench.json")
RUN = REPORT.runs[0]


def stats(median: float, noise: float = 0.002) -> Stats:
    return Stats(
        num_samples=100, median=median, mean=median, min=median, max=median, ci95_low=median * (1 - noise), ci95_high=median * (1 + noise)
    )


def of(*runs: Run, **changes: Any) -> Report:
    return replace(REPORT, runs=runs, gates=(), **changes)


def verdict(before: float, after: float, noise: float = 0.002, threshold: float = 0.05) -> str:
    rows = diff.compare(
        of(replace(RUN, latency_ms=stats(before, noise))), of(replace(RUN, latency_ms=stats(after, noise))), threshold=threshold
    )
    return rows[0].verdict


@pytest.mark.parametrize(
    ("after", "noise", "wanted"),
    [
        (10.0, 0.002, "same"),
        (10.3, 0.002, "same"),
        (10.7, 0.002, "inconclusive"),
        (11.5, 0.002, "slower"),
        (20.0, 0.002, "slower"),
        (8.9, 0.002, "faster"),
        (9.8, 0.002, "same"),
        (10.4, 0.02, "inconclusive"),
        (10.0, 0.2, "inconclusive"),
        (5.0, 0.1, "faster"),
    ],
)
def test_a_change_counts_when_neither_noise_nor_drift_between_sessions_can_explain_it(after: float, noise: float, wanted: str) -> None:
    assert verdict(10.0, after, noise) == wanted


@given(st.floats(0.01, 1e4), st.floats(0.5, 2.0), st.floats(0.0001, 0.2), st.floats(0.0, 0.3))
def test_a_verdict_never_contradicts_its_figures(median: float, factor: float, noise: float, threshold: float) -> None:
    rows = diff.compare(
        of(replace(RUN, latency_ms=stats(median, noise))), of(replace(RUN, latency_ms=stats(median * factor, noise))), threshold=threshold
    )
    row = rows[0]
    assert row.change is not None and row.change_low is not None and row.change_high is not None
    assert row.change_low <= row.change <= row.change_high
    if row.verdict == "slower":
        assert factor > 1 + threshold
    elif row.verdict == "faster":
        assert factor < 1 / (1 + threshold)
    elif row.verdict == "same":
        assert row.change_high <= threshold
    else:
        assert row.reason
        assert row.change_high > threshold


@given(st.floats(0.01, 1e4), st.floats(1.001, 5.0))
def test_what_is_slower_one_way_is_not_slower_the_other_way(median: float, factor: float) -> None:
    assert not (verdict(median, median * factor) == "slower" and verdict(median * factor, median) != "faster")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "NVIDIA Y100"}, "other device: NVIDIA X100 before, NVIDIA Y100 after"),
        ({"num_sms": 99}, "other number of SMs"),
        ({"power_limit_w": 350.0}, "other power limit"),
        ({"memory_bytes": 1}, "other memory"),
    ],
)
def test_another_device_is_inconclusive_with_the_reason(change: dict[str, Any], why: str) -> None:
    assert REPORT.device is not None
    rows = diff.compare(of(RUN), of(RUN, device=replace(REPORT.device, **change)))
    assert rows[0].verdict == "inconclusive"
    assert why in rows[0].reason


def test_a_report_without_a_device_is_inconclusive() -> None:
    assert diff.compare(of(RUN, device=None), of(RUN))[0].verdict == "inconclusive"


@pytest.mark.parametrize(
    ("after", "wanted", "why"),
    [
        (replace(RUN, clock="perf_counter"), "inconclusive", "other clocks: cuda-event, perf_counter"),
        (replace(RUN, latency_ms=None), "inconclusive", "a latency is missing"),
        (replace(RUN, latency_ms=replace(stats(40.0), ci95_low=None)), "inconclusive", "too few samples"),
        (replace(RUN, options={"mode": 1}), "inconclusive", "options differ"),
        (replace(RUN, status=Status.CRASH, reason="SIGSEGV"), "broken", "crash: SIGSEGV"),
        (replace(RUN, status=Status.ACCURACY_FAIL, reason="logits"), "broken", "accuracy_fail: logits"),
        (replace(RUN, batch=8, dims={"N": 8}), "inconclusive", "not in the second report"),
        (replace(RUN, input_mode="host"), "inconclusive", "not in the second report"),
        (replace(RUN, precision="bf16"), "inconclusive", "not in the second report"),
    ],
)
def test_what_cannot_be_compared_is_never_guessed(after: Run, wanted: str, why: str) -> None:
    row = diff.compare(of(RUN), of(after))[0]
    assert row.verdict == wanted
    assert why in row.reason


def test_what_used_to_fail_is_fixed_and_what_is_new_is_not_judged() -> None:
    broken = replace(RUN, status=Status.CRASH, latency_ms=None)
    assert diff.compare(of(broken), of(RUN))[0].verdict == "fixed"
    rows = diff.compare(of(RUN), of(RUN, replace(RUN, backend="trt")))
    assert [row.verdict for row in rows] == ["same", "new"]
    assert len(diff.gates(rows)) == 1


def test_two_runs_of_one_name_are_not_mixed_up() -> None:
    rows = diff.compare(of(RUN, replace(RUN, options={"a": 1})), of(RUN))
    assert [row.verdict for row in rows] == ["inconclusive"]


def test_gates_fail_on_slower_broken_and_inconclusive_and_on_nothing_to_compare() -> None:
    for after, passed in ((10.0, True), (9.0, True), (10.7, False), (12.0, False)):
        rows = diff.compare(of(replace(RUN, latency_ms=stats(10.0))), of(replace(RUN, latency_ms=stats(after))))
        assert [gate.passed for gate in diff.gates(rows)] == [passed]
    unsure = diff.compare(of(RUN, device=None), of(RUN))
    assert not diff.gates(unsure)[0].passed
    assert diff.gates(unsure, allow_inconclusive=True)[0].passed
    assert not diff.gates(diff.compare(of(), of(RUN)))[0].passed
    broken = diff.compare(of(RUN), of(replace(RUN, status=Status.CRASH)))
    assert not diff.gates(broken, allow_inconclusive=True)[0].passed


def test_the_report_of_a_comparison_names_what_moved_in_the_environment() -> None:
    after = of(RUN, environment=replace(REPORT.environment, packages={**REPORT.environment.packages, "torch": "9.9"}))
    found = pairs.compared(of(RUN), after, command="gpuopt compare a b")
    assert [x.message for x in found.findings] == ["torch changed: 2.11.0+cu130 -> 9.9"]
    assert found.verb == "compare"
    assert codec.from_json(Report, codec.to_json(found)) == found


def test_a_baseline_adds_its_gates_to_a_report(tmp_path: Path) -> None:
    from gpuopt.core.spec import Gates

    path = tmp_path / "main.json"
    path.write_text(codec.to_json(of(replace(RUN, latency_ms=stats(10.0)))))
    slow = of(replace(RUN, latency_ms=stats(13.0)))
    judged = diff.against_baseline(slow, Gates(baseline=str(path), max_slowdown=0.1))
    assert [gate.passed for gate in judged.gates] == [False]
    assert judged.gates[0].limit == "at most 10% slower"
    assert judged.tables["compare"][0]["verdict"] == "slower"
    assert diff.against_baseline(slow, Gates()) is slow


def test_runs_of_one_name_say_how_one_is_chosen() -> None:
    twice = replace(of(RUN), runs=(RUN, replace(RUN, inputs=("x:float32[2,8]",))))
    assert "--run" in (diff.compare(of(RUN), twice)[0].reason or "")
