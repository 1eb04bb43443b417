"""The account of a search on the page: what was tried and why it failed, a plan that claims nothing, and the input under its own name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import SCHEMA_VERSION, Environment, Report
from gpuopt.core.search import Choice, Economics, Search, Trial
from gpuopt.reports import console, html

ROOT = Path(__file__).parents[2]
INPUT = Trial(key="a", label="as is eager", origin="input", outcome="chosen", screened_ms=2.0, measured_ms=2.0, seconds=1.0)
BROKEN = Trial(
    key="b", label="fp16 aoti", origin="space", outcome="build_fail", reason="no compiler was found", predicted_ms=1.0, seconds=1.0
)
LEFT = Trial(key="c", label="bf16 ort", origin="space", outcome="pruned", reason="its floor is above the best", predicted_ms=3.0)
KEPT = Choice(key="a", keeps_input=True, because="keep what you have: nothing was faster")


def report(*trials: Trial, choice: Choice | None = KEPT, **fields: object) -> Report:
    environment = Environment(gpuopt="0", python="3", platform="Linux")
    search = Search(goal="latency", trials=trials, choice=choice, stopped="all was tried", seconds=9.0, economics=Economics(build_s=77.0))
    return Report(
        schema_version=SCHEMA_VERSION,
        command="gpuopt optimize m",
        verb="optimize",
        environment=environment,
        search=replace(search, **fields),
    )


def words(of: Report, width: int = 100) -> str:
    return " ".join(console.text(of, width=width).split())


def test_why_a_candidate_failed_is_told_at_any_width() -> None:
    for width in (60, 80, 100, 200):
        shown = words(report(INPUT, BROKEN, LEFT), width)
        assert "no compiler was found" in shown and "1 of them failed" in shown


def test_what_failed_together_is_told_once() -> None:
    again = replace(BROKEN, key="d", label="as is aoti")
    assert "fp16 aoti, aoti: build fail: no compiler was found" in words(report(INPUT, BROKEN, again), 200)
    many = [replace(BROKEN, key=str(at), reason=f"reason {at}.") for at in range(20)]
    assert "12 more reasons are in the report" in words(report(INPUT, *many))


def test_what_was_not_tried_is_counted_and_no_row() -> None:
    shown = words(report(INPUT, BROKEN, LEFT))
    assert "1 more were not tried" in shown and "bf16 ort" not in shown


def test_the_input_is_called_as_it_is_and_no_other_is() -> None:
    shown = words(report(INPUT, replace(LEFT, label="as is ort", outcome="slower", seconds=1.0)))
    assert "eager (as it is)" in shown and "as is" not in shown


def test_a_plan_neither_keeps_nor_chooses() -> None:
    planned = replace(BROKEN, outcome="planned", reason="", seconds=None)
    shown = words(report(replace(INPUT, outcome="screened"), planned))
    assert "a plan of 1 candidates, fp16 aoti the fastest by expectation: 1.00 ms against 2.00 ms as it is" in shown
    assert "keep what you have" not in shown


def test_nothing_is_to_be_built_where_the_input_is_kept() -> None:
    assert "77.0 s" not in words(report(INPUT, LEFT))
    assert "77.0 s" in words(report(INPUT, LEFT, choice=replace(KEPT, keeps_input=False, change="ort")))


def test_the_page_says_what_was_tried_before_where_the_time_went() -> None:
    whole = codec.from_json(Report, (ROOT / "recipes/optimize_resnet101/h200.json").read_text(encoding="utf-8"))
    page = html.render(whole)
    places = [page.index(f'<section id="{name}"') for name in ("search", "speed", "time", "roofline", "modules")]
    assert places == sorted(places) and "Where the time goes in the model as it is" in page


def test_what_a_search_costs_is_told_once_and_in_words() -> None:
    whole = codec.from_json(Report, (ROOT / "recipes/optimize_resnet101/h200.json").read_text(encoding="utf-8"))
    shown = words(whole, 140)
    assert "What it costs" in shown and " Costs " not in shown and shown.count("cold start") == 1
    phased = words(report(INPUT, LEFT, by_phase_s={"screening": 5.0, "explaining": 3.0}))
    assert "building and screening 5.00 s, tracing 3.00 s" in phased


def test_a_bundle_of_the_input_is_called_that() -> None:
    kept = replace(report(INPUT, LEFT), output="fast")
    assert "written: fast, the model as it is" in words(kept)
    chosen = replace(report(INPUT, LEFT, choice=replace(KEPT, keeps_input=False, change="ort")), output="fast")
    assert "the model as it is" not in words(chosen)


def test_why_a_candidate_has_no_trace_is_told_at_any_width() -> None:
    blind = replace(INPUT, note="no trace of it (this machine is too busy): the doctor proposes nothing for it")
    for width in (60, 100, 200):
        assert "this machine is too busy" in words(report(blind, LEFT), width)
