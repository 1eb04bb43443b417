"""report, compare and trust: the commands without a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt.cli import app
from gpuopt.reports import FORMATS

GOLDEN = Path(__file__).parents[1] / "golden" / "reports"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_report_makes_every_format_again_from_the_json(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert app.run(["report", str(GOLDEN / "bench.json"), "--format", format]) == 0
    shown = capsys.readouterr().out
    assert app.run(["report", str(GOLDEN / "bench.json"), "--format", format, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == shown
    assert capsys.readouterr().out == ""


def test_report_refuses_to_write_over_itself_or_read_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "r.json"
    copy.write_bytes((GOLDEN / "bench.json").read_bytes())
    assert app.run(["report", str(copy), "--format", "html", "-o", str(copy)]) == 2
    assert copy.read_bytes() == (GOLDEN / "bench.json").read_bytes()
    for content in (b"", b"{", b"[]", b"\x80\x02", b'{"schema_version": 1}', copy.read_bytes().replace(b'"verb"', b'"vreb"')):
        copy.write_bytes(content)
        assert app.run(["report", str(copy)]) == 3
    assert app.run(["report", str(tmp_path / "missing.json")]) == 3
    assert app.run(["report", str(GOLDEN / "bench.json"), "-o", str(tmp_path / "no" / "such")]) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_report_appends_to_a_github_step_summary_within_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert app.run(["report", str(GOLDEN / "bench.json"), "--format", "github"]) == 0
    assert capsys.readouterr().out.startswith("::error ")
    assert summary.read_text().startswith("before\n### gpuopt bench")
    summary.write_bytes(b"x" * ((1 << 20) - 10))
    assert app.run(["report", str(GOLDEN / "bench.json"), "--format", "github"]) == 0
    assert summary.stat().st_size <= 1 << 20


def test_compare_passes_on_itself_and_fails_on_what_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    report = json.loads((GOLDEN / "profile.json").read_text())
    before.write_text(json.dumps(report))
    assert app.run(["compare", str(before), str(before)]) == 0
    assert "same" in capsys.readouterr().out
    stats = report["runs"][0]["latency_ms"]
    report["runs"][0]["latency_ms"] = {k: v * 1.3 if isinstance(v, float) else v for k, v in stats.items()}
    after.write_text(json.dumps(report))
    assert app.run(["compare", str(before), str(after), "--json", str(tmp_path / "c.json")]) == 1
    assert "+30.0%" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["tables"]["compare"][0]["verdict"] == "slower"
    assert app.run(["compare", str(before), str(after), "--max-slowdown", "40%"]) == 0
    assert app.run(["compare", str(before), str(after), "--json", str(before)]) == 2
    assert app.run(["compare", str(before), str(tmp_path / "missing.json")]) == 3


def test_compare_of_unlike_things_is_inconclusive_and_fails_unless_allowed(tmp_path: Path) -> None:
    report = json.loads((GOLDEN / "profile.json").read_text())
    report["device"]["name"] = "another"
    (tmp_path / "b.json").write_text(json.dumps(report))
    words = ["compare", str(GOLDEN / "profile.json"), str(tmp_path / "b.json")]
    assert app.run(words) == 1
    assert app.run([*words, "--allow-inconclusive"]) == 0


def test_compare_of_one_report_tells_its_runs_apart_and_gates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bench = str(GOLDEN / "bench.json")
    assert app.run(["compare", bench]) == 0
    assert "inductor:freezing" in capsys.readouterr().out
    assert app.run(["compare", bench, "--run", "eager", "--run", "ort", "--max-slowdown", "5%"]) in (0, 1)
    assert "ort:cuda" in capsys.readouterr().out
    assert app.run(["compare", bench, "--run", "nobody"]) == 2
    assert "2 resnet101 · inductor:freezing" in capsys.readouterr().err
    assert app.run(["compare", str(GOLDEN / "profile.json")]) == 3


def test_a_comparison_is_a_report_that_every_format_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = GOLDEN / "compare.json"
    assert app.run(["report", str(found), "--by", "kernel", "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert "5 more" in text and "Modules that changed" not in text
    assert app.run(["report", str(found), "--format", "html", "-o", str(tmp_path / "c.html")]) == 0
    assert "Where the time goes" in (tmp_path / "c.html").read_text()


def test_a_profile_is_shown_again_by_module_op_kernel_or_line(capsys: pytest.CaptureFixture[str]) -> None:
    for by, title in {"module": "Modules", "op": "Ops by name", "kernel": "Kernels", "line": "Lines"}.items():
        assert app.run(["report", str(GOLDEN / "profile.json"), "--by", by]) == 0
        text = capsys.readouterr().out
        shown = {line for line in text.splitlines() if line in ("Modules", "Ops", "Ops by name", "Kernels", "Lines")}
        assert shown == {title}
        assert "attributed to" in text and ("one call" in text or by == "module")


def test_trust_remembers_lists_and_forgets_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model = tmp_path / "model.pt"
    model.write_bytes(b"payload")
    digest = hashlib.sha256(b"payload").hexdigest()
    assert app.run(["trust", str(model)]) == 0
    assert capsys.readouterr().out == f"trusted: sha256:{digest}  {model}\n"
    assert app.run(["trust", "--list"]) == 0
    assert digest in capsys.readouterr().out
    assert app.run(["trust", "--forget", f"sha256:{digest}"]) == 0
    assert capsys.readouterr().out.startswith("forgotten: ")
    assert app.run(["trust", "--list"]) == 0
    assert digest not in capsys.readouterr().out
    assert app.run(["trust", str(tmp_path / "missing")]) == 2
    assert app.run(["trust", "--list", str(model)]) == 2


def test_trust_shows_what_it_is_and_asks_at_a_terminal(at_terminal: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")
    no = at_terminal("ok", "trust", "m.pkl", answers={"[y/N]": "\n"})
    assert no.code == 1
    assert "a pickle may call any function" in no.text
    yes = at_terminal("ok", "trust", "m.pkl", answers={"[y/N]": "yes\n"})
    assert yes.code == 0
    assert "trusted: sha256:" in yes.text


def test_a_grouping_of_what_was_never_profiled_is_not_passed_over_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["report", str(GOLDEN / "bench.json"), "--by", "line"]) == 0
    assert "--by line has nothing to group" in capsys.readouterr().err
    assert app.run(["report", str(GOLDEN / "profile.json"), "--by", "op"]) == 0
    assert capsys.readouterr().err == ""


def test_a_rule_is_explained_in_whole_words_at_a_terminal_and_as_markdown_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpuopt.cli import streams
    from gpuopt.doctor import handbook

    assert app.run(["doctor", "--explain", "GPU304"]) == 0
    assert capsys.readouterr().out == handbook.text("GPU304")
    monkeypatch.setattr(streams, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert app.run(["doctor", "--explain", "GPU304"]) == 0
    shown = capsys.readouterr().out
    assert shown.split() == handbook.text("GPU304").split(), "no word is lost or broken"
    prose = shown.partition("```")[0]
    assert max(map(len, prose.splitlines())) <= 40
