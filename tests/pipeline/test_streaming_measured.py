"""What a CUDA device is asked while a model is calibrated, with a stand-in for torch.cuda whose clock a test can read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import streams
from torch import nn

from gpuopt.core.errors import OutOfMemory, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.streaming import Calibration, StreamSpec
from gpuopt.pipeline import stream_calls, stream_measured, stream_rivals
from gpuopt.pipeline.stream_live import streamed
from gpuopt.streaming import anatomy, planner
from gpuopt.streaming.engines.simulated import SimulatedEngine


def stack() -> nn.Module:
    space: dict[str, Any] = {}
    exec(compile(streams.FACTORY, "stack.py", "exec"), space)
    module: nn.Module = space["build"]()
    return module


class Clock:
    """Events tell the time of a simulated engine."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine

    def Event(self, enable_timing: bool = False) -> Any:
        event = SimpleNamespace(ms=0.0)
        event.record = lambda stream: setattr(event, "ms", self.engine.elapsed_ms)
        event.elapsed_time = lambda other: other.ms - event.ms
        return event

    def current_stream(self, device: Any) -> None:
        return None

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return 60_000, 100_000

    def memory_reserved(self, device: Any) -> int:
        return 15_000

    def memory_allocated(self, device: Any) -> int:
        return 1_000

    def max_memory_allocated(self, device: Any) -> int:
        return 9_000

    def reset_peak_memory_stats(self, device: Any) -> None:
        return None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], tuple[Calibration, nn.Module]]:
    def run(compute_ms: dict[str, float]) -> tuple[Calibration, nn.Module]:
        module = stack()
        engine = SimulatedEngine(1e9, compute_ms, pageable_bytes_per_s=2e8)
        monkeypatch.setattr(stream_measured, "link_rates", lambda engine, num_bytes: (1e9, 2e8, 3e9))
        ids = torch.arange(4)[None]
        work = stream_calls.Work(module=module, inputs=Inputs(args=(ids,), dims={"N": 1, "S": 4}), device="cpu")
        found = stream_measured.measured(
            module, anatomy.dissect(module), StreamSpec(budget_share=0.5), engine, work.call, workload=work.words, skip_prompt=False,
            cache_bytes=2_000, others_bytes=5_000, progress=lambda fraction, note: None, cuda=Clock(engine),
        )  # fmt: skip
        return found, module

    return run


def test_units_are_timed_without_the_copies_they_wait_for(measured: Any) -> None:
    """The link is slow: a forward takes many times its compute, and the calibration says the compute."""
    wanted = {f"layers.{n}": 0.5 + 0.25 * n for n in range(8)} | {"": 0.125}
    found, _ = measured(wanted)
    assert found.compute_ms == pytest.approx(wanted)
    assert (found.link_bytes_per_s, found.pageable_bytes_per_s, found.pin_bytes_per_s) == (1e9, 2e8, 3e9)
    assert found.context_bytes == 20_000 and found.cache_bytes == 2_000 and found.activation_bytes == 6_000


def test_a_module_is_its_own_again_after_it_was_calibrated(measured: Any) -> None:
    _, module = measured({})
    fresh = stack()
    ids = torch.arange(4)[None]
    with torch.inference_mode():
        assert torch.equal(module(ids), fresh(ids))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))


def test_every_unit_of_a_provisional_plan_has_a_slot_that_holds_it() -> None:
    found = anatomy.dissect(stack())
    plan = stream_measured.provisional(
        found, StreamSpec(budget_share=0.5), Calibration(device="d", link_bytes_per_s=1, pageable_bytes_per_s=1)
    )
    assert set(plan.binding) == {unit.name for unit in found.units} and not plan.resident
    assert all(unit.num_bytes <= plan.slots[unit.ring][plan.binding[unit.name]] for unit in found.units)


def test_outputs_are_equal_bit_for_bit_or_not_at_all() -> None:
    one = {"logits": torch.tensor([0.0, float("nan")]), "n": torch.tensor(3)}
    assert stream_calls.same(one, {"logits": torch.tensor([0.0, float("nan")]), "n": torch.tensor(3)})
    assert not stream_calls.same(one, {"logits": torch.tensor([-0.0, float("nan")]), "n": torch.tensor(3)})
    assert not stream_calls.same(torch.zeros(2, 3), torch.zeros(3, 2))
    assert not stream_calls.same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_a_live_module_is_streamed_and_given_back() -> None:
    module = stack()
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        wanted = module(ids)
    with streamed(module, {"ids": ids}, StreamSpec(budget_share=0.5), device=streams.DEVICE, generate=None) as live:
        assert live.plan.binding and torch.equal(live(ids), wanted) and live.demand_fetches == 0
        assert live.head is module.head and "stream" in repr(live)
        assert live.plan.calibration.workload == "prefill N=1 S=6"
    live.close()
    with torch.inference_mode():
        assert torch.equal(module(ids), wanted)


def test_a_live_module_that_cannot_be_streamed_is_left_as_it_was() -> None:
    module, ids = stack(), torch.arange(6)[None]
    with torch.inference_mode():
        wanted = module(ids)
    module.train()
    with pytest.raises(UsageError, match="training"):
        streamed(module, None, StreamSpec(budget_share=0.5), device="simulated", generate=None)
    module.eval()
    with torch.inference_mode():
        assert torch.equal(module(ids), wanted)
    with pytest.raises(UsageError, match="Module"):
        streamed("model", None, StreamSpec(budget_share=0.5), device="simulated", generate=None)  # type: ignore[arg-type]


def test_accelerate_is_given_the_bytes_of_the_plan_and_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = stack(), {}

    def infer(given: Any, max_memory: Any, no_split_module_classes: Any) -> dict[str, Any]:
        asked.update(memory=max_memory, whole=no_split_module_classes)
        return {"": "cpu"}

    package = SimpleNamespace(infer_auto_device_map=infer, dispatch_model=lambda given, device_map, main_device: given)
    hooks = SimpleNamespace(remove_hook_from_module=lambda given, recurse: asked.update(removed=recurse))
    monkeypatch.setattr(stream_rivals, "require_accelerate", lambda: None)
    monkeypatch.setattr(stream_rivals.importlib, "import_module", lambda name: package if name == "accelerate" else hooks)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = anatomy.dissect(module)
    plan = planner.plan(
        found,
        StreamSpec(budget_share=0.5),
        Calibration(device="d", link_bytes_per_s=1e9, pageable_bytes_per_s=1e9),
        available_host_bytes=None,
    )
    held = plan.ledger.fixed + plan.ledger.residents + plan.ledger.slots
    with stream_rivals.accelerated(module, "cuda:0", held, found):
        assert asked["memory"][0] == held and asked["whole"] == ["Block"]
    assert asked["removed"] is True


def test_out_of_memory_is_tried_again_with_less_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, calls = SimulatedEngine.slot, []

    def slot(self: SimulatedEngine, num_bytes: int) -> torch.Tensor:
        calls.append(num_bytes)
        if len(calls) == 2:
            raise OutOfMemory("the device has no such bytes")
        return kept(self, num_bytes)

    monkeypatch.setattr(SimulatedEngine, "slot", slot)
    module, ids = stack(), torch.arange(4)[None]
    with torch.inference_mode():
        wanted = module(ids)
    with streamed(module, {"ids": ids}, StreamSpec(budget_share=0.8, elastic=True), device="simulated", generate=None) as live:
        assert torch.equal(live(ids), wanted) and "out of memory at first" in live.notes[-1]
        assert live.plan.spec.budget_share == pytest.approx(0.68)
    calls.clear()
    with pytest.raises(OutOfMemory):
        streamed(module, {"ids": ids}, StreamSpec(budget_share=0.8), device="simulated", generate=None)
    with torch.inference_mode():
        assert torch.equal(module(ids), wanted)
