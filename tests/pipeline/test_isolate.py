"""Children that crash, hang, flood or leave others behind: each is one classified result, and nothing is left running."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuopt.core.result import Status
from gpuopt.pipeline import forking, isolate
from gpuopt.pipeline.facts import Measured
from gpuopt.pipeline.isolate import STDERR_TAIL_BYTES, Child, ChildFailed


@pytest.fixture(params=["a new process", "a fork"])
def child(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    if request.param == "a fork":
        request.getfixturevalue("kept")
    here = str(Path(__file__).parent)
    with Child("fake_worker", environment={"PYTHONPATH": here}) as made:
        assert isinstance(made._process, forking.Forked) == (request.param == "a fork")
        yield made


def group_members(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, _, group = stat.rpartition(")")[2].split()[:3]
            if int(group) == pid and state != "Z":
                found.append(int(entry.name))
    return found


def test_an_answer_comes_back_with_progress_before_it_and_prints_are_no_frames(child: Child) -> None:
    seen = []
    answer = child.call("echo", Measured, timeout_s=20, ns=[1, 2, 3], on_progress=lambda share, note: seen.append((share, note)))
    assert answer.samples.samples_ns == (1, 2, 3)
    assert seen == [(0.5, "half")]


@pytest.mark.parametrize(
    ("verb", "status", "words"),
    [
        ("segv", Status.CRASH, "SIGSEGV"),
        ("abort", Status.CRASH, "terminate called"),
        ("exit0", Status.CRASH, "exited with 0"),
        ("killed", Status.OOM_HOST, "SIGKILL"),
        ("grandchild", Status.CRASH, "exited with 3"),
    ],
)
def test_a_dead_child_is_classified_and_its_group_is_gone(child: Child, verb: str, status: Status, words: str) -> None:
    with pytest.raises(ChildFailed) as failure:
        child.call(verb, Measured, timeout_s=20)
    assert failure.value.status is status
    assert words in failure.value.reason
    assert group_members(child.pid) == []


@pytest.mark.parametrize("verb", ["hang", "ignore_sigterm"])
def test_a_hanging_child_is_killed_at_its_deadline_with_everything_it_started(child: Child, verb: str) -> None:
    began = time.monotonic()
    with pytest.raises(ChildFailed) as failure:
        child.call(verb, Measured, timeout_s=1.5)
    assert failure.value.status is Status.TIMEOUT
    assert time.monotonic() - began < 10
    assert group_members(child.pid) == []


def test_a_flood_of_stderr_neither_blocks_nor_is_kept_whole(child: Child) -> None:
    with pytest.raises(ChildFailed) as failure:
        child.call("flood", Measured, timeout_s=60)
    assert "the last line" in failure.value.reason
    assert len(child.stderr_tail()) <= STDERR_TAIL_BYTES


def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    """kill -9 gives the parent no chance to clean up: the kernel must take the child with it."""
    import subprocess

    script = "import sys; from gpuopt.pipeline.isolate import Child\nc = Child(); print(c.pid, flush=True)\nimport time; time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    # The child asks the kernel for this only once Python is up.
    while time.monotonic() < deadline and b"gpuopt" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.05)
    time.sleep(1.0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while time.monotonic() < deadline and group_members(pid):
        time.sleep(0.1)
    assert group_members(pid) == []


def test_closing_twice_is_harmless_and_frees_the_pipes() -> None:
    before = len(os.listdir("/proc/self/fd"))
    child = Child("fake_worker", environment={"PYTHONPATH": str(Path(__file__).parent)})
    child.close()
    child.kill()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_paused_child_does_nothing_and_its_time_limit_does_not_pass(child: Child) -> None:
    child.call("echo", Measured, timeout_s=20, ns=[1])  # it has started
    seen: list[float] = []
    waiting = threading.Thread(
        target=lambda: child.call("count", Measured, timeout_s=2.0, steps=40, on_progress=lambda share, note: seen.append(time.monotonic()))
    )
    waiting.start()
    while len(seen) < 5:
        time.sleep(0.01)
    child.pause()
    time.sleep(0.2)  # what it had sent is read
    before = len(seen)
    time.sleep(1.8)
    assert len(seen) == before < 40
    child.resume()
    waiting.join(timeout=20)
    assert len(seen) == 40 and child.alive, "0.8 s of work and 2 s of standing still are within a limit of 2 s"
    assert child.call("echo", Measured, timeout_s=20, ns=[3]).samples.samples_ns == (3,)


def test_a_child_is_ended_while_it_stands_still(child: Child) -> None:
    child.call("echo", Measured, timeout_s=20, ns=[1])
    child.pause()
    began = time.monotonic()
    child.kill()
    assert time.monotonic() - began < 5 and not child.alive and not group_members(child.pid)


def test_what_was_ended_once_is_never_sent_a_signal_again(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seat is closed when it fails and again when its command ends, hours later: its number may lead somebody else's group by then."""
    child.close()
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(isolate.os, "killpg", lambda group, number: sent.append((group, number)))
    child.close()
    child.kill()
    assert sent == []


@pytest.mark.parametrize("forked", ["1", "0"])
def test_a_command_whose_streams_are_closed_has_children_all_the_same(forked: str) -> None:
    """Cron and daemons: the first descriptors that are opened take the numbers of the streams."""
    import subprocess

    script = (
        "import os; [os.close(n) for n in (0, 1)]\n"
        "from gpuopt.pipeline import forking, isolate\nfrom gpuopt.pipeline.facts import Measured\n"
        "with forking.kept({**os.environ, **isolate.child_environment()}) as z:\n"
        "    with isolate.Child('fake_worker') as c:\n"
        "        assert c.call('echo', Measured, timeout_s=60, ns=[1]).samples.samples_ns == (1,)\n"
        "        assert z is None or not z.refused, z.refused\n"
    )
    given = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "GPUOPT_FORK": forked}
    ended = subprocess.run([sys.executable, "-c", script], env=given, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
