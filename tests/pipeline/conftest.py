"""Small models in a file, a short BenchSpec, a machine nobody measured, and children that live in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.core import codec
from gpuopt.core.result import Device, Report
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, DimSpec, InputSpec, Job, ModelRef, Precision
from gpuopt.devices import info, null
from gpuopt.pipeline import environment, facts, isolate, worker
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

    def __init__(self) -> None:
        self.session: Session | None = Session()
        self.pid = next(self.pids)

    def call(self, verb: str, result: Any, *, timeout_s: float, on_progress: Any = None, **arguments: Any) -> Any:
        assert self.session is not None, f"{verb} was asked of a child that had ended"
        frame = json.loads(json.dumps({k: codec.dump(v) if hasattr(v, "__dataclass_fields__") else v for k, v in arguments.items()}))
        try:
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

    def __enter__(self) -> LocalChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    yield made
    assert all(c.session is None for c in made)


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def tools() -> Any:
    """The functions of this file, which tests cannot import."""
    from types import SimpleNamespace

    return SimpleNamespace(
        candidate=candidate, job=job, Watcher=Watcher, QUICK=QUICK, left_in=left_in, fake_survey=fake_survey, LocalChild=LocalChild
    )
