"""What torch.compile made, recorded once: compiled on a CPU, with a stand-in for the CUDA graph; the graph itself is in test_inductor_gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from gpuopt.backends import inductor
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import capture

pytestmark = pytest.mark.skipif(inductor.available("cpu") is not None, reason=str(inductor.available("cpu")))


class Replay:
    """Reads and writes fixed buffers, as a CUDA graph does."""

    def __init__(self, call: Callable[[], Any], outputs: dict[str, torch.Tensor]) -> None:
        self.call, self.outputs = call, outputs

    def replay(self) -> None:
        for name, value in self.call().items():
            self.outputs[name].copy_(value)

    def reset(self) -> None:
        pass


class Recorder:
    """In place of `capture.Recorder`. Nothing may compile while it records."""

    def __init__(self, device: str) -> None:
        self.compiled: list[int] = []

    def run(self, call: Callable[[], Any]) -> None:
        call()

    def record(self, call: Callable[[], Any], watch: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, Any]:
        before = counters["stats"]["unique_graphs"]
        outputs = call()
        self.compiled.append(counters["stats"]["unique_graphs"] - before)
        return Replay(call, outputs), outputs

    def queue(self) -> Any:
        return None

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu() -> Iterator[None]:
    """The presets as they are, but for the refusal of a CPU."""
    original = inductor._settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "Recorder", Recorder)
        patch.setattr(inductor, "_settings", lambda options, device: original(options, "cuda:0"))
        yield


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.second = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> Any:
        return {"y": self.second(torch.relu(self.first(x * scale)))}


def given(batch: int = 4) -> Inputs:
    specs = (TensorSpec.parse("x:float32[N,16]"), TensorSpec.parse("scale:float32[16]"))
    return Inputs(args=(torch.randn(batch, 16),), kwargs={"scale": torch.randn(16)}, specs=specs, dims={"N": batch})


def build(module: Any, inputs: Inputs, **options: Any) -> inductor.InductorRunner:
    torch.manual_seed(0)
    return inductor.build(
        Model(form="module", name="m", module=module.eval()), inputs, {"preset": "graphed", "precision": "fp32", **options}
    )


def same(runner: Any, module: Any, inputs: Inputs) -> None:
    with torch.no_grad():
        wanted = module(*inputs.args, **inputs.kwargs)["y"]
    torch.testing.assert_close(runner(*inputs.args, **inputs.kwargs)["y"], wanted, atol=1e-5, rtol=1e-4)


def compiled(runner: inductor.InductorRunner) -> list[int]:
    """Graphs compiled while a shape was recorded, for each shape."""
    assert runner._recorded is not None
    recorder = runner._recorded._recorder
    assert isinstance(recorder, Recorder)
    return recorder.compiled


@pytest.fixture(scope="module")
def module() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture(scope="module")
def runner(module: Mlp, on_a_cpu: None) -> inductor.InductorRunner:
    return build(module, given())


def test_compiled_code_is_recorded_once_and_calls_only_replay_it(
    runner: inductor.InductorRunner, module: Mlp, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(runner, Runner) and runner.notes == []
    assert compiled(runner) == [0], "compiled while it was recorded"
    reached: list[int] = []
    monkeypatch.setattr(runner, "_call", lambda *args, **kwargs: reached.append(1))
    for _ in range(2):
        same(runner, module, given())
    assert not reached, "a call went past the graph, through Dynamo's guards"


def test_audit_launches_and_findings_are_those_of_the_compiled_code(runner: inductor.InductorRunner, module: Mlp) -> None:
    plain = build(module, given(), preset="default")
    assert runner.audit() == plain.audit() and runner.audit() is not None
    told, wanted = runner.launches(), plain.launches()
    assert [launch.home for launch in told] == [launch.home for launch in wanted] and len(told) >= 2
    assert runner.compiled() == plain.compiled() and runner.compiled()["num_graphs"] == 1


def test_a_result_survives_the_next_call(runner: inductor.InductorRunner) -> None:
    first = runner(*given().args, scale=torch.ones(16))["y"]
    kept = first.clone()
    runner(torch.zeros(4, 16), scale=torch.ones(16))
    assert torch.equal(first, kept)


def test_static_outputs_are_overwritten_say_so_and_can_be_closed_twice(module: Mlp) -> None:
    static = build(module, given(), static_outputs=True)
    first = static(*given().args, scale=torch.ones(16))["y"]
    kept = first.clone()
    static(torch.zeros(4, 16), scale=torch.ones(16))
    assert not torch.equal(first, kept) and static.notes == [capture.STATIC_OUTPUTS]
    static.close()
    static.close()
    assert static.static_inputs == ()


def test_another_shape_is_refused_and_another_layout_is_not(runner: inductor.InductorRunner, module: Mlp) -> None:
    with pytest.raises(UsageError, match="dimension 0 was built for 4 alone"):
        runner(*given(5).args, scale=torch.ones(16))
    turned = torch.randn(16, 4).t()
    same(runner, module, Inputs(args=(turned,), kwargs={"scale": torch.ones(16)}))
    (own, scale) = runner.static_inputs
    own.copy_(turned)
    scale.fill_(1.0)
    same(runner, module, Inputs(args=(own,), kwargs={"scale": scale}))


def test_a_range_is_compiled_once_and_recorded_a_shape(module: Mlp) -> None:
    runner = build(module, given(4), dynamic={"N": (2, 64)})
    before = counters["stats"]["unique_graphs"]
    for batch in (2, 5, 64, 5, 4):
        same(runner, module, given(batch))
    assert counters["stats"]["unique_graphs"] == before
    assert compiled(runner) == [0] * 4, "sizes 4, 2, 5 and 64"
    with pytest.raises(UsageError, match="built for 2 to 64"):
        runner(*given(65).args, scale=torch.ones(16))


def test_what_writes_into_its_input_is_refused() -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            x.add_(1)
            return {"y": x @ x.T}

    x = torch.zeros(4, 4)
    with pytest.raises(Unsupported, match="writes into its input 'x'"):
        build(Writes(), Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[4,4]"),)))
    assert not x.any()


def test_what_is_compiled_in_every_call_has_no_code_to_record() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            return {"y": x * self.calls}

    with pytest.raises(Unsupported, match="every call is compiled anew") as raised:
        build(Counts(), Inputs(args=(torch.ones(4),)))
    assert "calls" in raised.value.message


def test_what_is_no_tensor_is_refused_before_anything_compiles() -> None:
    before = counters["stats"]["unique_graphs"]
    with pytest.raises(UsageError, match="not a tensor"):
        build(Mlp(), Inputs(args=(torch.ones(4, 16), [torch.ones(4)])))
    assert counters["stats"]["unique_graphs"] == before


def test_code_between_graph_breaks_is_in_the_one_graph() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            x = x * 2
            torch._dynamo.graph_break()
            return {"y": x + 1}

    runner = build(Broken(), Inputs(args=(torch.zeros(4),), specs=(TensorSpec.parse("x:float32[4]"),)))
    assert torch.equal(runner(torch.ones(4))["y"], torch.full((4,), 3.0))
    assert any("graph break" in note for note in runner.notes) and compiled(runner) == [0]


def test_a_bundle_is_compiled_and_recorded_again(module: Mlp, tmp_path: Path) -> None:
    runner = build(module, given(), dynamic={"N": (2, 8)})
    files: Mapping[str, str] = runner.save(tmp_path)
    again = inductor.load(tmp_path, files, {"signed_by_us": True, "precision": "fp32", "preset": "graphed"}, "cpu")
    for batch in (8, 3):
        same(again, module, given(batch))
    assert compiled(again) == [0, 0]
    with pytest.raises(UsageError, match="built for 2 to 8"):
        again(*given(9).args, scale=torch.ones(16))
