"""Compiled code recorded as one CUDA graph, on a real GPU: right, fresh, bounded in memory, cheap to call, and told apart from what cannot be recorded."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import cudagraphs, inductor
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import capture

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"


class Net(torch.nn.Module):
    """Convolution, batch norm and some small products: launch-bound at any batch it is tested with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 64, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(64)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(24))

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        for layer in self.layers:
            h = h + torch.relu(layer(h))
        return {"y": h, "sum": h.sum(-1)}


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return Net().eval().to(DEVICE, torch.float16)


def given(batch: int = 4) -> Inputs:
    torch.manual_seed(batch)
    x = torch.randn(batch, 8, 16, 16, device=DEVICE, dtype=torch.float16)
    return Inputs(args=(x,), specs=(TensorSpec.parse("x:float16[N,8,16,16]"),), dims={"N": batch})


def build(module: torch.nn.Module, inputs: Inputs, preset: str = "graphed", **options: Any) -> inductor.InductorRunner:
    return inductor.build(Model(form="module", name="net", module=module), inputs, {"precision": "fp16", "preset": preset, **options})


def close(runner: Any, module: torch.nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(inputs.args[0].double())["y"]
    found = runner(*inputs.args)["y"].double()
    assert (found - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("preset", [name for name in inductor.PRESETS if name.endswith("graphed")])
def test_it_is_right_reads_back_its_dtype_and_says_what_it_launches(preset: str) -> None:
    module = net()
    runner = build(module, given(), preset)
    assert runner.device == DEVICE and runner.notes == []
    for batch in (given(), Inputs(args=(torch.randn_like(given().args[0]),))):
        close(runner, module, batch)
    audit = runner.audit()
    assert audit is not None and audit.honoured, audit
    assert runner.launches()
    runner.close()
    runner.close()


def test_a_range_is_recorded_a_shape_and_older_ones_make_room() -> None:
    module = net()
    runner = build(module, given(), dynamic={"N": (1, 64)})
    for batch in (1, 2, 3, 5, 8, 13, 21, 34, 55, 64, 1, 64):
        close(runner, module, given(batch))
    assert runner._recorded is not None and runner._recorded.num_kept == capture.KEPT
    with pytest.raises(UsageError, match="built for 1 to 64"):
        runner(*given(65).args)


def test_results_and_inputs_stay_what_they_are_also_between_streams_and_threads() -> None:
    module = net()
    runner = build(module, given())
    inputs = [given().map(lambda t, n=n: t * n) for n in range(4)]
    kept = [(each, runner(*each.args)["y"]) for each in inputs]
    alone = [out.clone() for _, out in kept]
    wrong: list[int] = []

    def serve(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong.extend(number for _ in range(200) if not torch.equal(runner(*inputs[number].args)["y"], alone[number]))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for number, (_, out) in enumerate(kept):
        assert torch.equal(out, alone[number])


def test_random_numbers_are_fresh_in_every_replay() -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": torch.nn.functional.dropout(x, 0.5, training=True)}

    x = torch.ones(4096, device=DEVICE, dtype=torch.float16)
    inputs = Inputs(args=(x,))
    for runner in (build(Noise(), inputs), cudagraphs.build(Model(form="module", name="n", module=Noise()), inputs, {})):
        first, second = runner(x)["y"], runner(x)["y"]
        assert not torch.equal(first, second)


class Waits(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"y": x * 2 if x.sum().item() > 0 else x}


@pytest.mark.parametrize("preset", ["graphed", None])
def test_what_waits_for_the_device_is_told_with_its_line_and_leaves_the_device_as_it_was(preset: str | None) -> None:
    inputs = Inputs(args=(torch.ones(64, device=DEVICE, dtype=torch.float16),))
    before = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(Unsupported, match=r"cannot be recorded as a CUDA graph, at test_inductor_gpu.py:\d+") as raised:
            if preset:
                build(Waits(), inputs, preset)
            else:
                cudagraphs.build(Model(form="module", name="w", module=Waits()), inputs, {})
        assert "captur" in raised.value.message
        assert torch.cuda.current_stream() == before
    assert torch.rand(4, device=DEVICE).sum().item() >= 0
    close(build(net(), given()), net(), given())


@pytest.mark.parametrize("preset", ["graphed", None])
def test_what_writes_into_its_input_is_refused(preset: str | None) -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": x.add_(1) @ x}

    x = torch.zeros(64, 64, device=DEVICE, dtype=torch.float16)
    inputs = Inputs(args=(x,), specs=(TensorSpec.parse("x:float16[64,64]"),))
    with pytest.raises(Unsupported, match="writes into its input 'x'"):
        if preset:
            build(Writes(), inputs, preset)
        else:
            cudagraphs.build(Model(form="module", name="w", module=Writes()), inputs, {})
    assert not x.any()


def test_the_module_may_be_moved_away_under_the_graph() -> None:
    module = net()
    wanted = copy.deepcopy(module)
    runner = build(module, given())
    module.to("cpu")
    torch.cuda.empty_cache()
    filler = [torch.full((4096,), torch.nan, device=DEVICE, dtype=torch.float16) for _ in range(256)]
    close(runner, wanted, given())
    del filler


def test_a_bundle_is_compiled_and_recorded_again(tmp_path: Path) -> None:
    module = net()
    files = build(module, given()).save(tmp_path)
    again = inductor.load(tmp_path, files, {"signed_by_us": True, "precision": "fp16", "preset": "graphed"}, DEVICE)
    close(again, module, given())
    with pytest.raises(UsageError):
        again(*given(3).args)


def test_closing_gives_memory_back() -> None:
    module, inputs = net(), given(512)
    runner = build(module, inputs)
    torch.cuda.synchronize()
    held = torch.cuda.memory_reserved()
    runner.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


def median_us(call: Callable[[], Any], count: int = 300) -> float:
    found = []
    for _ in range(count):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) * 1e6)
    return sorted(found[count // 3 :])[count // 3]


def test_a_call_costs_less_than_inductors_own_graphs_do() -> None:
    module, inputs = net(), given(1)
    graphed, trees = (build(module, inputs, preset) for preset in ("graphed", "reduce-overhead"))
    taken = {name: median_us(lambda runner=runner: runner(*inputs.args)) for name, runner in (("graphed", graphed), ("trees", trees))}
    assert taken["graphed"] < taken["trees"], taken
