"""Backends whose artifacts hide their modules say what they launch, or what they recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import codecache

from gpuopt.backends import aoti, cudagraphs
from gpuopt.core.accepts import Accepts
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.core.tally import Tally
from gpuopt.programs import capture, generated, inductor
from gpuopt.programs.weigh import tally_for


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x * scale)))


def given() -> Inputs:
    specs = (TensorSpec.parse("x:float32[N,8]"), TensorSpec.parse("scale:float32[1]"))
    return Inputs(args=(torch.randn(2, 8),), kwargs={"scale": torch.ones(1)}, specs=specs)


def test_a_package_says_what_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise InterruptedError("the code is written: what a C++ compiler makes of it is in test_aoti.py")

    monkeypatch.setattr(codecache.AotCodeCompiler, "compile", stop)
    written: list[generated.Generated] = []
    with pytest.raises(Exception, match="the code is written"), inductor.reading(written):
        aoti._package(Net().eval(), given(), {}, Path("unused.pt2"), {}, inductor.GraphReader(tally_for("cpu")))
    runner = aoti.PackageRunner(calls={}, accepts=aoti.Accepts.of(given()), device="cpu", packages={}, written=written)
    found = [launch for launch in runner.launches() if launch.kind == "extern"]
    assert [launch.home for launch in found] == ["first", "last"]
    assert all(launch.lines[-1].startswith("test_launches.py:") for launch in found)


def test_a_loaded_package_says_nothing() -> None:
    runner = aoti.PackageRunner(calls={}, accepts=aoti.Accepts.of(given()), device="cpu", packages={})
    assert runner.launches() == ()


class NeverReplayed:
    """In place of a GPU's recorder: what is recorded here is never run."""

    def run(self, call: Callable[[], Any]) -> None:
        call()

    def record(self, call: Callable[[], Any], watch: Any) -> tuple[Any, Any]:
        return None, call()


def recorded(module: Any) -> cudagraphs.GraphRunner:
    inputs = given()
    graphs = capture.Graphs(module, Accepts.of(inputs, any_layout=True), recorder=NeverReplayed())  # type: ignore[arg-type]
    graphs.record(inputs)
    return cudagraphs.GraphRunner(module=module, inputs=inputs, graphs=graphs, tally=Tally(), options={})


def test_what_a_graph_was_recorded_from_can_be_run_again_on_its_own_inputs() -> None:
    net = Net().eval()
    runner = recorded(net)
    found = runner.ungraphed()
    assert found is not None and found[0] is net
    out = found[1]()
    assert not out.requires_grad
    torch.testing.assert_close(out, net(runner.static_inputs[0], scale=runner.static_inputs[1]))


def test_modules_nothing_can_mark_are_not_run_again() -> None:
    net, inputs = Net().eval(), given()
    assert recorded(torch.jit.trace(net, (inputs.args[0], inputs.kwargs["scale"]))).ungraphed() is None
    assert recorded(torch.fx.symbolic_trace(net)).ungraphed() is None
    closed = recorded(net)
    closed._module = None
    assert closed.ungraphed() is None
