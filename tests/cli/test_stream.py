"""`gpuopt stream` as it is typed: words in, text and exit codes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "streamed"))

import streams

from gpuopt.cli import app
from gpuopt.core.streamed import StreamSpan
from gpuopt.pipeline import isolate
from gpuopt.reports.content import streaming as content


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that name a model of eight blocks on a device on paper; its child is this process."""
    monkeypatch.setattr(isolate, "Child", streams.Inline)
    name = streams.factory(tmp_path)
    return [name, "--trust", name.rpartition(":")[0], "--dim", "S=4", "--device", streams.DEVICE, "--quiet"]


def test_a_plan_shows_ledger_bound_and_picture(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["stream", "plan", *model, "--budget", "50%"]) == 0
    text = capsys.readouterr().out
    for words in ("The device's bytes", "always resident", "slots", "A forward, left to right", "compute", "copy", "predicted", "at least"):
        assert words in text
    assert "▓" in text and "█" in text


def test_the_json_of_a_plan_is_the_same_twice_and_can_be_shown_again(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for _ in range(2):
        assert app.run(["stream", "plan", *model, "--budget", "50%", "--budget", "80%", "--json", "-"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    rows = json.loads(texts[0])["streamed"]["rows"]
    assert [row["plan"]["predicted_ms"] >= row["plan"]["bound_ms"] for row in rows] == [True, True]
    (tmp_path / "plan.json").write_text(texts[0], encoding="utf-8")
    for format in ("console", "markdown", "html", "csv", "junit", "github", "jsonl"):
        assert app.run(["report", str(tmp_path / "plan.json"), "--format", format]) == 0
    assert "Frontier" in capsys.readouterr().out


def test_a_run_says_what_it_took_against_bound_and_prediction(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "run.json"
    assert app.run(["stream", "run", *model, "--budget", "50%", "--calls", "4", "--json", str(kept)]) == 0
    text = capsys.readouterr().out
    assert "of the bound" in text and "against the prediction" in text and "(simulated)" in text
    seen = json.loads(kept.read_text())["streamed"]["rows"][0]["measured"]
    assert seen["pct_of_bound"] > 90 and seen["plan"]["predicted_ms"] > 0 and seen["num_calls"] == 4


def test_verify_is_zero_where_all_is_equal_and_one_where_it_is_not(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["stream", "verify", *model, "--budget", "50%", "--forwards", "6"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    monkeypatch.setattr("gpuopt.streaming.engines.simulated.SimulatedEngine.wait_copy", lambda self, event: None)
    assert app.run(["stream", "verify", *model, "--budget", "50%", "--forwards", "6"]) == 1
    assert "differs" in capsys.readouterr().out


def test_a_budget_too_small_says_the_least_one(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["stream", "run", *model, "--budget", "10%"]) == 5
    told = capsys.readouterr().err
    assert "too small" in told and "--budget" in told and "is the least" in told


def test_pack_then_run_from_the_disk(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "packed")
    assert app.run(["stream", "pack", *model, "--disk", folder]) == 0
    assert app.run(["stream", "run", *model, "--budget", "50%", "--disk", folder, "--pin-limit", "1KiB", "--calls", "3"]) == 0
    assert "disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "budget"),
        (["fly", "--budget", "50%"], "plan, run"),
        (["plan", "--budget", "lots"], "size"),
        (["plan", "--budget", "50"], "50%"),
        (["plan", "--budget", "50%", "--granularity", "atom"], "granularity"),
        (["plan", "--budget", "50%", "--embed", "moon"], "embed"),
        (["plan", "--budget", "50%", "--device", "simulated:warp=9"], "warp"),
        (["plan", "--budget", "50%", "--device", "cpu"], "simulated"),
        (["run", "--budget", "50%", "--budget", "60%"], "one budget"),
        (["plan", "--budget", "50%", "--batch", "1,2"], "one batch"),
        (["bench", "--budget", "50%", "--rival", "airllm"], "accelerate-pinned"),
        (["bench", "--budget", "50%", "--rival", "none", "--rival", "mmgp"], "no rival"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isolate, "Child", streams.Inline)
    name = streams.factory(tmp_path)
    code = app.run(
        ["stream", words[0], name, "--trust", name.rpartition(":")[0], "--quiet", "--dim", "S=4", "--device", "simulated", *words[1:]]
    )
    told = capsys.readouterr().err
    assert said in told
    assert code == 2, told


def test_a_picture_wraps_round_and_never_draws_outside_its_columns() -> None:
    glyphs = {"a": "█", "b": "▓", "": "░"}
    spans = (
        StreamSpan(queue="copy", unit="b", start_ms=8.0, end_ms=12.0),
        StreamSpan(queue="copy", unit="a", start_ms=4.0, end_ms=6.0),
    )
    assert content.drawn(spans, 10.0, glyphs, columns=10) == "▓▓··██··▓▓"
    assert content.drawn((StreamSpan(queue="copy", unit="b", start_ms=-3.0, end_ms=40.0),), 10.0, glyphs, columns=10) == "▓" * 10
    assert content.drawn((), 10.0, glyphs, columns=10) == "·" * 10
