"""A small model of blocks, its factory as a file, and children of `gpuopt stream` that live in this process: frames cross as JSON all the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpuopt.core import codec
from gpuopt.core.spec import Candidate, DimSpec, InputSpec, ModelRef
from gpuopt.core.streamed import StreamRequest
from gpuopt.pipeline import isolate, worker
from gpuopt.pipeline.facts import Failure
from gpuopt.pipeline.streamed import child
from gpuopt.pipeline.streamed.session import StreamSession

FACTORY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, depth=8, width=64):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build():
    torch.manual_seed(7)
    return Stack().eval()


build.input_specs = ("ids:int64[N,S]<50",)
"""


@contextmanager
def on_a_gpu(folder: Path, source: str, **sizes: int) -> Iterator[StreamSession]:
    """A session of this process with the model of this factory loaded."""
    torch._C._cuda_clearCublasWorkspaces()  # of the test before: no plan would count it
    path = folder / "stack.py"
    path.write_text(source, encoding="utf-8")
    with StreamSession() as found:
        found.load(
            Candidate(
                model=ModelRef(text=f"{path}:build", trust=(str(path),)),
                inputs=InputSpec(dims=tuple(DimSpec(name=k, values=(v,)) for k, v in sizes.items())),
                dims=sizes,
                device="cuda",
            ),
            StreamRequest(action="run"),
        )
        yield found


DEVICE = "simulated:link=1e9,block=0.05ms"
_pids = itertools.count(100_000)


class Inline:
    """Stands in for `isolate.Child`: a session of this process, asked in the same frames."""

    asked: list[str] = []
    alive = True

    def __init__(self, module: str, **_: Any) -> None:
        assert module == "gpuopt.pipeline.streamed.child"
        self.pid = next(_pids)
        self.session = StreamSession()

    def call(self, verb: str, result: Any, *, timeout_s: float, on_progress: Any = None, **arguments: Any) -> Any:
        Inline.asked.append(verb)
        plain = {k: codec.dump(v) if hasattr(v, "__dataclass_fields__") else v for k, v in arguments.items()}
        given = {k: codec.from_plain(child.ARGUMENTS[k], v) if k in child.ARGUMENTS else v for k, v in plain.items()}
        try:
            found = getattr(self.session, verb)(**given)
        except Exception as error:
            failure = codec.from_plain(Failure, codec.dump(worker.describe(error, verb)))
            raise isolate._failed(failure) from error
        return codec.from_plain(result, codec.dump(found))

    def kill(self) -> None:
        """The session is this process's: it is closed instead."""
        self.alive = False

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()


def factory(folder: Path) -> str:
    """A name that `gpuopt stream` takes."""
    path = folder / "stack.py"
    path.write_text(FACTORY, encoding="utf-8")
    return f"{path}:build"
