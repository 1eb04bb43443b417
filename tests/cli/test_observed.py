"""`gpuopt profile -- python …` and `--trace FILE`: which words mean what, and the whole way for a small program."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gpuopt.cli import app

PROGRAM = """
import sys
import torch
model = torch.nn.Linear(8, 8).eval()
with torch.no_grad():
    for _ in range(4):
        model.load_state_dict(model.state_dict())
        model(torch.randn(1, 8))
print("said", sys.argv[1:])
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from gpuopt.devices import null
    from gpuopt.pipeline import facts
    from gpuopt.pipeline import machine as machines

    monkeypatch.setattr(machines, "survey", lambda job, progress, **_: facts.Survey(environment=_environment(), device=null.DEVICE))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "infer.py").write_text(PROGRAM)
    return tmp_path


def _environment() -> object:
    from gpuopt.pipeline import environment

    return environment.describe()


@pytest.mark.parametrize(
    "words",
    [
        ["profile"],
        ["profile", "model.pt", "--trace", "t.json"],
        ["profile", "--trace", "t.json", "--", sys.executable, "infer.py"],
    ],
)
def test_one_thing_is_profiled_at_a_time(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(words) == 2
    assert "takes one of a model, a program and a trace" in capsys.readouterr().err


def test_a_program_runs_with_its_own_arguments_and_its_reloading_is_found(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["profile", "--no-trace", "--json", "r.json", "--", sys.executable, "infer.py", "0", "--flag"]) == 0
    out = capfd.readouterr().out
    assert "said ['0', '--flag']" in out and "Models it calls" in out
    report = json.loads((here / "r.json").read_text())
    assert report["tables"]["script"]["modules"][0]["num_calls"] == 4
    assert {load["what"] for load in report["tables"]["script"]["loads"]} == {"load_state_dict"}


def test_a_program_that_ends_badly_is_told_and_fails(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["profile", "--no-trace", "--", sys.executable, "infer.py", "3"]) == 1
    assert "exited with 3" in capfd.readouterr().out


def test_a_trace_that_is_none_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "t.json").write_text('{"hello": 1}')
    assert app.run(["profile", "--trace", "t.json"]) == 3
    (here / "t.json").write_text("")
    assert app.run(["profile", "--trace", "t.json"]) == 3
    assert app.run(["profile", "--trace", "missing.json"]) in (2, 3)


def _seconds_of(words: list[str], folder: Path) -> tuple[int, float, str]:
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-m", "gpuopt", *words], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began, done.stderr


def test_a_bad_trace_is_told_before_torch_is_there_or_ceilings_are_measured(here: Path) -> None:
    (here / "t.json").write_text('{"traceEvents": [{"ph": "X", "cat"')
    code, seconds, said = _seconds_of(["profile", "--trace", "t.json"], here)
    assert code == 3 and "is truncated" in said and "looking at this machine" not in said
    assert seconds < 2  # torch alone takes that


def test_the_limits_a_refusal_names_can_be_raised(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": i, "dur": 1} for i in range(40)]
    (here / "t.json").write_text(json.dumps({"traceEvents": events}))
    assert app.run(["profile", "--trace", "t.json", "--trace-limit", "1KiB"]) == 3
    assert "raise --trace-limit" in capsys.readouterr().err
    assert app.run(["profile", "--trace", "t.json", "--trace-events", "10"]) == 3
    assert "raise --trace-events" in capsys.readouterr().err
    assert app.run(["profile", "--trace", "t.json", "--trace-limit", "1MiB", "--trace-events", "100"]) == 0
    assert app.run(["profile", "--trace", "t.json", "--trace-limit", "much"]) == 2
