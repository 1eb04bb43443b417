"""Starts a child process, talks to it in JSON frames, and says how it ended.

A child leads a process group of its own, so that what it started (compilers, autotuners) dies with it. Frames travel over two private
pipes: whatever a model prints cannot be mistaken for a frame. Its stderr is drained by a thread that keeps the tail, so a child that
floods it neither blocks nor fills a disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, OutOfMemory, ResourceError, TimedOut, error_types
from gpuopt.core.result import Status
from gpuopt.core.spec import Job
from gpuopt.pipeline import commons, forking
from gpuopt.pipeline.facts import Failure

J = TypeVar("J", bound="Job | Sequence[Job]")
P = ParamSpec("P")
T = TypeVar("T")

STDERR_TAIL_BYTES = 16_384
TERM_GRACE_S = 2.0
"""Between SIGTERM and SIGKILL."""
GROUP_GRACE_S = 1.0
"""For killed descendants to be gone."""


class ChildFailed(Exception):
    """A child's step failed: `status` classifies it, `error` is what the user can act on, where there is one."""

    def __init__(self, status: Status, reason: str, *, fix: str = "", error: GpuoptError | None = None, traceback: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.fix = fix
        self.error = error
        self.traceback = traceback


class Child:
    """One worker process; use it as a context manager, so that nothing is left running."""

    def __init__(self, module: str = "gpuopt.pipeline.worker", *, environment: Mapping[str, str] | None = None) -> None:
        values = {**os.environ, **child_environment(), **(environment or {})}
        self._zygote = forking.current()
        with contextlib.ExitStack() as unless_started:
            request_read, request_write = forking.pipe()
            unless_started.callback(os.close, request_write)
            with contextlib.ExitStack() as theirs:
                theirs.callback(os.close, request_read)
                reply_read, reply_write = forking.pipe()
                unless_started.callback(os.close, reply_read)
                theirs.callback(os.close, reply_write)
                self.started = time.monotonic()
                self._process = _started(module, request_read, reply_write, values, self._zygote)
            unless_started.pop_all()  # a child nobody got (Ctrl-C) hears the end of its requests, and ends
        self._requests = request_write
        self._replies = reply_read
        self._buffer = b""
        self._tail = bytearray()
        self._drain = threading.Thread(target=self._drain_stderr, daemon=True)
        self._drain.start()
        self._killed_for: str | None = None
        self._is_killed = False
        self._closing = threading.Lock()
        self._stood_s = 0.0
        self._paused_at: float | None = None
        self._owed = 0
        """Answers not read yet: one more than the call that waits where a call before it was interrupted."""

    @property
    def pid(self) -> int:
        """Process id, which is also its group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def call(
        self,
        verb: str,
        result: type[T],
        *,
        timeout_s: float,
        on_progress: Callable[[float | None, str], None] | None = None,
        **arguments: Any,
    ) -> T:
        """Ask for one step and wait for its answer. Raises ChildFailed, and kills the child where it cannot go on."""
        frame = {"do": verb, "args": {k: codec.dump(v) if hasattr(v, "__dataclass_fields__") else v for k, v in arguments.items()}}
        try:
            self._owed += 1
            _write_all(self._requests, json.dumps(frame).encode() + b"\n")
        except OSError as error:
            raise self._ended(verb) from error
        deadline = self._clock() + timeout_s
        while True:
            line = self._read_line(deadline)
            if line is None:
                if self._clock() >= deadline:
                    self._killed_for = f"{verb} did not end within {timeout_s:g} s"
                    self.kill()
                    raise ChildFailed(
                        Status.TIMEOUT,
                        self._killed_for,
                        fix="raise --timeout, or leave this candidate out",
                        error=TimedOut(self._killed_for, fix="raise --timeout, or leave this candidate out"),
                    )
                raise self._ended(verb)
            reply = json.loads(line)
            if "progress" in reply:
                if on_progress is not None:
                    on_progress(*reply["progress"])
                continue
            self._owed -= 1
            if self._owed:
                continue  # it answers a call that Ctrl-C ended
            if self._zygote is not None:
                self._zygote.expect(reply.get("imported", ()))
            if "error" in reply:
                raise _failed(codec.from_plain(Failure, reply["error"], what="worker"))
            return codec.from_plain(result, reply["ok"], what=f"worker {verb}")

    def _read_line(self, deadline: float) -> bytes | None:
        """The next frame; None at the deadline or when the child closed its end."""
        while b"\n" not in self._buffer:
            left = deadline - self._clock()
            if left <= 0:
                return None
            ready, _, _ = select.select([self._replies], [], [], min(left, 1.0))
            if ready:
                chunk = os.read(self._replies, 1 << 20)
                if not chunk:
                    return None
                self._buffer += chunk
            elif not self.alive and not select.select([self._replies], [], [], 0)[0]:
                # A grandchild may hold the pipe's other end open after the child itself has died.
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _drain_stderr(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(stream.fileno(), 65_536):
                self._tail += chunk
                del self._tail[:-STDERR_TAIL_BYTES]

    def _ended(self, verb: str) -> ChildFailed:
        """Classify a child that stopped without answering."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=TERM_GRACE_S)
        code = self._process.poll()
        self.kill()
        self._drain.join(timeout=1.0)
        tail = crash_lines(self._tail.decode(errors="replace"))
        suffix = f": {tail}" if tail else ""
        if code is None:
            return ChildFailed(Status.CRASH, f"{verb}: the child closed its pipe and did not exit{suffix}")
        if code in (-signal.SIGKILL, 137):
            message = f"{verb}: killed (SIGKILL), most likely by the kernel for host memory{suffix}"
            return ChildFailed(Status.OOM_HOST, message, error=OutOfMemory(message, fix="a smaller batch, or a machine with more memory"))
        if code < 0:
            return ChildFailed(Status.CRASH, f"{verb}: {signal.Signals(-code).name}{suffix}")
        return ChildFailed(Status.CRASH, f"{verb}: the child exited with {code} and without an answer{suffix}")

    def stderr_tail(self) -> str:
        """What the child last wrote to stderr."""
        return self._tail.decode(errors="replace")

    def pause(self) -> None:
        """Let it stand still, and the time limit of its step with it. Compilers it started finish the piece they are at: a group that stood still would stay for
        ever where this process is killed meanwhile, since what they watch is their parent's end."""
        if self._paused_at is None:
            self._paused_at = time.monotonic()  # first: whatever interrupts the next line, `resume` knows
            self._process.send_signal(signal.SIGSTOP)  # nothing where it has ended: its number may be somebody else's by now

    def resume(self) -> None:
        """Go on. Harmless where it was not paused."""
        if self._paused_at is not None:
            self._process.send_signal(signal.SIGCONT)
            # In this order: a call that waits in another thread reads both, and must never see a time limit come nearer.
            self._stood_s += time.monotonic() - self._paused_at
            self._paused_at = None

    def _clock(self) -> float:
        """Seconds that do not pass while the child stands still."""
        now = self._paused_at
        return (time.monotonic() if now is None else now) - self._stood_s

    def kill(self) -> None:
        """End the child and everything it started. Harmless twice."""
        if self._is_killed:
            return  # long ago, maybe: its number may be another group's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self.resume()  # what stands still takes no SIGTERM
        try:
            self._process.wait(timeout=TERM_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Always: the leader may have gone and left a compiler behind that ignores SIGTERM.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.send_signal(signal.SIGKILL)  # a copy that leads no group yet
        self._process.wait()
        # Its descendants are the init process's to reap; give the kernel a moment, so that device memory is back before the next child.
        deadline = time.monotonic() + GROUP_GRACE_S
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.01)
        self._is_killed = True

    def close(self) -> None:
        """Ask it to end, then make sure."""
        if self.alive:
            with contextlib.suppress(OSError):
                _write_all(self._requests, b'{"do": "close", "args": {}}\n')
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5.0)
        self.kill()
        with self._closing:  # who builds it and who ends it may both come here: a number closed twice is somebody else's the second time
            fds, self._requests, self._replies = (self._requests, self._replies), -1, -1
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._drain.join(timeout=1.0)
        if self._process.stderr is not None and not self._drain.is_alive():
            self._process.stderr.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.alive:
            self.kill()  # no politeness on the way out of an error or a Ctrl-C
        self.close()


def _started(
    module: str, requests: int, replies: int, environment: Mapping[str, str], zygote: forking.Zygote | None
) -> subprocess.Popen[bytes] | forking.Forked:
    """A copy of the command's zygote where it has one, a new process where not."""
    if zygote is not None:
        said, says = forking.pipe()
        try:
            pid = zygote.fork(module, environment, (requests, replies, says))
        except forking.Refused:
            os.close(said)  # a new process is as good, and slower; `zygote.refused` keeps the reason
        except BaseException:
            os.close(said)
            raise
        else:
            return forking.Forked(zygote, pid, os.fdopen(said, "rb"))
        finally:
            os.close(says)
    return subprocess.Popen(
        [sys.executable, "-m", module, str(requests), str(replies)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(requests, replies),
        start_new_session=True,
        env=dict(environment),
    )


def forks(act: Callable[Concatenate[J, P], T]) -> Callable[Concatenate[J, P], T]:
    """For a command of several children, a Job or several: they are copies of a process that has imported torch, and what else more than one of them needs."""

    @functools.wraps(act)
    def acted(job: J, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with forking.kept({**os.environ, **child_environment()}, forking.expected_of((job,) if isinstance(job, Job) else job)):
            return act(job, *args, **kwargs)

    return acted


def child_environment() -> dict[str, str]:
    """Variables a child gets: a private compiler cache, a folder shared with the command's other children, and no surprises from the terminal."""
    cache = cache_root() / "inductor"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    values = {
        "PYTHONUNBUFFERED": "1",
        # torch's default is a predictable folder that others can read: what lies there is code.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache / "triton")),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "AOTI_RUNTIME_CHECK_INPUTS": "1",
        "ORT_DISABLE_TELEMETRY": "1",  # its Linux wheels write a device id and a database into the user's cache, and send events
        "KINETO_LOG_LEVEL": "99",  # its notices would fill the tail of stderr that reasons are taken from
        **commons.environment(cache_root()),
    }
    return values


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/gpuopt`, made private."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuopt"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the cache folder {root} cannot be made: {error.strerror}", fix="set XDG_CACHE_HOME to a folder you own"
        ) from error
    return root


def last_lines(text: str, *, lines: int = 3, limit: int = 600) -> str:
    """The end of a log in one line, for a reason."""
    kept = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
    return " | ".join(kept)[-limit:]


def crash_lines(text: str) -> str:
    """What a dead child said last: the innermost Python frames where faulthandler wrote them, else the end of its stderr."""
    _, fatal, dump = text.rpartition("Fatal Python error: ")
    frames = [line.strip() for line in dump.splitlines() if line.lstrip().startswith("File ")] if fatal else []
    if not frames:
        return last_lines(text)
    # Paths are this machine's: the part from the package on says enough.
    short = [frame.replace('"', "").rsplit("site-packages/", 1)[-1].removeprefix("File ") for frame in frames[:4]]
    said = last_lines(text[: text.rindex("Fatal Python error: ")], lines=1, limit=200)
    return " < ".join(short) + (f" | {said}" if said else "")


def _failed(failure: Failure) -> ChildFailed:
    kind = error_types().get(failure.type)
    error = kind(failure.message, fix=failure.fix) if kind else None
    return ChildFailed(
        Status(failure.status),
        failure.message if kind else f"{failure.type}: {failure.message}",
        fix=failure.fix,
        error=error,
        traceback=failure.traceback,
    )


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
