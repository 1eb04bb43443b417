"""Pipes, terminals, full disks, closed streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt.cli import show, streams
from gpuopt.core.errors import ResourceError, UsageError

FAKE = Path(__file__).with_name("fake_gpuopt.py")
Fake = Callable[..., subprocess.CompletedProcess[str]]
ESCAPE = re.compile(r"\x1b")


def test_the_report_goes_to_stdout_and_progress_and_warnings_to_stderr(fake: Fake) -> None:
    done = fake("ok", "profile", "m")
    assert done.returncode == 0
    assert "Where the time goes" in done.stdout
    assert done.stderr.splitlines()[0] == "building one …"
    assert "warning: the model was in training mode" in done.stderr
    assert not ESCAPE.search(done.stdout + done.stderr)
    assert "training mode" not in done.stdout.split("Findings")[0]


def test_quiet_leaves_warnings_alone(fake: Fake) -> None:
    assert fake("ok", "profile", "m", "-q").stderr == "warning: the model was in training mode\n"


def test_a_long_step_without_a_terminal_is_a_line_not_an_animation(fake: Fake) -> None:
    done = fake("slow=2.2", "profile", "m")
    assert done.stderr.count("\n") <= 3
    assert not ESCAPE.search(done.stderr)
    assert "\r" not in done.stderr


def test_a_terminal_gets_colours_and_a_bar_for_what_takes_over_two_seconds(at_terminal: Callable[..., Any]) -> None:
    seen = at_terminal("slow=3", "profile", "m")
    assert seen.code == 0
    assert "\x1b[" in seen.text
    assert "building one" in seen.text
    assert re.search(r"(6|7|8|9)\d%", seen.text)


def test_a_short_step_at_a_terminal_leaves_no_trace(at_terminal: Callable[..., Any]) -> None:
    assert "building one" not in at_terminal("ok", "profile", "m").text


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_and_dumb_terminals_get_no_colours(at_terminal: Callable[..., Any], env: dict[str, str | None]) -> None:
    seen = at_terminal("ok", "profile", "m", "-q", env=env)
    assert "Where the time goes" in seen.text
    assert not re.search(r"\x1b\[[0-9;]*m", seen.text)


def test_an_empty_no_color_says_nothing(at_terminal: Callable[..., Any]) -> None:
    assert re.search(r"\x1b\[[0-9;]*m", at_terminal("ok", "profile", "m", env={"NO_COLOR": ""}).text)


@pytest.mark.parametrize("columns", [60, 100])
def test_a_report_fits_the_terminal(at_terminal: Callable[..., Any], columns: int) -> None:
    seen = at_terminal("ok", "profile", "m", "-q", columns=columns, env={"NO_COLOR": "1"})
    assert max(len(line) for line in seen.text.splitlines() if not line.startswith("warning")) <= columns


def test_columns_sets_the_width_of_a_pipe(fake: Fake) -> None:
    done = fake("ok", "profile", "m", env={"COLUMNS": "70"})
    assert max(map(len, done.stdout.splitlines())) <= 70


def test_json_to_stdout_is_json_alone_even_on_failure(fake: Fake) -> None:
    good = json.loads(fake("ok", "profile", "m", "--json", "-").stdout)
    assert good["error"] is None
    done = fake("error=BadInput", "profile", "m", "--json", "-")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] == {
        "exit_code": 3,
        "fix": "what to do",
        "id": "GPO200",
        "message": "what happened",
        "type": "BadInput",
    }


def test_a_failure_is_recorded_in_the_json_file(fake: Fake, tmp_path: Path) -> None:
    for behaviour, code, kind in (("error=OutOfMemory", 5, "OutOfMemory"), ("bug", 70, "RuntimeError")):
        assert fake(behaviour, "profile", "m", "--json", "r.json").returncode == code
        error = json.loads((tmp_path / "r.json").read_text())["error"]
        assert (error["type"], error["exit_code"]) == (kind, code)


def test_a_reader_that_goes_away_is_no_error(fake: Fake, tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{FAKE}' ok profile m --json r.json | head -1; echo code ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "code 0"
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["verb"] == "profile"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_is_exit_5_and_the_json_file_is_still_written(fake: Fake, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = fake("ok", "profile", "m", "--json", "r.json", stdout=full)
    assert done.returncode == 5
    assert "stdout cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["verb"] == "profile"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["profile", "m", "--json", "-"]])
def test_a_full_stdout_is_exit_5_for_everything_that_writes_there(fake: Fake, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        assert fake("ok", *words, stdout=full).returncode == 5


def test_a_closed_stdout_is_exit_5_and_the_json_file_is_still_written(tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{FAKE}' ok profile m --json r.json >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 5
    assert "stdout is closed" in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["verb"] == "profile"


def test_closed_stderr_and_stdin_change_nothing(tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{FAKE}' ok profile m --json r.json 2>&- <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0
    assert "Where the time goes" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["verb"] == "profile"


def test_all_streams_closed_still_writes_the_file_and_nothing_into_it_but_the_report(tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{FAKE}' error=BadInput profile m --json r.json <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=60, check=False).returncode == 3
    assert json.loads((tmp_path / "r.json").read_text())["error"]["id"] == "GPO200"


def test_an_ascii_stdout_gets_its_report(fake: Fake) -> None:
    done = fake("ok", "profile", "m", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert done.returncode == 0
    assert "Where the time goes" in done.stdout


@pytest.mark.parametrize(
    ("target", "code", "told"),
    [("no/such/folder/r.json", 5, "its folder does not exist"), (".", 2, "is a folder"), ("model.pt", 2, "is no report of gpuopt")],
)
def test_a_json_file_that_cannot_be_is_refused_before_any_work(fake: Fake, tmp_path: Path, target: str, code: int, told: str) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 precious")
    done = fake("bug", "profile", "m", "--json", target)
    assert done.returncode == code
    assert told in done.stderr
    assert "building one" not in done.stderr
    assert (tmp_path / "model.pt").read_bytes() == b"PK\x03\x04 precious"


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a folder that refuses")
def test_an_unwritable_folder_is_exit_5_before_any_work(fake: Fake) -> None:
    done = fake("bug", "profile", "m", "--json", "/proc/r.json")  # refuses even root
    assert done.returncode == 5
    assert "building one" not in done.stderr


def test_our_own_report_an_empty_file_and_a_device_may_be_written_to(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for target in ("r.json", "r.json", "empty.json", "/dev/null"):
        assert fake("ok", "profile", "m", "--json", target).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.json", "r.json"]


def test_writing_goes_through_a_link_and_keeps_the_mode(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text("old")
    real.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(real)
    streams.write_whole(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "r.json"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        streams.write_whole(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_force_replaces_a_foreign_file(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("foreign")
    with pytest.raises(UsageError), show.json_sink(str(target)):
        pass
    with show.json_sink(str(target), force=True) as sink:
        assert sink.target == target


def test_an_untrusted_file_is_offered_at_a_terminal_and_remembered(at_terminal: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"payload")
    no = at_terminal("untrusted", "profile", "model.pt", answers={"[y/N]": "n\n"})
    assert no.code == 3
    assert "model.pt names os.system" in no.text
    yes = at_terminal("untrusted", "profile", "model.pt", answers={"[y/N]": "y\n"})
    assert yes.code == 0
    assert "remembered sha256:" in yes.text
    assert "[y/N]" not in at_terminal("untrusted", "profile", "model.pt").text


def test_nobody_is_asked_without_a_terminal_or_with_no_input(fake: Fake, at_terminal: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"payload")
    done = fake("untrusted", "profile", "model.pt")
    assert done.returncode == 3
    assert "→ gpuopt trust model.pt" in done.stderr
    assert "[y/N]" not in done.stderr
    seen = at_terminal("untrusted", "profile", "model.pt", "--no-input")
    assert seen.code == 3
    assert "[y/N]" not in seen.text
