"""`gpuopt stream --graphs` on a GPU: what verify finds under the plan's cap, and whether the ledger holds the graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.streamed.session import StreamSession

sys.path.insert(0, str(Path(__file__).parent))

import streams

pytestmark = pytest.mark.gpu

FACTORY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(1024)
        self.up = nn.Linear(1024, 4096)
        self.down = nn.Linear(4096, 1024)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 1024)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(1024, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build():
    torch.manual_seed(7)
    return Stack().eval().half()


build.input_specs = ("ids:int64[N,S]<50",)
"""


@pytest.fixture
def session(tmp_path: Path) -> Iterator[StreamSession]:
    with streams.on_a_gpu(tmp_path, FACTORY, N=1, S=64) as found:
        yield found


def test_verify_passes_under_the_plans_cap_and_counts_the_graphs(session: StreamSession) -> None:
    found = session.verify(StreamSpec(budget_share=0.5, graphs=True), forwards=24)
    assert {check.name: check.passed for check in found.checks} == dict.fromkeys(
        ("checksums", "outputs", "graphs", "races", "order"), True
    ), [check.detail for check in found.checks]


def test_the_ledger_of_a_plan_holds_the_graphs(session: StreamSession) -> None:
    ready = session.bind(StreamSpec(budget_share=0.5, graphs=True))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        session.work.call()
    torch.cuda.synchronize()
    assert ready.plan is not None
    ledger = ready.plan.ledger
    assert torch.cuda.max_memory_allocated() <= ledger.total - ledger.context
    (note,) = [note for note in session.notes if note.startswith("CUDA graphs of ")]
    assert note.startswith("CUDA graphs of 12 of 12 units: 12 graphs")
