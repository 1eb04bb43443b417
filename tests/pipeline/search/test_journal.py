"""The journal of a search: what was answered is there again after any end, and what is not this search's is refused by name."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuopt.core.errors import BadInput, GpuoptError, ResourceError, UsageError
from gpuopt.core.result import Run, Status
from gpuopt.core.search import Screened, Timed
from gpuopt.core.spec import Change
from gpuopt.pipeline.search import journal, tune
from gpuopt.pipeline.search.journal import Header, Journal
from gpuopt.pipeline.search.questions import Explained, Finalists, Proposal

HEADER = Header(search="abc", fingerprint={"device": "H200", "torch": "2.11"})
RUN = Run(model="m", backend="eager", status=Status.OK, notes=("two\nlines",))
ANSWERS: dict[str, Any] = {
    "screen 1": Screened(status="ok", ms=1.25, peak_bytes=7, verified=True, seconds=3.5),
    "explain 1": Explained(
        facts=tune.Facts(wall_ms=1.0), proposals=(Proposal(change=Change(channels_last=True), origin="GPO1"),), seconds=1.0
    ),
    "screen 2": Screened(status="accuracy_fail", reason="wrong: “é\n", seconds=0.5),
    "finals 1 2": Finalists(timed={"1": Timed(status="ok", ms=1.0, ratio=1.0)}, seconds=2.0),
}


def written(path: Path) -> Path:
    path.unlink(missing_ok=True)
    with journal.opened(path, HEADER, resume=False) as book:
        for key, answer in ANSWERS.items():
            book.add(key, answer, {"1": RUN})
    return path


def again(path: Path) -> Journal:
    book = journal.opened(path, HEADER, resume=True)
    book.close()
    return book


def test_what_was_answered_comes_back_value_for_value(tmp_path: Path) -> None:
    found = again(written(tmp_path / "j"))
    assert {key: line.answer for key, line in found.answers.items()} == ANSWERS
    assert found.answers["screen 1"].runs == {"1": RUN} and found.dropped == 0
    assert len((tmp_path / "j").read_bytes().splitlines()) == 5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6))
def test_cut_anywhere_it_loses_the_last_line_at_most_and_can_be_gone_on_with(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "j")
    data = path.read_bytes()
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    kept = max(0, data[:cut].count(b"\n") - 1)
    with journal.opened(path, HEADER, resume=True) as book:
        assert list(book.answers) == list(ANSWERS)[:kept]
        book.add("screen 9", ANSWERS["screen 1"], {})
    assert list(again(path).answers) == [*list(ANSWERS)[:kept], "screen 9"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_is_never_read_as_another_answer(tmp_path: Path, at: int, bit: int) -> None:
    path = written(tmp_path / "j")
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:
        found = again(path)
    except (BadInput, UsageError) as error:
        assert error.fix
        return
    assert all(ANSWERS.get(key) == line.answer for key, line in found.answers.items())


def test_a_changed_figure_names_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    path.write_text(path.read_text().replace("1.25", "1.35", 1))
    with pytest.raises(BadInput, match="line 2 is damaged"):
        again(path)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (replace(HEADER, search="other"), "another search"),
        (replace(HEADER, fingerprint={**HEADER.fingerprint, "torch": "2.13"}), "another torch: 2.11, here 2.13"),
        (replace(HEADER, fingerprint={**HEADER.fingerprint, "device": "A100"}), "another device: H200, here A100"),
        (replace(HEADER, fingerprint={**HEADER.fingerprint, "triton": "3"}), "another triton: None, here 3"),
        (replace(HEADER, version=journal.VERSION + 1), "another version of gpuopt"),
    ],
)
def test_another_search_machine_or_version_is_refused_by_name(tmp_path: Path, header: Header, named: str) -> None:
    path = written(tmp_path / "j")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=named) as raised:
        journal.opened(path, header, resume=True)
    assert raised.value.exit_code == 2 and "--resume" in raised.value.fix
    assert path.read_bytes() == before


def test_two_searches_never_write_one_journal(tmp_path: Path) -> None:
    with journal.opened(tmp_path / "j", HEADER, resume=False):
        for resume in (False, True):
            with pytest.raises(ResourceError, match="another search is writing") as raised:
                journal.opened(tmp_path / "j", HEADER, resume=resume)
            assert raised.value.exit_code == 5
    again(tmp_path / "j")


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no search to resume"):
        journal.opened(tmp_path / "j", HEADER, resume=True)
    with pytest.raises(UsageError, match="needs the output"):
        journal.opened(None, HEADER, resume=True)
    assert not (tmp_path / "j").exists()
    assert journal.opened(None, HEADER, resume=False).get("screen 1") is None


def test_a_new_search_keeps_the_answers_of_the_one_before_aside(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    before = path.read_bytes()
    journal.opened(path, HEADER, resume=False).close()
    assert again(path).answers == {}
    assert (tmp_path / "j.old").read_bytes() == before
    journal.opened(path, HEADER, resume=False).close()
    assert (tmp_path / "j.old").read_bytes() == before, "a search that had asked nothing is nothing to keep"


@pytest.mark.parametrize("content", [b"dear diary\n", b"{}\n", b"\x00\xff", b'{"a": 1}'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    for resume in (False, True):
        with pytest.raises(UsageError, match="no journal of a search"):
            journal.opened(path, HEADER, resume=resume)
    assert path.read_bytes() == content


def test_a_link_a_folder_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    for name, kind in (("link", UsageError), ("folder", UsageError), ("none/j", ResourceError)):
        with pytest.raises(kind) as raised:
            journal.opened(tmp_path / name, HEADER, resume=False)
        assert isinstance(raised.value, GpuoptError) and raised.value.fix
    assert not (tmp_path / "elsewhere").exists()


def in_a_child(work: Callable[[], int]) -> int:
    """Exit code of a forked process that does this."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_disk_that_fills_up_ends_it_with_what_was_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "j"

    def fill() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with journal.opened(path, HEADER, resume=False) as book:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            try:
                for number in range(1000):
                    book.add(f"screen {number}", ANSWERS["screen 1"], {})
            except ResourceError as error:
                return 7 if os.strerror(errno.EFBIG) in error.message and error.exit_code == 5 else 8
        return 9

    assert in_a_child(fill) == 7
    found = again(path)
    assert found.dropped == 0 and 5 < len(found.answers) < 1000


def test_a_process_that_is_killed_leaves_every_answer_it_had_added(tmp_path: Path) -> None:
    path = tmp_path / "j"

    def die() -> int:
        book = journal.opened(path, HEADER, resume=False)
        for key, answer in ANSWERS.items():
            book.add(key, answer, {})
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_a_child(die) == -signal.SIGKILL
    assert list(again(path).answers) == list(ANSWERS), "and the lock went with the process"


def test_lines_are_plain_json_for_other_tools(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in written(tmp_path / "j").read_text().splitlines()]
    assert lines[0]["search"] == "abc" and [line["key"] for line in lines[1:]] == list(ANSWERS)
