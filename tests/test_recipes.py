"""Recipes are complete configurations: each one parses, and each report in the tree is one this version reads."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from gpuopt.core import codec
from gpuopt.core.result import Report, Status
from gpuopt.pipeline import recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/*/recipe.yaml"))
MEASURED = [path for path in RECIPES if (path.parent / "h200.json").exists()]
"""Those that a GPU has run; README says which have not been."""
COMPARED = [path for path in MEASURED if recipe.read(path).verb == "bench"]
SEARCHED = [path for path in MEASURED if recipe.read(path).verb == "optimize"]
REPORTS = sorted(
    p for p in ROOT.glob("recipes/*/*.json") if p.parent.name not in ("predictions", "attribution")
)  # those have a form of their own


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_a_recipe_is_a_job(path: Path) -> None:
    job = recipe.read(path)
    assert len(job.candidates) >= 2 if job.verb == "bench" else job.verb in ("optimize", "stream") and len(job.candidates) == 1


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_report_in_the_tree_is_valid_and_says_which_command_made_it(path: Path) -> None:
    report = codec.read_json(Report, path)
    jsonschema.validate(json.loads(path.read_text()), json.loads((ROOT / "docs" / "report.schema.json").read_text()))
    assert report.command.startswith("gpuopt ")
    assert report.device is not None and "H200" in report.device.name
    assert "/root" not in path.read_text() and "/tmp" not in path.read_text()


@pytest.mark.parametrize("path", COMPARED, ids=lambda p: p.parent.name)
def test_the_report_beside_a_recipe_holds_its_candidates(path: Path) -> None:
    report = codec.read_json(Report, path.parent / "h200.json")
    wanted = {(c.backend.name, c.backend.preset, c.precision.value if c.precision else None) for c in recipe.read(path).candidates}
    found = {(run.backend, run.preset, run.precision) for run in report.runs}
    assert found <= wanted
    assert found == wanted or report.error is not None


@pytest.mark.parametrize("path", COMPARED, ids=lambda p: p.parent.name)
def test_no_figure_in_the_tree_lies_above_its_ceiling_and_every_timed_one_was_verified(path: Path) -> None:
    report = codec.read_json(Report, path.parent / "h200.json")
    timed = [run for run in report.runs if run.status is Status.OK and run.latency_ms is not None]
    assert timed
    for run in timed:
        assert run.accuracy is not None and run.accuracy.passed
        if run.generated is not None:  # whole generations stand against the bound of reading the weights
            assert run.generated.pct_of_bound is not None and 0 < run.generated.pct_of_bound < 105
            continue
        assert run.pct_of_spec is not None and 0 < run.pct_of_spec < 100
        assert run.pct_of_measured is not None and 0 < run.pct_of_measured < 105
        assert run.precision_audit is not None and run.precision_audit.honoured


@pytest.mark.parametrize("path", SEARCHED, ids=lambda p: p.parent.name)
def test_a_search_in_the_tree_chose_what_it_measured_and_verified(path: Path) -> None:
    report = codec.read_json(Report, path.parent / "h200.json")
    found = report.search
    assert found is not None and found.choice is not None and found.goal == recipe.read(path).search.goal
    chosen = next(trial for trial in found.trials if trial.key == found.choice.key)
    assert chosen.outcome == "chosen" and chosen.time_ms
    if not found.choice.keeps_input:
        assert found.choice.speedup_low is not None and found.choice.speedup_low > 1
        index = [trial.key for trial in found.trials if trial.seconds is not None].index(found.choice.key)
        run = report.runs[index]
        assert run.accuracy is not None and run.accuracy.passed and run.pct_of_spec is not None and run.pct_of_spec < 100
