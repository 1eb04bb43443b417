"""What a CUDA device is asked while a model is calibrated, with a stand-in for torch.cuda whose clock a test can read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import streams
from torch import nn

from gpuopt.core.errors import OutOfMemory, UsageError
from gpuopt.core.streaming import Calibration, StreamSpec
from gpuopt.pipeline.streamed import measured
from gpuopt.pipeline.streamed.calls import same
from gpuopt.pipeline.streamed.live import streamed
from gpuopt.streaming import anatomy
from gpuopt.streaming.engines.simulated import SimulatedEngine


def stack() -> nn.Module:
    space: dict[str, Any] = {}
    exec(compile(streams.FACTORY, "stack.py", "exec"), space)
    module: nn.Module = space["build"]()
    return module


def test_every_unit_of_a_provisional_plan_has_a_slot_that_holds_it() -> None:
    found = anatomy.dissect(stack())
    calibration = Calibration(device="d", link_bytes_per_s=1, pageable_bytes_per_s=1)
    plan = measured.provisional(found, StreamSpec(budget_share=0.5), calibration, resident=False)
    assert set(plan.binding) == {unit.name for unit in found.units} and not plan.resident
    assert all(unit.num_bytes <= plan.slots[unit.ring][plan.binding[unit.name]] for unit in found.units)
    whole = measured.provisional(found, StreamSpec(budget_share=0.5), calibration, resident=True)
    assert set(whole.resident) == {unit.name for unit in found.units} and not whole.binding and not whole.slots


def test_outputs_are_equal_bit_for_bit_or_not_at_all() -> None:
    one = {"logits": torch.tensor([0.0, float("nan")]), "n": torch.tensor(3)}
    assert same(one, {"logits": torch.tensor([0.0, float("nan")]), "n": torch.tensor(3)})
    assert not same(one, {"logits": torch.tensor([-0.0, float("nan")]), "n": torch.tensor(3)})
    assert not same(torch.zeros(2, 3), torch.zeros(3, 2))
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


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
