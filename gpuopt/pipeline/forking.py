"""A command's zygote (zygote.py) from its parent's side: asked for children, which start in hundredths of a second instead of the time their imports take.

A command that keeps one open (`kept`) gets its children from it; each is a process, group and session of its own, as one started by exec, and ends with the zygote, which ends with
this process. Where a fork would differ from a new process (other variables that libraries read when they are imported, an import that touched the device) the child is a new
process, and `Zygote.refused` says why.

Nothing is imported in the zygote while a command measures: what its children will need is imported when the next one is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from gpuopt.core.spec import Job

SLOW = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.export",
    "triton",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "torchvision",
    "timm",
    "diffusers",
    "onnx",
)
"""What is worth importing once, and all that ever is: a child that runs a hostile file cannot name anything else."""
COMPILED = ("inductor", "aoti")
"""Backends that import torch's compiler."""
COMPILERS = ("torch._dynamo", "torch._inductor.compile_fx")
TRANSFORMERS = ("transformers", "transformers.modeling_utils")

ADOPTED = frozenset(
    {
        "OMP_NUM_THREADS",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "PYTHONPATH",
        "CUDA_VISIBLE_DEVICES",
        "GPUOPT_REFERENCES",
    }
)
"""Variables that a fork can still take up, since they are read when they are needed or set anew in it; one that differs in another is no child of the zygote's."""
VARIABLE = "GPUOPT_FORK"
"""0: every child is a new process, for whoever finds a library that cannot be forked."""
MAX_SOURCES = 30
MAX_ENTRIES = 10_000
MAX_SOURCE_BYTES = 1 << 18
"""Of a factory's file, looked through for what it imports."""
START_TIMEOUT_S = 300.0
"""For imports on a slow disk."""


class Refused(Exception):
    """There is no fork to be had; the text says why."""


class Forked:
    """A child of the zygote, with what isolate.Child uses of subprocess.Popen."""

    def __init__(self, zygote: Zygote, pid: int, stderr: IO[bytes]) -> None:
        self.pid = pid
        self.stderr: IO[bytes] | None = stderr
        self._zygote = zygote
        self._code: int | None = None
        """Once known, for good: its number may be another child's later."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._zygote.code(self.pid)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self._code is None:
            self._code = self._zygote.wait(self.pid, timeout)
        if self._code is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return self._code

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended: its number may be somebody else's by now."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Zygote:
    """One process that forks. It starts when its first child is asked for, who waits for its imports as it would for its own."""

    def __init__(self, environment: Mapping[str, str], expected: Iterable[str] = ()) -> None:
        self.environment = dict(environment)
        self.refused = ""
        """Why the last child that was asked for is none of its own."""
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._answers: dict[int, Mapping[str, Any]] = {}
        """By the number of their request: whoever asked may have been interrupted, and the next one must not get that child."""
        self._asked = 0
        self._codes: dict[int, int] = {}
        self._is_gone = False
        self._pending = dict.fromkeys(name for name in expected if name in SLOW)

    def _start(self) -> None:
        self._link, theirs = (socket.socket(fileno=above_streams(end.detach())) for end in socket.socketpair())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpuopt.pipeline.zygote", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env=self.environment,
        )
        theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        """Of the process that forks; None before it was needed."""
        return self._process.pid if self._process is not None else None

    def expect(self, names: Iterable[str]) -> None:
        """Modules that later children will import: imported before the next one is forked. Names that are not in SLOW are ignored."""
        self._pending.update(dict.fromkeys(name for name in names if name in SLOW))

    def fork(self, module: str, environment: Mapping[str, str], fds: Sequence[int]) -> int:
        """The pid of a child that runs `module.main()` with (requests, replies, stderr). Raises Refused."""
        differing = {k for k in {*environment, *self.environment} if environment.get(k) != self.environment.get(k)} - ADOPTED
        if differing:
            raise self._no(f"{', '.join(sorted(differing))} differ from what its imports saw")
        with self._asking:
            self._asked += 1
            number = self._asked
            frames: list[dict[str, Any]] = [{"fork": module, "number": number, "environment": dict(environment), "folder": os.getcwd()}]
            if self._process is None:
                self._start()
            elif self._pending:  # the first child measures the machine, and needs none of them
                frames.insert(0, {"import": list(self._pending)})
                self._pending.clear()
            try:
                for frame in frames:
                    data = json.dumps(frame).encode() + b"\n"
                    if "fork" in frame:
                        sent = socket.send_fds(self._link, [data], list(fds))
                        self._link.sendall(data[sent:])
                    else:
                        self._link.sendall(data)
            except OSError as error:
                raise self._no("the process that forks has ended") from error
            answer = self._answer(number)
        if "pid" not in answer:
            raise self._no(str(answer.get("cannot", "the process that forks has ended")))
        self.refused = ""
        return int(answer["pid"])

    def _no(self, why: str) -> Refused:
        self.refused = why
        return Refused(why)

    def _answer(self, number: int) -> Mapping[str, Any]:
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._changed:
            while number not in self._answers:
                if self._is_gone:
                    return {}
                if not self._changed.wait(timeout=max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    self._kill()
                    return {"cannot": f"no answer in {START_TIMEOUT_S:g} s"}
            return self._answers.pop(number)

    def _read(self) -> None:
        buffer = b""
        while True:
            try:
                data = self._link.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            with self._changed:
                for line in lines:
                    self._hear(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._is_gone = True
            self._changed.notify_all()

    def _hear(self, frame: Mapping[str, Any]) -> None:
        if "ended" in frame:
            pid, code = frame["ended"]
            self._codes[pid] = code
        elif "pid" in frame or "cannot" in frame:
            if "pid" in frame:  # before its end can be heard of: a number may come twice in a long life
                self._codes.pop(frame["pid"], None)
            self._answers[frame["number"]] = frame

    def code(self, pid: int) -> int | None:
        """How this child ended; None while it runs."""
        with self._changed:
            return self._code(pid)

    def _code(self, pid: int) -> int | None:
        if pid not in self._codes and self._is_gone:
            return -signal.SIGKILL  # the kernel ends them with the process that forked them
        return self._codes.get(pid)

    def wait(self, pid: int, timeout: float | None) -> int | None:
        """How this child ended; None where it still runs after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._code(pid) is not None, timeout=timeout)
            return self._code(pid)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End it, and with it every child that still runs. Harmless twice, and where it never started."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._kill()
        self._process.wait()
        self._reader.join(timeout=5.0)
        self._link.close()


SPARED: dict[str, float] = {}
"""In a fork: module -> the seconds its import took in the zygote. Empty in a process that imported for itself."""


def spared_s(backend: str, module: object) -> float:
    """Seconds that a new process would have imported this backend's compiler and this module's library; torch, which all import, counts from the start."""
    names = [name for name in SPARED if name.startswith("torch.") and backend in COMPILED]
    roots = {type(part).__module__.partition(".")[0] for part in getattr(module, "modules", lambda: ())()}
    names += [name for name in SPARED if name.partition(".")[0] in roots - {"torch"}]
    return sum(SPARED[name] for name in names)


class _Kept(threading.local):
    """A thread's own: a command of another thread ends its children with itself. And a process's own: whoever forked has a copy of the list and of nobody who reads."""

    def __init__(self) -> None:
        self.zygote: Zygote | None = None
        self.owner = 0


_kept = _Kept()


def current() -> Zygote | None:
    """That of the command that runs now in this thread; None where there is none."""
    return _kept.zygote if _kept.owner == os.getpid() else None


def above_streams(fd: int) -> int:
    """The same with a number above stderr's: a command whose streams are closed gets theirs, and a child's own would be laid over it."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def pipe() -> tuple[int, int]:
    """Read and write end, neither of them in the place of a standard stream."""
    r, w = os.pipe()
    return above_streams(r), above_streams(w)


@contextmanager
def kept(environment: Mapping[str, str], expected: Iterable[str] = ()) -> Iterator[Zygote | None]:
    """Within, children are forked. Commands within commands use the outermost's. None where the system cannot fork safely, and where GPUOPT_FORK=0."""
    if current() is not None or sys.platform != "linux" or os.environ.get(VARIABLE) == "0":
        yield current()
        return
    zygote = Zygote(environment, expected)
    _kept.zygote, _kept.owner = zygote, os.getpid()
    try:
        yield zygote
    finally:
        if _kept.owner == os.getpid():
            _kept.zygote = None
            zygote.close()


def imported() -> frozenset[str]:
    """Which of SLOW this process has imported."""
    return frozenset(name for name in SLOW if name in sys.modules)


def expected_of(jobs: Sequence[Job]) -> tuple[str, ...]:
    """What more than one of the jobs' children will import, as far as their names tell."""
    candidates = [candidate for job in jobs for candidate in job.candidates]
    searches = any(job.verb == "optimize" for job in jobs)
    if len(candidates) < 2 and not searches and not any(job.verb == "doctor" for job in jobs):
        return ()
    compiled = searches or sum(candidate.backend.name in COMPILED for candidate in candidates) > 1
    texts = {candidate.model.text for candidate in candidates}
    uses_transformers = any(text.startswith(("gpuopt.models:", "hf:")) or _names_transformers(text) for text in texts)
    return (*(COMPILERS if compiled else ()), *(TRANSFORMERS if uses_transformers else ()))


def _names_transformers(text: str) -> bool:
    """A transformers folder, or a factory whose file, or one beside it, mentions the library. Nothing is run to find out."""
    if os.path.isfile(os.path.join(text, "config.json")):
        return True
    where, _, name = text.rpartition(":")
    if not name.isidentifier():
        return False
    files = [where] if where.endswith(".py") else [os.path.join(root, *where.split(".")) + ".py" for root in ("", *sys.path)]
    found = next((file for file in files if os.path.isfile(file)), None)
    if found is None:
        return False
    beside: list[str] = []
    with contextlib.suppress(OSError), os.scandir(os.path.dirname(found) or ".") as entries:  # a folder that may be entered and not listed
        few = itertools.islice(entries, MAX_ENTRIES)
        beside = sorted(entry.path for entry in few if entry.name.endswith(".py") and entry.is_file())
    return any(_mentions(file, b"transformers") for file in [found, *beside[:MAX_SOURCES]])


def _mentions(file: str, word: bytes) -> bool:
    with contextlib.suppress(OSError), open(file, "rb") as source:
        return word in source.read(MAX_SOURCE_BYTES)
    return False
