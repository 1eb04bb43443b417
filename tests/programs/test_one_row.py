"""Products of one row taken out of a traced graph: which ones, with whom, what follows them, and that the result is the module's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
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


class Seen(OneRow):
    """With the names of the activations that it took into a launch, in the graph's order."""

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        self.gated = [node.args[3] for node in graph.nodes if node.target is torch.ops.gpuopt.gated_matvec.default]


def compiled(module: nn.Module, *given: Tensor, least_bytes: int = 0, **more: Any) -> tuple[Tensor, Seen]:
    rows = Seen(takes=one, least_bytes=least_bytes)
    torch._dynamo.reset()
    with torch.no_grad():
        found: Tensor = torch.compile(module, fullgraph=True, options=rows.settings, **more)(*given)
    return found, rows


def test_products_of_the_same_row_are_one_launch_and_the_result_is_the_modules() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Block(), Block()).eval()
    x = torch.randn(1, 1, 64)
    found, rows = compiled(module, x)
    assert (rows.num_changed, rows.num_launches, rows.gated) == (14, 8, ["silu", "silu"])
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


class Gated(nn.Module):
    """Two products of one row, and what is made of them."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], first: str = "gate", up: int = 32) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32, bias=False), nn.Linear(16, up, bias=False)
        self.join, self.is_gate_first = join, first == "gate"

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gate_first:
            gate, up = self.gate(x), self.up(x)
        else:
            up, gate = self.up(x), self.gate(x)
        return self.join(gate, up)


def is_the_modules(module: nn.Module, least_bytes: int = 0) -> Seen:
    """Against fp64, without the seconds of a code generator: the graph is run as the pass leaves it."""
    rows = Seen(takes=one, least_bytes=least_bytes)

    def passed(traced: fx.GraphModule, _: Any) -> Callable[..., Any]:
        rows(traced.graph)
        traced.recompile()
        return traced.forward

    torch.manual_seed(0)
    torch._dynamo.reset()
    module, x = module.eval(), torch.randn(1, 1, 16)
    with torch.no_grad():
        found = torch.compile(module, fullgraph=True, backend=passed)(x)
        wanted = module.double()(x.double())
    assert (found - wanted).norm() / wanted.norm() < 1e-6
    return rows


TAKEN = {
    "F.silu": ("silu", lambda gate, up: F.silu(gate) * up),
    "nn.SiLU": ("silu", lambda gate, up: nn.SiLU()(gate) * up),
    "aten.silu": ("silu", lambda gate, up: torch.ops.aten.silu(gate) * up),
    "swapped": ("silu", lambda gate, up: up * F.silu(gate)),
    "torch.mul": ("silu", lambda gate, up: torch.mul(F.silu(gate), up)),
    "method mul": ("silu", lambda gate, up: up.mul(F.silu(gate))),
    "aten.mul": ("silu", lambda gate, up: torch.ops.aten.mul(up, F.silu(gate))),
    "F.gelu": ("gelu", lambda gate, up: F.gelu(gate) * up),
    "by name": ("gelu", lambda gate, up: F.gelu(input=gate, approximate="none") * up),
    "nn.GELU": ("gelu_tanh", lambda gate, up: nn.GELU("tanh")(gate) * up),
    "aten.gelu": ("gelu_tanh", lambda gate, up: torch.ops.aten.gelu.default(gate, approximate="tanh") * up),
    "nn.ReLU": ("relu", lambda gate, up: nn.ReLU()(gate) * up),
    "torch.relu": ("relu", lambda gate, up: torch.relu(gate) * up),
    "method relu": ("relu", lambda gate, up: gate.relu() * up),
    "the result written": ("silu", lambda gate, up: (F.silu(gate) * up).mul_(2)),
}


@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_gated_pair_is_one_launch_with_what_follows_it(name: str, first: str) -> None:
    act, join = TAKEN[name]
    rows = is_the_modules(Gated(join, first))
    assert (rows.num_changed, rows.num_launches, rows.gated) == (2, 1, [act])


def doubled(x: Tensor) -> Tensor:
    x *= 2
    return x


LEFT = {
    "gate used twice": lambda gate, up: F.silu(gate) * up + gate,
    "act used twice": lambda gate, up: (act := F.silu(gate)) * up + act,
    "up used twice": lambda gate, up: F.silu(gate) * up + up,
    "up returned by a view": lambda gate, up: torch.cat([F.silu(gate) * up, up[..., :3]], -1),
    "the gate with itself": lambda gate, up: F.silu(gate) * gate + up,
    "an act with itself": lambda gate, up: (act := F.silu(gate)) * act + up,
    "up activated": lambda gate, up: F.silu(gate) * F.silu(up),
    "no act": lambda gate, up: gate * up,
    "act of another kind": lambda gate, up: torch.tanh(gate) * up,
    "act in place": lambda gate, up: F.silu(gate, inplace=True) * up,
    "act in place by position": lambda gate, up: F.relu(gate, True) * up,
    "act out=": lambda gate, up: F.gelu(gate, out=(kept := torch.zeros(1, 1, 32, dtype=gate.dtype))) * up + kept,
    "mul out=": lambda gate, up: torch.mul(F.silu(gate), up, out=(kept := torch.zeros(1, 1, 32, dtype=gate.dtype))) + kept,
    "act_": lambda gate, up: gate.relu_() * up,
    "mul_": lambda gate, up: F.silu(gate).mul_(up),
    "*=": lambda gate, up: doubled(F.silu(gate)) * up,
    "added": lambda gate, up: F.silu(gate) + up,
    "scaled": lambda gate, up: F.silu(gate) * 2 * up,
    "not its last use": lambda gate, up: F.silu(gate) * up.add_(1),
}


@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_gate_stays_two_products(name: str, first: str) -> None:
    rows = is_the_modules(Gated(LEFT[name], first))
    assert rows.num_changed == 2 and rows.gated == []


def test_an_up_that_is_spread_over_the_gate_is_no_second_half() -> None:
    rows = is_the_modules(Gated(lambda gate, up: F.silu(gate) * up, up=1))
    assert (rows.num_changed, rows.num_launches, rows.gated) == (2, 1, [])


class Apart(Gated):
    """Its halves are of two rows, or of one that is written in between."""

    def __init__(self, write: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__(lambda gate, up: F.silu(gate) * up)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        row = x * 1
        gate = self.gate(row)
        if self.write is not None:
            self.write(row)
            return self.join(gate, self.up(row))
        return self.join(gate, self.up(row + 1))


@pytest.mark.parametrize("write", [None, *WRITES])
def test_halves_of_different_rows_are_not_joined(write: str | None) -> None:
    rows = is_the_modules(Apart(WRITES[write] if write else None))
    assert (rows.num_changed, rows.num_launches, rows.gated) == (2, 2, [])


def test_a_write_behind_both_products_changes_nothing() -> None:
    class Behind(Gated):
        def forward(self, x: Tensor) -> Tensor:
            row = x * 1
            gate, up = self.gate(row), self.up(row)
            row.add_(1)
            return self.join(gate, up) + row.sum()

    rows = is_the_modules(Behind(lambda gate, up: F.silu(gate) * up))
    assert (rows.num_changed, rows.num_launches, rows.gated) == (2, 1, ["silu"])


def test_pairs_that_share_a_row_are_told_apart_and_others_of_it_stay() -> None:
    class Experts(nn.Module):
        """Two gated pairs, interleaved, and a router; the second pair's gate is the first one's shape."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.router = (nn.Linear(16, n, bias=False) for n in (32, 32, 32, 32, 2))
            self.down = nn.Linear(32, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a, b, router, c, d = self.a(x), self.b(x), self.router(x), self.c(x), self.d(x)
            return self.down(F.silu(a) * d * router[..., :1]) + self.down(b * F.gelu(c) * router[..., 1:])

    rows = is_the_modules(Experts())
    assert (rows.num_changed, rows.num_launches, sorted(rows.gated)) == (7, 5, ["gelu", "silu"])


def test_a_small_pair_is_left_to_the_compiler_and_counts_with_both_matrices() -> None:
    both = 2 * 16 * 32 * 4
    rows = is_the_modules(Gated(TAKEN["F.silu"][1]), least_bytes=both)
    assert (rows.num_changed, rows.gated) == (2, ["silu"])
    rows = is_the_modules(Gated(TAKEN["F.silu"][1]), least_bytes=both + 1)
    assert (rows.num_changed, rows.gated) == (0, [])


@pytest.mark.parametrize(("config", "act"), [("LlamaConfig", "silu"), ("GemmaConfig", "gelu_tanh")])
def test_gated_layers_of_transformers_are_taken(config: str, act: str) -> None:
    import transformers
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    module = (LlamaMLP if act == "silu" else GemmaMLP)(
        getattr(transformers, config)(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    )
    module, x = module.eval(), torch.randn(1, 1, 16)
    found, rows = compiled(module, x)
    assert (rows.num_changed, rows.num_launches, rows.gated) == (3, 2, [act])
    with torch.no_grad():
        wanted = module.double()(x.double())
    assert (found - wanted).norm() / wanted.norm() < 1e-6


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
