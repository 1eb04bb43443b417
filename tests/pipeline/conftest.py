"""Small models in a file, a short BenchSpec, a machine nobody measured, and children that live in this process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from gpuopt.converters import precision as precisions
from gpuopt.core import codec
from gpuopt.core.result import Device, Report
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, DimSpec, InputSpec, Job, ModelRef, Precision
from gpuopt.devices import info, null
from gpuopt.pipeline import environment, facts, forking, isolate, worker
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.session import Session

SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Pair(nn.Module):
    """Integers in, positional and keyword; a nested dict out."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, ids, mask=None):
        hidden = self.embed(ids)
        hidden = hidden * mask.unsqueeze(-1).to(hidden.dtype)
        return {"hidden": hidden, "more": (self.last(hidden), ids.sum(-1))}


class Writer(Net):
    """Writes into its own input, as some models do."""

    def forward(self, x):
        x.add_(1.0)
        return super().forward(x)


class Conv(nn.Module):
    """Its bias is so small that bf16 rounds it away."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        with torch.no_grad():
            self.conv.bias.fill_(5e-4)

    def forward(self, x):
        return self.conv(x)


def made(module):
    torch.manual_seed(0)
    return module().eval()


def net():
    return made(Net)


def pair():
    return made(Pair)


def writer():
    return made(Writer)


def conv():
    return made(Conv)


net.input_specs = ("x:float32[N,16]",)
writer.input_specs = ("x:float32[N,16]",)
conv.input_specs = ("x:float32[N,3,12,12]",)
pair.input_specs = ("ids:int64[N,S]<50", "mask:int64[N,S]=1")
'''

QUICK = BenchSpec(
    min_time_s=0.05, max_time_s=0.5, min_iterations=10, warmup_s=0.02, max_warmup_s=0.06, block_ms=5.0, num_pairs=6, energy_s=0.0
)


def candidate(model: str, backend: str = "eager", precision: str | None = None, **dims: int) -> Candidate:
    return Candidate(
        model=ModelRef(text=model),
        backend=BackendSpec.parse(backend),
        precision=Precision(precision) if precision else None,
        inputs=InputSpec(dims=tuple(DimSpec(name=n, values=(v,)) for n, v in dims.items())),
        dims=dims,
        device="cpu",
    )


def job(verb: str, *candidates: Candidate, **fields: Any) -> Job:
    return Job(verb=verb, candidates=candidates, **{"bench": QUICK, **fields})


class Watcher:
    """Keeps what a job tells."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.reports: list[Report] = []
        self.steps: list[tuple[str, str]] = []

    def start(self, key: str, label: str) -> None:
        self.steps.append((key, label))

    def update(self, key: str, fraction: float | None, note: str = "") -> None:
        assert fraction is None or 0 <= fraction <= 1

    def done(self, key: str, note: str = "") -> None:
        self.steps.append((key, note))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def so_far(self, report: Report) -> None:
        assert codec.from_json(Report, codec.to_json(report), what="partial report") == report
        self.reports.append(report)


class LocalChild:
    """isolate.Child without the process: every argument, answer and failure takes the same way through JSON."""

    pids = iter(range(1, 1 << 30))
    alone = threading.RLock()
    """Children that build at once are threads here, and a step sets switches of the process while it works."""

    def __init__(self) -> None:
        self.session: Session | None = Session()
        self.pid = next(self.pids)

    def call(self, verb: str, result: Any, *, timeout_s: float, on_progress: Any = None, **arguments: Any) -> Any:
        assert self.session is not None, f"{verb} was asked of a child that had ended"
        frame = json.loads(json.dumps({k: codec.dump(v) if hasattr(v, "__dataclass_fields__") else v for k, v in arguments.items()}))
        try:
            with self.alone:
                plain = codec.dump(worker._perform(self.session, verb, frame))
        except Exception as error:
            failure = json.loads(json.dumps(codec.dump(worker.describe(error, verb))))
            raise isolate._failed(codec.from_plain(facts.Failure, failure, what="worker")) from error
        return codec.from_plain(result, json.loads(json.dumps(plain, allow_nan=False)), what=verb)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None

    alive = True

    def pause(self) -> None:
        """Threads of one process cannot stand still."""

    resume = kill = pause

    def __enter__(self) -> LocalChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Forked:
    """subprocess.Popen for gpuopt's worker alone: a process, group and pipes of its own, but copied from this one, where torch is imported already.

    A crash, a signal, a hang and a full pipe are the real ones; only `python -m` and its four seconds of imports are left out, which other tests pay for.
    """

    def __init__(self, args: list[str], *, pass_fds: tuple[int, ...], env: Mapping[str, str], **options: Any) -> None:
        assert args[1:3] == ["-m", "gpuopt.pipeline.worker"] and options.pop("start_new_session"), args
        assert options == {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}, options
        self.returncode: int | None = None
        self._lock = threading.Lock()
        said, says = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become_worker(args, says, pass_fds, env)
        os.close(says)
        self.stderr = open(said, "rb")

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.005)
        return code


def _become_worker(args: list[str], says: int, pass_fds: tuple[int, ...], env: Mapping[str, str]) -> NoReturn:
    """What exec would have done, in the copy."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for mine, wanted in ((nothing, 0), (nothing, 1), (says, 2)):
            os.dup2(mine, wanted)
        kept = sorted({2, *pass_fds, os.sysconf("SC_OPEN_MAX")})
        for low, high in itertools.pairwise(kept):
            os.closerange(low + 1, high)
        for fd in pass_fds:
            os.set_inheritable(fd, True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
        sys.argv = ["worker", *args[3:]]
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        import torch

        torch.set_num_threads(1)  # OpenMP's threads are not in the copy
        worker.STARTED = time.monotonic()
        worker.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """From here on every isolate.Child is a copy of this process."""
    import torch._dynamo.config  # noqa: F401 - for counting FLOPs; here once, not in every copy

    from gpuopt.pipeline import session  # noqa: F401

    patch.setattr(forking, "current", lambda: None)  # a copy of this process is as quick as one of a zygote's, which would have to start
    patch.setattr(isolate, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))


SEEN_BY_TESTS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME"}
"""Variables that change from test to test, and that no import has read by then."""


@pytest.fixture(scope="module")
def shared_zygote() -> Iterator[forking.Zygote]:
    made = forking.Zygote({**os.environ, **isolate.child_environment()})
    yield made
    made.close()


@pytest.fixture
def kept(shared_zygote: forking.Zygote, monkeypatch: pytest.MonkeyPatch) -> forking.Zygote:
    """Every isolate.Child of this test is a fork of one process, if it can be."""
    monkeypatch.setattr(forking, "current", lambda: shared_zygote)
    monkeypatch.setattr(forking, "ADOPTED", forking.ADOPTED | SEEN_BY_TESTS)
    return shared_zygote


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real children that start at once."""
    fork_workers(monkeypatch)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """models("net") -> `file.py:net`."""
    path = tmp_path_factory.mktemp("models") / "small.py"
    path.write_text(SOURCE)
    return lambda name: f"{path}:{name}"


def fake_survey(*_: Any, **__: Any) -> facts.Survey:
    """This machine under ceilings that nothing here can reach: measuring them would take longer than all else."""
    device: Device = replace(info.describe("cpu"), ceilings=null.CEILINGS)
    return facts.Survey(environment=environment.describe(), device=device)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "survey", fake_survey)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, unmeasured: None) -> Iterator[list[LocalChild]]:
    """Jobs run in this process; the children they made, each of which must have ended."""
    made: list[LocalChild] = []

    def child(**more: object) -> LocalChild:
        made.append(LocalChild())
        return made[-1]

    monkeypatch.setattr(isolate, "Child", child)
    with precisions.switches_kept():  # sessions that are alive together close in any order, and each puts back what it found
        yield made
    assert all(c.session is None for c in made)


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def tools() -> Any:
    """The functions of this file, which tests cannot import."""
    return SimpleNamespace(
        candidate=candidate, job=job, Watcher=Watcher, QUICK=QUICK, left_in=left_in, fake_survey=fake_survey, LocalChild=LocalChild
    )
