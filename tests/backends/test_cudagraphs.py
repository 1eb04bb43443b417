"""What surrounds a recorded graph (checks, copies, aliasing), on a CPU with a stand-in for the graph; the recording itself is in test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import cudagraphs
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import capture


class Replay:
    """Reads and writes fixed buffers, as a CUDA graph does."""

    def __init__(self, call: Callable[[], Any], outputs: dict[str, torch.Tensor]) -> None:
        self.call, self.outputs, self.resets = call, outputs, 0

    def replay(self) -> None:
        for name, value in self.call().items():
            self.outputs[name].copy_(value)

    def reset(self) -> None:
        self.resets += 1


class Recorder:
    """In place of `capture.Recorder`, whose own tests are in tests/programs/test_capture.py."""

    def __init__(self, device: str) -> None:
        self.device = device

    def run(self, call: Callable[[], Any]) -> None:
        call()

    def record(self, call: Callable[[], Any], watch: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, Any]:
        with watch():
            outputs = call()
        return Replay(call, outputs), outputs

    def queue(self) -> Any:
        return None

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "Recorder", Recorder)


class Net(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return {"y": super().forward(x)}


def runner(**options: Any) -> tuple[cudagraphs.GraphRunner, Callable[[torch.Tensor], torch.Tensor], Inputs]:
    torch.manual_seed(0)
    module = Net(8, 4).eval()
    given = Inputs(args=(torch.randn(2, 8),), specs=(TensorSpec.parse("x:float32[N,8]"),))
    built = cudagraphs.build(Model(form="module", name="m", module=module), given, options)

    def reference(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = module(x)["y"]
        return found

    return built, reference, given


def test_it_is_a_runner_that_gives_the_modules_answer() -> None:
    built, reference, given = runner()
    assert isinstance(built, Runner)
    other = torch.randn(2, 8)
    for x in (*given.args, other):
        assert torch.allclose(built(x)["y"], reference(x), atol=1e-6)


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
    built, reference, _ = runner()
    (buffer,) = built.static_inputs
    buffer.fill_(2.0)
    assert torch.allclose(built(buffer)["y"], reference(torch.full((2, 8), 2.0)), atol=1e-6)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8), torch.zeros(1, 8), torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8, device="meta")]
)
def test_what_copy_would_broadcast_or_cast_is_refused(x: torch.Tensor) -> None:
    built, _, _ = runner()
    with pytest.raises(UsageError, match="'x'"):
        built(x)


def test_another_layout_is_taken_because_inputs_are_copied() -> None:
    built, reference, _ = runner()
    x = torch.randn(8, 2).t()
    assert torch.allclose(built(x)["y"], reference(x), atol=1e-6)


def test_dynamic_dimensions_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="one shape, and N") as raised:
        runner(dynamic={"N": (1, 8)})
    assert "inductor:graphed" in raised.value.fix


def test_the_audit_is_of_the_recorded_call() -> None:
    built, _, _ = runner(precision="fp32")
    audit = built.audit()
    assert (
        audit is not None and audit.honoured and audit.shares == {"float32": 1.0} and audit.method == "aten dispatch of the recorded call"
    )


def test_an_input_the_forward_writes_into_is_refused() -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": x.relu_() + 1}

    given = Inputs(args=(torch.ones(2, 8),), specs=(TensorSpec.parse("x:float32[N,8]"),))
    with pytest.raises(Unsupported, match="writes into its input 'x'"):
        cudagraphs.build(Model(form="module", name="w", module=Writes()), given, {})


def test_a_model_without_inputs_has_nothing_to_record_on() -> None:
    with pytest.raises(Unsupported, match="without inputs"):
        cudagraphs.build(Model(form="module", name="m", module=torch.nn.Identity()), Inputs(), {})


def test_what_was_saved_is_recorded_again_under_the_names_of_its_inputs(tmp_path: Path) -> None:
    built, reference, given = runner()
    again = cudagraphs.load(tmp_path, built.save(tmp_path), {"signed_by_us": True}, "cpu")
    assert torch.allclose(again(*given.args)["y"], reference(*given.args), atol=1e-6)
    assert "recorded again from the exported program of the bundle" in again.notes
    with pytest.raises(UsageError, match="'x'"):
        again(torch.zeros(3, 8))


def test_closing_is_harmless_twice() -> None:
    built, _, _ = runner()
    built.close()
    built.close()
    assert built.static_inputs == ()


def test_what_it_saves_is_the_source_it_was_recorded_from(tmp_path: Path) -> None:
    built, _, _ = runner()
    assert set(built.save(tmp_path)) == {"exported", "accepts"}
