"""What the tests of the catalogue share: small models, hostile files, and a whole command in this process or in one of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
net.input_specs = ("x:float32[N,4]",)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 4)
    def forward(self, x):
        return self.line(x) if x.sum() > 0 else self.line(x) * 2
def branches():
    return Branches().eval()
branches.input_specs = ("x:float32[N,4]",)

def training():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
training.input_specs = ("x:float32[N,4]",)
"""

QUICK = ("--min-time", "10ms", "--max-time", "200ms", "--pairs", "6", "--sustained", "off", "--timeout", "60s")


def imported(name: str, path: Path) -> Any:
    """A file of the tests as a module: with --import-mode=importlib they cannot import each other."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


corpus: Any = imported("attack_corpus", TESTS / "attacks" / "corpus.py")
pipeline: Any = imported("catalogue_pipeline", TESTS / "pipeline" / "conftest.py")
devices: Any = imported("catalogue_devices", TESTS / "devices" / "conftest.py")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What happened, once it is sure that the error is the last thing said, in one line, and that one line of what to do follows it."""
        assert "Traceback" not in self.err, self.err
        assert "weights_only" not in self.err, "unsafe advice"
        lines = self.err.splitlines()
        at = [i for i, line in enumerate(lines) if line.startswith("error GPO")]
        assert at == [len(lines) - 2], self.err
        said, _, message = lines[-2].partition(": ")
        assert said.removeprefix("error GPO").isdigit() and message.strip()
        assert lines[-1].startswith("  → ") and lines[-1][4:].strip()
        assert self.out == "", "data of a command that failed"
        return message

    @property
    def fix(self) -> str:
        """What to do."""
        assert self.message
        return self.err.splitlines()[-1][4:]


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """command(*words): everything that the command does, with its children in this process; only the ceilings are not measured."""
    from gpuopt.cli import app
    from gpuopt.devices import ceilings, null
    from gpuopt.pipeline import isolate

    children: list[Any] = []

    def child(**more: Any) -> Any:
        children.append(pipeline.LocalChild())
        return children[-1]

    monkeypatch.setattr(isolate, "Child", child)
    monkeypatch.setattr(ceilings, "all_ceilings", lambda *_, **__: null.CEILINGS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(MODELS)

    def run(*words: str) -> Ended:
        capsys.readouterr()
        code = app.run(words)
        found = capsys.readouterr()
        assert all(c.session is None for c in children), "a child is left"
        return Ended(code=code, out=found.out, err=found.err)

    yield run
    sys.path_importer_cache.pop(str(tmp_path), None)


def gpuopt(*words: str, cwd: Path, **env: str) -> Ended:
    """The same in processes of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "gpuopt", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return Ended(code=result.returncode, out=result.stdout, err=result.stderr)


def left(folder: Path) -> dict[str, bytes]:
    """Every file below, to see that nothing was written."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and p.stat().st_size < 2**20 else b""
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }
