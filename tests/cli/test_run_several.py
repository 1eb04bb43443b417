"""`gpuopt run A.yaml B.yaml`: one command, a report each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuopt.cli import app
from gpuopt.core.errors import ResourceError

RECIPE = """
verb: bench
model: {model}
device: cpu
batch: {batch}
candidates: [{{backend: eager}}]
bench: {{min_time_s: 0.02, max_time_s: 0.05, warmup_s: 0.0, num_pairs: 3, energy_s: 0}}
"""


@pytest.fixture
def recipes(tmp_path: Path) -> list[Path]:
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef net():\n    return torch.nn.Linear(4, 4).eval()\n\n\nnet.input_specs = ('x:float32[N,4]',)\n"
    )
    found = []
    for number, name in enumerate(("one", "two"), 1):
        found.append(tmp_path / name / "recipe.yaml")
        found[-1].parent.mkdir()
        found[-1].write_text(RECIPE.format(model=f"{tmp_path}/net.py:net", batch=number))
    return found


def test_each_recipe_has_its_report(recipes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = app.run(["run", *map(str, recipes), "--json", str(tmp_path / "out"), "--quiet"])
    assert code == 0
    reports = {path.stem: json.loads(path.read_text()) for path in sorted((tmp_path / "out").iterdir())}
    assert {name: [run["batch"] for run in report["runs"]] for name, report in reports.items()} == {"one": [1], "two": [2]}
    assert all(run["latency_ms"] for report in reports.values() for run in report["runs"])
    out = capsys.readouterr().out
    assert out.index("\none\n" if not out.startswith("one\n") else "one\n") < out.index("\ntwo\n")


def test_names_that_would_replace_each_other_are_refused(recipes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", str(recipes[0]), str(recipes[0]), "--json", str(tmp_path / "out")]) == 2
    assert "two recipes are called" in capsys.readouterr().err


def test_a_verb_that_is_no_bench_is_refused_before_anything_runs(
    recipes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        recipes[0]
        .read_text()
        .replace("verb: bench", "verb: profile")
        .replace("candidates: [{backend: eager}]", "")
        .replace("bench: {min_time_s: 0.02, max_time_s: 0.05, warmup_s: 0.0, num_pairs: 3, energy_s: 0}", "")
    )
    assert app.run(["run", str(recipes[0]), str(other)]) == 2
    assert "no bench" in capsys.readouterr().err


def fake(tmp_path: Path, fail_last: bool = False) -> list[int]:
    from gpuopt.cli import show
    from gpuopt.core.result import SCHEMA_VERSION, Environment, Report
    from gpuopt.core.spec import Job

    asked = [Job(verb="bench", command=name) for name in ("one", "two")]

    def act(jobs: list[Job], screen: object, *, on_report: object) -> list[Report]:
        environment = Environment(gpuopt="1", python="3", platform="x")
        found = []
        for number, job in enumerate(jobs):
            if fail_last and number:
                raise KeyboardInterrupt
            found.append(Report(schema_version=SCHEMA_VERSION, command=job.command, verb="bench", environment=environment))
            on_report(number, found[-1], True)  # type: ignore[operator]
            finished.append(number)
        return found

    finished: list[int] = []
    try:
        show.run_all([Path("one.yaml"), Path("two.yaml")], asked, act, folder=None if fail_last else str(tmp_path / "out"), quiet=True)
    except (KeyboardInterrupt, ResourceError):
        return finished
    raise AssertionError("it ended well")


def test_a_report_that_cannot_be_written_ends_no_other_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt.cli import show

    def full(self: object, report: object) -> None:
        raise ResourceError("the disk is full", fix="free some space")

    monkeypatch.setattr(show.JsonSink, "write_partial", full)
    assert fake(tmp_path) == [0, 1]


def test_what_is_done_is_shown_when_the_rest_is_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake(tmp_path, fail_last=True) == [0]
    assert capsys.readouterr().out.startswith("one\n")
