"""What is measured of a model, with weights in place, predicts what the streamer takes: on a device on paper whose host needs its time as well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import launches
from launches import Gpu

from gpuopt.core.errors import OutOfMemory
from gpuopt.core.streaming import Calibration, StreamSpec
from gpuopt.pipeline.streamed import measured
from gpuopt.streaming import anatomy, bound, planner
from gpuopt.streaming.shelf import Shelf

DEPTH = 16
UNIT_BYTES = 256 * 256 * 4 + 1024
WORKLOADS = {
    "decode, bound by launching": (0.5, 0.13, (0.1, 0.4), 6.0),
    "decode, by the device": (0.1, 0.4, (0.05, 0.4), 1.0),
    "prefill": (0.3, 3.5, (0.1, 1.5), None),
    "prefill, small": (0.5, 0.3, (0.1, 0.2), None),
}
"""Of the host and of the device for a unit, the same outside units; and what the host does between two forwards, of which it waits for each; None: it does not wait."""
COPY_MS = 2.0
"""Of a unit."""


def streamed(name: str, free_bytes: int = 1 << 40) -> tuple[Gpu, launches.Stack, Callable[[], Any], list[float]]:
    """(device, model, a call of it, when each of its forwards began): a forward, or nine that the host waits for."""
    host, device, outside, between = WORKLOADS[name]
    gpu = Gpu(UNIT_BYTES / COPY_MS * 1e3, free_bytes)
    torch.manual_seed(0)
    model = launches.Stack(DEPTH, host, device, outside).eval()
    x = torch.randn(2, 256)
    begun: list[float] = []

    @torch.inference_mode()
    def call() -> Any:
        for _ in range(1 if between is None else 9):
            begun.append(max(gpu.elapsed_ms, gpu.host_ms))
            y = model(x)
            if between is not None:
                gpu.host_ms = max(gpu.host_ms, gpu.elapsed_ms) + between
        return y

    return gpu, model, call, begun


@pytest.fixture
def calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Calibration, Gpu, launches.Stack, Callable[[], Any], list[float], Shelf]]:
    def run(name: str, **options: Any) -> Any:
        gpu, model, call, begun = streamed(name, **options)
        rate = UNIT_BYTES / COPY_MS * 1e3
        monkeypatch.setattr(measured, "link_rates", lambda engine, num_bytes: (rate, rate / 6, None))
        shelf = Shelf()
        model.on(gpu)
        found = measured.measured(
            model, anatomy.dissect(model, small_bytes=2048), StreamSpec(budget_share=0.5), gpu, call, shelf=shelf, workload=name,
            skip_prompt=WORKLOADS[name][3] is not None, cache_bytes=0, others_bytes=0, baseline_bytes=400, progress=lambda *_: None, cuda=gpu, now=gpu.now,
        )  # fmt: skip
        return found, gpu, model, call, begun, shelf

    return run


@pytest.mark.parametrize("free_bytes", [1 << 40, 4 * UNIT_BYTES], ids=["everything fits", "it does not"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_units_and_the_rest_take_what_they_take_with_weights_in_place(calibrated: Any, name: str, free_bytes: int) -> None:
    """Whatever the host does meanwhile: waits for launches, copies and pageable memory are nobody's compute."""
    host, device, outside, between = WORKLOADS[name]
    found, gpu, *_ = calibrated(name, free_bytes=free_bytes)
    assert [found.compute_ms[f"layers.{n}"] for n in range(DEPTH)] == pytest.approx([device] * DEPTH, rel=0.03)
    assert [found.host_ms[f"layers.{n}"] for n in range(DEPTH)] == pytest.approx([host] * DEPTH, rel=0.03)
    assert found.compute_ms[""] == pytest.approx(outside[1], abs=0.15)
    assert found.host_waits == (between is not None)
    assert gpu.copies == (0 if free_bytes > 1 << 30 else 2), "the first round of slots, and nothing while it is timed"
    whole = max(DEPTH * host + outside[0], DEPTH * device + outside[1])
    if between is not None:
        whole = max(DEPTH * host, DEPTH * device) + outside[1] + between
        assert found.resident_ms == pytest.approx(whole, rel=0.05)
    else:
        assert found.resident_ms == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_plan_predicts_what_the_streamer_takes_within_three_percent(calibrated: Any, name: str, share: float) -> None:
    found, gpu, model, call, begun, shelf = calibrated(name)
    spec = StreamSpec(budget_share=share)
    plan = planner.plan(anatomy.dissect(model, small_bytes=2048), spec, found, available_host_bytes=None)
    with bound.bind(model, plan, gpu, shelf=shelf):
        for _ in range(3):
            call()
        begun.clear()
        for _ in range(12 if WORKLOADS[name][3] is None else 3):
            call()
        begun.append(max(gpu.elapsed_ms, gpu.host_ms))
        apart = [b - a for a, b in pairwise(begun)]
        taken = (begun[-1] - begun[0]) / len(apart) if WORKLOADS[name][3] is None else median(apart)
    shelf.close()
    assert taken == pytest.approx(plan.predicted_ms, rel=0.03)
    assert plan.bound_ms <= 1.02 * taken


@pytest.mark.parametrize("free_bytes", [1 << 40, 4 * UNIT_BYTES])
def test_memory_is_counted_and_the_module_is_its_own_again(calibrated: Any, free_bytes: int) -> None:
    found, _, model, _, _, shelf = calibrated("prefill", free_bytes=free_bytes)
    assert found.activation_bytes == 8_000 + 600, "the peak above what was held before the first call, and what inputs and workspaces hold"
    assert found.context_bytes == (1 << 41) - free_bytes
    model.on(None)
    fresh = streamed("prefill")[1]
    x = torch.randn(2, 256)
    with torch.inference_mode():
        assert torch.equal(model(x), fresh(x))
    assert all("forward" not in vars(part) for part in model.modules())
    shelf.close()
    with torch.inference_mode():
        assert torch.equal(model(x), fresh(x))


def test_running_out_of_memory_with_everything_resident_is_tried_with_slots(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, made = Gpu.slot, []

    def slot(self: Gpu, num_bytes: int) -> torch.Tensor:
        made.append(num_bytes)
        if len(made) == 5:
            raise OutOfMemory("the device has no such bytes")
        return kept(self, num_bytes)

    monkeypatch.setattr(Gpu, "slot", slot)
    found, gpu, *_ = calibrated("prefill")
    assert gpu.copies == 2 and "stayed in their slots" in found.source


def test_a_budget_in_bytes_is_kept_while_calibrating_too() -> None:
    found = anatomy.dissect(launches.Stack(DEPTH, 0, 0, (0, 0)), small_bytes=2048)
    assert measured._fits(found, StreamSpec(budget_share=0.5), 0, 1 << 40)
    assert not measured._fits(found, StreamSpec(budget_bytes=8 * UNIT_BYTES), 0, 1 << 40)
    assert measured._fits(found, StreamSpec(budget_bytes=40 * UNIT_BYTES), 0, 1 << 40)


def test_units_timed_with_pauses_take_the_shares_of_a_forward_without_where_the_device_is_what_it_waits_for() -> None:
    """A card at its power limit: 118.9 ms unit by unit, 126.3 ms back to back."""
    alone = {"a": 40.0, "b": 60.0, "": 5.0}
    warm = measured._as_whole(alone, 10.0, 110.0)
    assert sum(warm.values()) == pytest.approx(110.0) and warm["b"] / warm["a"] == pytest.approx(1.5)
    assert measured._as_whole(alone, 100.0, 110.0) == alone, "the host is as slow: what is left may be its"
    assert measured._as_whole(alone, 10.0, 400.0) == alone, "most of the forward is something else"
    slow = measured._as_whole(alone, 100.0, 90.0)
    assert sum(slow.values()) == pytest.approx(90.0), "units take no longer together than the forward that has all of them"
