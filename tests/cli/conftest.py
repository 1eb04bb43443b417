"""gpuopt in a process of its own, with fake jobs; and in this one, with its job caught."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FAKE = Path(__file__).with_name("fake_gpuopt.py")
VERBS = ("profile", "bench", "convert", "compile", "backends", "device")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, without what would change how a terminal is judged."""
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "GITHUB_STEP_SUMMARY")}
    base |= {"TERM": "xterm", "PYTHONWARNINGS": "error"}
    for name, value in changes.items():
        base.pop(name, None)
        if value is not None:
            base[name] = value
    return base


Fake = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """fake(behaviour, *words, **subprocess options): run it in an empty folder."""

    def run(behaviour: str, *words: str, env: dict[str, str | None] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "cwd": tmp_path} | options
        environ = environment(XDG_STATE_HOME=str(tmp_path / "state"), **(env or {}))
        return subprocess.run([sys.executable, str(FAKE), behaviour, *words], text=True, env=environ, timeout=60, check=False, **options)

    return run


@dataclass
class Terminal:
    """What happened at a pseudo-terminal."""

    code: int
    text: str


@pytest.fixture
def at_terminal(tmp_path: Path) -> Callable[..., Terminal]:
    """at_terminal(behaviour, *words, answers={prompt: reply}, columns=100): all three streams are a terminal."""

    def run(
        behaviour: str, *words: str, answers: dict[str, str] | None = None, columns: int = 100, env: dict[str, str | None] | None = None
    ) -> Terminal:
        import fcntl
        import struct
        import termios

        mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        child = subprocess.Popen(
            [sys.executable, str(FAKE), behaviour, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=tmp_path,
            env=environment(XDG_STATE_HOME=str(tmp_path / "state"), **(env or {})),
            start_new_session=True,
        )
        os.close(theirs)
        seen, waiting, deadline = "", dict(answers or {}), time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([mine], [], [], 0.1)[0]:
                try:
                    data = os.read(mine, 65536)
                except OSError:  # the other end closed
                    break
                if not data:
                    break
                seen += data.decode(errors="replace")
                for prompt in [p for p in waiting if p in seen]:
                    os.write(mine, waiting.pop(prompt).encode())
        code = child.wait(timeout=10)
        os.close(mine)
        return Terminal(code=code, text=seen)

    return run


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that commands made, in this process; each gets an empty report back."""
    import gpuopt.pipeline
    from gpuopt.core.result import Environment, Report

    jobs: list[Any] = []

    def act(job: Any, progress: Any) -> Report:
        jobs.append(job)
        return Report(schema_version=1, command=job.command, verb=job.verb, environment=Environment(gpuopt="0", python="3", platform="p"))

    fake_jobs = SimpleNamespace(**dict.fromkeys(VERBS, act))
    monkeypatch.setitem(sys.modules, "gpuopt.pipeline.jobs", fake_jobs)
    monkeypatch.setattr(gpuopt.pipeline, "jobs", fake_jobs, raising=False)
    return jobs
