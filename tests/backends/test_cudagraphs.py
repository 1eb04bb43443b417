"""What surrounds a recorded graph (checks, copies, aliasing), on a CPU with a stand-in for the graph; the recording itself is in test_gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import cudagraphs
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import TensorSpec
from gpuopt.core.tally import Tally


class Replay:
    """Reads and writes fixed buffers, as a CUDA graph does."""

    def __init__(self, module: Any, static: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.module, self.static, self.out, self.resets = module, static, out, 0

    def replay(self) -> None:
        with torch.no_grad():
            self.out.copy_(self.module(*self.static))

    def reset(self) -> None:
        self.resets += 1


def runner(**options: Any) -> tuple[cudagraphs.GraphRunner, torch.nn.Module, Inputs]:
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 4).eval()
    given = Inputs(args=(torch.randn(2, 8),), specs=(TensorSpec.parse("x:float32[N,8]"),))
    static = tuple(cudagraphs._buffer(t) for t in given.args)
    out = torch.zeros(2, 4)
    built = cudagraphs.GraphRunner(
        module=module, inputs=given, static=static, graph=Replay(module, static, out), outputs={"y": out}, tally=Tally(), options=options
    )
    return built, module, given


def test_it_is_a_runner_that_gives_the_modules_answer() -> None:
    built, module, given = runner()
    assert isinstance(built, Runner)
    other = torch.randn(2, 8)
    for x in (*given.args, other):
        assert torch.allclose(built(x)["y"], module(x), atol=1e-6)


def test_the_callers_tensors_stay_as_they_are() -> None:
    built, _, given = runner()
    before = given.args[0].clone()
    built(torch.full((2, 8), 7.0))
    assert torch.equal(given.args[0], before)


def test_a_result_survives_the_next_call() -> None:
    built, _, given = runner()
    first = built(*given.args)["y"]
    kept = first.clone()
    built(torch.full((2, 8), 7.0))
    assert torch.equal(first, kept)


def test_static_outputs_are_overwritten_and_say_so() -> None:
    built, _, given = runner(static_outputs=True)
    first = built(*given.args)["y"]
    kept = first.clone()
    built(torch.full((2, 8), 7.0))
    assert not torch.equal(first, kept)
    assert any("overwritten" in note for note in built.notes)


def test_the_graphs_own_buffers_need_no_copy() -> None:
    built, module, _ = runner()
    (buffer,) = built.static_inputs
    buffer.fill_(2.0)
    assert torch.allclose(built(buffer)["y"], module(torch.full((2, 8), 2.0)), atol=1e-6)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8), torch.zeros(1, 8), torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8, device="meta")]
)
def test_what_copy_would_broadcast_or_cast_is_refused(x: torch.Tensor) -> None:
    built, _, _ = runner()
    with pytest.raises(UsageError, match="'x'"):
        built(x)


def test_another_layout_is_taken_because_inputs_are_copied() -> None:
    built, module, _ = runner()
    x = torch.randn(8, 2).t()
    assert torch.allclose(built(x)["y"], module(x), atol=1e-6)


def test_dynamic_dimensions_are_unsupported() -> None:
    _, module, given = runner()
    with pytest.raises(Unsupported, match="one shape, and N"):
        cudagraphs.build(Model(form="module", name="m", module=module), given, {"dynamic": {"N": (1, 8)}})


def test_what_it_saves_is_the_source_it_was_recorded_from(tmp_path: Path) -> None:
    built, _, _ = runner()
    assert set(built.save(tmp_path)) == {"exported", "accepts"}
