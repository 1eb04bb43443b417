"""Start-up, exit codes, errors, signals."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuopt.cli import app, reference
from gpuopt.core.errors import error_types

FAKE = Path(__file__).with_name("fake_gpuopt.py")
ROOT = Path(__file__).parents[2]
COMMANDS = [name for commands in app.COMMANDS.values() for name in commands]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["bench", "--help"]])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from gpuopt.cli import app; code = app.run(sys.argv[1:]);"
        "heavy = [m for m in ('torch', 'numpy', 'gpuopt.core.codec', 'yaml', 'transformers', 'onnx', 'pynvml') if m in sys.modules];"
        # typer itself coerces a command's numbers with pydantic; the bare --help and --version must not need it
        "heavy += ['pydantic'] if 'pydantic' in sys.modules and len(sys.argv) == 2 else [];"
        "print('HEAVY', heavy, code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.rstrip().endswith("HEAVY [] 0")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_take_under_a_third_of_a_second(word: str) -> None:
    """Processor time, least of a few: a busy machine only adds to it."""
    least = float("inf")
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "gpuopt", word], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if least < 1 / 3:
            break
    assert least < 1 / 3


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from gpuopt import __version__

    assert app.run(["--version"]) == 0
    assert capsys.readouterr() == (f"gpuopt {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_tells_what_it_does_and_gives_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: gpuopt {command} " in " ".join(text.split())
    assert "Usage: gpuopt " + command in text


def test_every_command_is_listed_by_help_in_its_panel(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--help"]) == 0
    text = capsys.readouterr().out
    for panel, commands in app.COMMANDS.items():
        assert panel in text
        assert all(command in text for command in commands)


def test_options_change_only_on_purpose() -> None:
    """The options are an interface: a change is made in tests/golden/options.txt too."""
    golden = ROOT / "tests" / "golden" / "options.txt"
    if os.environ.get("GPUOPT_UPDATE_GOLDEN"):
        golden.write_text(reference.options())
    assert reference.options() == golden.read_text()


def test_the_page_of_commands_is_made_from_their_help() -> None:
    assert reference.page() == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), "python -m gpuopt.cli.reference docs"


def test_every_option_has_a_help_text() -> None:
    group = reference._group()
    for name, command in group.commands.items():
        for param in command.params:
            assert param.help and param.help.rstrip().endswith((".", "lists them.")), f"{name} {param.name}"


@pytest.mark.parametrize("name", sorted(error_types()))
def test_an_error_is_two_lines_and_its_own_exit_code(
    name: str, caught: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; tests/cli/test_streams.py has the exit codes of processes of their own."""

    def fails(*_: object) -> None:
        raise error_types()[name]("what happened", fix="what to do")

    monkeypatch.setattr(sys.modules["gpuopt.pipeline.jobs"], "profile", fails)
    assert app.run(["profile", "m", "--quiet"]) == error_types()[name].exit_code
    streams = capsys.readouterr()
    assert streams.err.splitlines() == [f"error {error_types()[name].error_id}: what happened", "  → what to do"]
    assert streams.out == ""


def test_a_bug_keeps_its_traceback_and_says_whose_it_is(fake: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = fake("bug", "profile", "m")
    assert done.returncode == 70
    assert "Traceback (most recent call last)" in done.stderr
    assert "this is a bug of gpuopt: RuntimeError: a surprise of two lines" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["profle"], "Did you mean 'profile'"),
        (["profile"], "takes one of a model"),
        (["bench"], "MODEL"),
        (["profile", "m", "--bach", "3"], "--bach"),
        (["profile", "m", "--batch", "0"], "--batch '0'"),
        (["profile", "m", "--batch", "1e3"], "--batch '1e3'"),
        (["profile", "m", "--batch", "-3"], "whole numbers from 1"),
        (["profile", "m", "--batch", "1", "--dim", "N=2"], "dimension N is given twice"),
        (["profile", "m", "--dim", "S=0"], "dimension S is 0"),
        (["profile", "m", "--precision", "fp12"], "fp12"),
        (["profile", "m", "--by", "name"], "told by 'name'"),
        (["profile", "m", "--by", "bytes"], "told by 'bytes'"),
        (["profile", "m", "--sort", "name"], "sorted by 'name'"),
        (["profile", "m", "--input-mode", "disk"], "input mode 'disk'"),
        (["profile", "m", "--verify", "maybe"], "bench.verify is 'maybe'"),
        (["profile", "m", "--input", "x:float99[3]"], "unknown dtype 'float99'"),
        (["profile", "m", "--input", "x:float32[3]", "--inputs", "f.npz"], "--inputs is a file"),
        (["profile", "m\nx"], "holds a control character"),
        (["profile", "m" * 5000], "is no name"),
        (["bench", "m", "--max-slowdown", "5%"], "nothing to be slower than"),
        (["bench", "m", "--max-latency", "fast"], "'fast' is not a time"),
        (["bench", "m", "--min-tflops", "nan"], "min_tflops is nan"),
        (["bench", "m", "--min-time", "0"], "min_time_s is 0"),
        (["bench", "m", "-b", "eager", "-b", "ort", "--preset", "x"], "belong to one backend"),
        (["bench", "m", "--option", "novalue"], "KEY=VALUE"),
        (["bench", "m", "--batch", ",".join(map(str, range(1, 1500)))], "candidates are more than"),
        (["convert", "m", "-o", "f", "--to", "tflite"], "--to 'tflite'"),
        (["convert", "m"], "--output"),
        (["compile", "m", "-o", "d"], "--backend"),
        (["trust"], "no file is named"),
        (["run", "no-such.yaml"], "no such file"),
        (["report", "x.json", "--format", "pdf"], "no format is called 'pdf'"),
    ],
)
def test_a_wrong_command_line_is_exit_2_in_two_lines(
    words: list[str], told: str, caught: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(words) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    lines = streams.err.splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith("error GPO100: ")
    assert told in lines[0] or told == "holds a control character"
    assert caught == []


def test_gpuopt_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([]) in (0, 2)
    assert "profile" in capsys.readouterr().out


def _start(tmp_path: Path, behaviour: str, *words: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, str(FAKE), behaviour, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        # Under nohup the tests themselves ignore it, and so would everything they start.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stderr is not None
    while "PARTIAL" not in (line := child.stderr.readline()):
        assert line, "it ended early"
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_with_its_code_and_the_report_so_far_is_kept(tmp_path: Path, number: signal.Signals, code: int) -> None:
    child = _start(tmp_path, "partial=hang", "profile", "m", "--json", "r.json")
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert out == ""
    assert "Traceback" not in err
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["runs"][0]["model"] == "resnet101"
    assert kept["error"]["exit_code"] == code
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_killed_process_leaves_the_last_whole_report(tmp_path: Path) -> None:
    child = _start(tmp_path, "partial=hang", "profile", "m", "--json", "r.json")
    child.kill()
    child.communicate(timeout=60)
    assert json.loads((tmp_path / "r.json").read_text())["error"] is None


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    child = _start(tmp_path, "stubborn", "profile", "m")
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=10)
    assert child.returncode == 130


def test_a_missed_gate_is_exit_1_with_the_figure_and_the_limit(fake: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = fake("gate", "bench", "m")
    assert done.returncode == 1
    assert "40.0 ms, limit 15 ms" in done.stdout


def _params() -> list[tuple[str, str]]:
    group = reference._group()
    return [
        (f"{name} {param.name}", param.help) for name in COMMANDS for param in group.commands[name].params if getattr(param, "help", None)
    ]


@pytest.mark.parametrize(("where", "text"), _params(), ids=[where for where, _ in _params()])
def test_no_word_of_a_help_text_is_taken_for_markup(where: str, text: str) -> None:
    from rich.text import Text

    assert Text.from_markup(text).plain == text, where


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_broken_where_the_terminal_ends_and_not_where_the_source_does(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setenv("COLUMNS", "80")
    assert app.run([command, "--help"]) == 0
    prose = capsys.readouterr().out.split("╭")[0].splitlines()
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip():  # the next word did not fit
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > 78, line


def test_the_usage_line_brackets_an_argument_once(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert app.run([command, "--help"]) == 0
        usage = next(line for line in capsys.readouterr().out.splitlines() if "Usage:" in line)
        assert "[[" not in usage and "...}" not in usage
