"""Products of one row taken out of a traced graph: which ones, with whom, and that the result is the module's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpuopt.programs.one_row import OneRow
from gpuopt.programs.ops import matvec


class Block(nn.Module):
    """A layer's products: three of one row, one, two of one row, and two that read another product."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, n, bias=False) for n in (64, 32, 32, 64))
        self.gate, self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        row = F.layer_norm(x, (64,))
        attended = self.o(self.q(row) + torch.cat([self.k(row), self.v(row)], -1))
        return x + self.down(F.silu(self.gate(attended)) * self.up(attended))


def one(row: Tensor, weight: Tensor) -> bool:
    """`matvec.takes` without the GPU and the halves."""
    return row.numel() == row.shape[-1]


def compiled(module: nn.Module, *given: Tensor, least_bytes: int = 0, **more: Any) -> tuple[Tensor, OneRow]:
    rows = OneRow(takes=one, least_bytes=least_bytes)
    torch._dynamo.reset()
    with torch.no_grad():
        found: Tensor = torch.compile(module, fullgraph=True, options=rows.settings, **more)(*given)
    return found, rows


def test_products_of_the_same_row_are_one_launch_and_the_result_is_the_modules() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Block(), Block()).eval()
    x = torch.randn(1, 1, 64)
    found, rows = compiled(module, x)
    assert (rows.num_changed, rows.num_launches) == (14, 8)
    with torch.no_grad():
        wanted = module.double()(x.double())
    assert (found - wanted).norm() / wanted.norm() < 1e-6


def test_more_rows_and_a_bias_are_left_alone() -> None:
    module = Block().eval()
    found, rows = compiled(module, torch.randn(1, 2, 64))
    assert rows.num_changed == 0 and found.shape == (1, 2, 64)
    _, rows = compiled(Block(bias=True).eval(), torch.randn(1, 1, 64))
    assert rows.num_changed == 6


def test_a_launch_has_so_many_matrices_and_no_more() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    module, x = Many().eval(), torch.randn(1, 16)
    found, rows = compiled(module, x)
    assert (rows.num_changed, rows.num_launches) == (7, 3) and matvec.MOST == 3
    with torch.no_grad():
        assert torch.allclose(found, module(x), atol=1e-6)


class Written(nn.Module):
    """Two products of one row, which is written in between."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.q, self.k, self.write = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), write

    def forward(self, x: Tensor) -> Tensor:
        row = x * 1
        found = self.q(row)
        self.write(row)
        return found + self.k(row)


def add(x: Tensor) -> None:
    x += 1


def put(x: Tensor) -> None:
    x[:, 0] = 7


WRITES = {"add_": lambda x: x.add_(1), "+=": add, "[]=": put, "out=": lambda x: torch.sin(torch.zeros_like(x) + 1, out=x)}


@pytest.mark.parametrize("write", WRITES)
def test_a_product_does_not_move_up_over_what_writes_its_row(write: str) -> None:
    module, x = Written(WRITES[write]).eval(), torch.randn(1, 16)
    with torch.no_grad():
        wanted = module(x)
    found, rows = compiled(module, x)
    assert torch.allclose(found, wanted, atol=1e-5) and (rows.num_changed, rows.num_launches) == (2, 2)


def test_only_a_modules_own_weights_are_taken_for_nobody_writes_them_meanwhile() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            first = F.linear(x, self.weight)
            return F.linear(x, self.weight * 2) + F.linear(x, self.weight * first.sum()) + first

    module, x = Computed().eval(), torch.randn(1, 16)
    found, rows = compiled(module, x)
    with torch.no_grad():
        assert torch.allclose(found, module(x), rtol=1e-4, atol=1e-3)
    assert rows.num_changed == 1


def test_a_weight_that_the_graph_writes_is_left_alone() -> None:
    class Learns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.mul_(0.5)
            return F.linear(x, self.weight)

    x = torch.randn(1, 16)
    found, rows = compiled(Learns().eval(), x)
    with torch.no_grad():
        assert torch.allclose(found, Learns().eval()(x), atol=1e-6) and rows.num_changed == 0


def test_small_products_are_left_to_the_compiler() -> None:
    _, rows = compiled(Block().eval(), torch.randn(1, 1, 64), least_bytes=64 * 128 * 4)
    assert rows.num_changed == 2 + 3 + 1, "q with k and v; gate with up; down"


@pytest.mark.parametrize(
    ("row", "weight"),
    [
        (torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)),
        (torch.zeros(1, 64), torch.zeros(8, 64)),
    ],
    ids=["a CPU", "fp32"],
)
def test_the_kernel_is_not_asked_for_what_it_does_not_take(row: Tensor, weight: Tensor) -> None:
    assert not matvec.takes(row, weight)
    (found,) = matvec.matvecs(row, [weight])
    assert found.shape == (1, 8) and found.dtype == row.dtype


def test_the_operator_is_what_the_compiler_takes_it_for() -> None:
    torch.manual_seed(0)
    row, weights = torch.randn(1, 1, 32), [torch.randn(n, 32) for n in (8, 3)]
    torch.library.opcheck(torch.ops.gpuopt.matvecs.default, (row, weights))
