"""Models that read a streamed block's weights where the block does not run: refused in their first forward, and in each after it; those that do not are left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpuopt
from gpuopt.core.errors import Unsupported
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.streamed import bench


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))

    def pre(self, x: Tensor) -> Tensor:
        return self.a(x)


class Stack(nn.Module):
    def __init__(self, step: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(8))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.step(layer, x)  # type: ignore[arg-type]
        return x


STEPS: dict[str, tuple[bool, Callable[[Any, Tensor], Tensor]]] = {
    "called": (True, lambda block, x: block(x)),
    "its children": (False, lambda block, x: x + block.b(torch.relu(block.a(x)))),
    "a method": (False, lambda block, x: block.pre(x)),
    "a weight": (False, lambda block, x: F.linear(x, block.a.weight)),
    "a weight after the block": (False, lambda block, x: block(x) + block.b.bias),
    "a weight's shape alone": (True, lambda block, x: block(x) * block.a.weight.shape[0]),
    "a weight's dtype and device": (
        True,
        lambda block, x: block(x).type_as(block.a.weight).to(block.a.weight) + block.a.weight.new_zeros(1),
    ),
    "a cast of a weight": (False, lambda block, x: block(x) + block.a.bias.type_as(x)),
}


@pytest.mark.parametrize("step", STEPS)
def test_who_reads_a_block_from_outside_is_refused(step: str) -> None:
    is_right, does = STEPS[step]
    torch.manual_seed(0)
    module, x = Stack(does).eval(), torch.randn(3, 32)
    with torch.no_grad():
        wanted = module(x)
    with gpuopt.stream(module, budget="60%", inputs=x, device="simulated") as streamed:
        for _ in range(3):
            if is_right:
                assert torch.equal(streamed(x), wanted)
            else:
                with pytest.raises(Unsupported, match="outside that block's forward"):
                    streamed(x)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)


def test_one_forward_is_watched_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt.streaming import reaching

    seen = []
    look = reaching.Watch._look
    monkeypatch.setattr(reaching.Watch, "_look", lambda self, func, tensor: (seen.append(func), look(self, func, tensor)))
    module, x = Stack(STEPS["called"][1]).eval(), torch.randn(3, 32)
    with gpuopt.stream(module, budget="60%", inputs=x, device="simulated") as streamed:
        streamed(x)
        first = len(seen)
        streamed(x)
    assert first and len(seen) == first


def test_a_bench_with_other_outputs_fails() -> None:
    """Whatever nobody saw: compiled blocks are not watched."""
    plan = SimpleNamespace(spec=StreamSpec(budget_share=0.5))
    rows = [SimpleNamespace(measured=SimpleNamespace(exact=exact, plan=plan)) for exact in (True, None, False)]
    judged = bench._same_bits(SimpleNamespace(rows=[*rows, SimpleNamespace(measured=None)]))  # type: ignore[arg-type]
    assert [(gate.name, gate.passed) for gate in judged] == [("outputs", False)]
