"""Two runs part by part, and which runs stand against each other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from gpuopt.core import codec
from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.result import Report, Run, Status
from gpuopt.reports import console, html, pairs
from gpuopt.reports.changes import Change
from gpuopt.reports.content import changes as shown
from gpuopt.reports.content.blocks import View

GOLDEN = Path(__file__).parents[1] / "golden" / "reports"
COMPARED = codec.read_json(Report, GOLDEN / "compare.json")
EAGER = codec.read_json(Report, GOLDEN / "profile.json")
BENCH = codec.read_json(Report, GOLDEN / "bench.json")
H200 = Path(__file__).parents[2] / "recipes" / "profile"


def the_change(report: Report = COMPARED) -> Change:
    (found,) = shown.of_report(report)
    return found


@pytest.mark.parametrize("side", ["before_ms", "after_ms"])
def test_parts_modules_and_kernels_add_up_to_either_call(side: str) -> None:
    change = the_change()
    whole = getattr(change, side)
    for rows in (change.waterfall, change.kernels, change.ops, change.lines):
        assert math.fsum(getattr(row, side) or 0.0 for row in rows) == pytest.approx(whole)


def test_differences_add_up_to_the_difference_of_the_calls() -> None:
    change = the_change()
    for rows in (change.waterfall, change.kernels, change.ops):
        assert math.fsum(row.change_ms for row in rows) == pytest.approx(change.after_ms - change.before_ms)


def test_kernels_that_came_and_went_are_told_apart_from_those_that_changed() -> None:
    rows = {row.name: row for row in the_change().kernels}
    assert rows["triton_poi_fused_batch_norm_relu_0"].before_ms is None
    assert rows["batch_norm_transform_input_kernel"].after_ms is None
    text = console.text(COMPARED, width=140)
    assert "new" in text and "gone" in text and "? not attributed" in text


def test_two_reports_of_one_run_each_are_compared_whatever_the_runs_are() -> None:
    row = COMPARED.tables["compare"][0]
    assert row["verdict"] == "faster" and "backend eager -> inductor" in row["reason"]
    assert (the_change().before, the_change().after) == ("eager", "inductor")


def test_the_same_question_twice_is_before_and_after() -> None:
    found = pairs.compared(EAGER, EAGER)
    assert (the_change(found).before, the_change(found).after) == ("before", "after")
    assert all(row.change_ms == 0 for row in the_change(found).waterfall)
    assert found.tables["compare"][0]["verdict"] == "same"


def test_runs_of_other_sizes_have_no_verdict_but_their_waterfalls() -> None:
    other = replace(EAGER, runs=(replace(EAGER.runs[0], dims={"N": 8}, batch=8),))
    found = pairs.compared(EAGER, other)
    assert found.tables["compare"][0]["verdict"] == "inconclusive" and "not the same work" in found.tables["compare"][0]["reason"]
    assert the_change(found).waterfall


def test_the_first_run_of_a_report_stands_against_its_others_without_a_gate() -> None:
    found = pairs.compared(BENCH)
    assert len(found.tables["compare"]) == len(BENCH.runs) - 1 and found.gates == ()
    told = {row["verdict"] for row in found.tables["compare"]}
    assert "no result" in told and "broken" not in told
    assert pairs.compared(BENCH, threshold=0.05).gates


def test_interleaved_pairs_decide_between_runs_of_one_bench() -> None:
    row = pairs.compared(BENCH, runs=["1", "2"]).tables["compare"][0]
    relative = BENCH.runs[1].relative
    assert relative is not None and row["change"] == pytest.approx(1 / relative.ratio - 1) and "interleaved" in row["reason"]


@pytest.mark.parametrize("words", ["2", "inductor", "inductor:freezing", "INDUCTOR fp16"])
def test_a_run_is_named_by_its_place_or_by_words_of_its_name(words: str) -> None:
    assert "inductor" in pairs.compared(BENCH, runs=[words]).tables["compare"][0]["run"]


@pytest.mark.parametrize(
    ("words", "told"), [("0", "no run 0"), ("99", "no run 99"), ("nobody", "no run"), ("fp16", "runs of"), ("", "no run")]
)
def test_a_choice_that_names_no_run_or_several_lists_them(words: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        pairs.compared(BENCH, runs=[words])
    assert "2 resnet101" in raised.value.fix


def test_one_run_alone_cannot_be_compared_and_three_cannot_be_chosen() -> None:
    with pytest.raises(BadInput, match="holds 1 run"):
        pairs.compared(EAGER)
    with pytest.raises(BadInput, match="holds no runs"):
        pairs.compared(replace(EAGER, runs=()))
    with pytest.raises(UsageError, match="3 were named"):
        pairs.compared(BENCH, runs=["1", "2", "3"])


def test_a_run_missing_from_the_other_report_says_what_is_nearest_there() -> None:
    two = replace(BENCH, runs=BENCH.runs[:2])
    other = replace(BENCH, runs=tuple(replace(run, precision="bf16") for run in BENCH.runs[:2]))
    found = pairs.compared(two, other)
    assert "not in the second report; the nearest there has bf16 for fp16" in found.tables["compare"][0]["reason"]
    assert "not in the first report; the nearest there has fp16 for bf16" in found.tables["compare"][-1]["reason"]


def test_the_tree_shows_the_largest_differences_first_and_sums_the_rest() -> None:
    report = codec.read_json(Report, H200 / "bert_large-h200.json")
    run = report.runs[0]
    slower = tuple(replace(p, time_ns=(p.time_ns or 0.0) / (2 if p.module.startswith("encoder.layer.7.") else 1)) for p in run.roofline)
    found = pairs.compared(report, replace(report, runs=(replace(run, roofline=slower),)))
    text = console.text(found, View(top=3, depth=3), width=120)
    tree = text[text.index("Modules that changed") :]
    layers = [line for line in tree.splitlines() if "│     ├─ " in line or "│     └─ " in line]
    assert "├─ 7 " in layers[0] and "-48.9%" in layers[0]  # half, and what scaling to the same call gives back
    assert "21 more" in layers[-1] and len(layers) == 4


def test_a_table_written_by_something_else_is_no_reason_to_fail() -> None:
    for odd in ("text", [1], [{"run": 1}], {"a": 1}, [{"name": "x"}]):
        report = replace(COMPARED, tables={"compare": [], "changes": odd})
        assert shown.of_report(report) == []
        assert console.text(report) and html.render(report)


def test_html_draws_both_waterfalls_on_one_scale() -> None:
    text = html.render(COMPARED)
    assert ">inductor</span>" in text and ">eager</span>" in text and 'class="fall"' in text
    assert "eager -&gt; inductor</h1>" in text


def test_a_failed_run_has_no_waterfall_and_no_difference() -> None:
    failed = Run(model=EAGER.runs[0].model, backend="inductor", status=Status.CRASH, reason="killed")
    found = pairs.compared(EAGER, replace(EAGER, runs=(failed,)))
    assert "changes" not in found.tables and found.tables["compare"][0]["verdict"] == "broken"


def test_the_differences_survive_json() -> None:
    again = codec.from_plain(Report, json.loads(codec.to_json(COMPARED)))
    assert the_change(again) == the_change()
