"""Jobs of `gpuopt stream` on a device on paper, with children in this process, and one in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import streams

from gpuopt.core import codec
from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.core.result import Report
from gpuopt.core.spec import Candidate, DimSpec, InputSpec, Job, ModelRef
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline import isolate, recipe
from gpuopt.pipeline.streamed import arms, command
from gpuopt.pipeline.streamed.device import RATES, parse
from gpuopt.streaming import streamer

HALF = StreamSpec(budget_share=0.5)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "Child", streams.Inline)
    streams.Inline.asked.clear()


def job(name: str, action: str, *specs: StreamSpec, device: str = streams.DEVICE, **more: Any) -> Job:
    sizes = {"N": 1, "S": 4}
    return Job(
        verb="stream",
        candidates=(
            Candidate(
                model=ModelRef(text=name, trust=(name.rpartition(":")[0],)),
                inputs=InputSpec(dims=tuple(DimSpec(name=k, values=(v,)) for k, v in sizes.items())),
                dims=sizes,
                device=device,
            ),
        ),
        stream=StreamRequest(action=action, specs=specs, **{"calls": 6, "forwards": 6, **more}),
    )


def did(report: Report) -> Any:
    assert report.streamed is not None
    return report.streamed


def test_a_plan_is_the_same_bytes_twice(tmp_path: Path, inline: None) -> None:
    asked = job(streams.factory(tmp_path), "plan", HALF, StreamSpec(budget_share=0.8))
    first, second = (codec.to_json(command.stream(asked), indent=1) for _ in range(2))
    assert first == second
    assert "bind" not in streams.Inline.asked


def test_a_plan_says_what_a_run_then_takes(tmp_path: Path, inline: None) -> None:
    name = streams.factory(tmp_path)
    for link in ("1e8", "1e9", "1e10"):
        told = did(command.stream(job(name, "run", HALF, device=f"simulated:link={link},block=0.05ms")))
        seen = told.rows[0].measured
        assert seen.median_ms == pytest.approx(seen.plan.predicted_ms, rel=1e-3)
        assert seen.median_ms >= seen.plan.bound_ms * 0.999 and seen.simulated and not seen.demand_fetches
        assert seen.pct_of_bound == pytest.approx(100 * seen.plan.bound_ms / seen.median_ms)


def test_a_frontier_in_turns_with_everything_resident(tmp_path: Path, inline: None) -> None:
    report = command.stream(
        job(streams.factory(tmp_path), "bench", HALF, StreamSpec(budget_share=0.9), device="simulated:link=1e8,block=0.05ms")
    )
    told = did(report)
    slow, fast = (row.measured for row in told.rows)
    (resident,) = told.arms
    assert slow.exact and fast.exact
    assert resident.median_ms <= fast.median_ms < slow.median_ms
    assert any("beside one on paper they are not run" in note for note in told.notes)
    assert [(run.backend, run.preset) for run in report.runs] == [("eager", None), ("streamed", "50%"), ("streamed", "90%")]


def test_a_budget_that_is_too_small_is_a_row_among_others_and_an_error_alone(tmp_path: Path, inline: None) -> None:
    name, tiny = streams.factory(tmp_path), StreamSpec(budget_share=0.1)
    told = did(command.stream(job(name, "plan", HALF, tiny)))
    assert told.rows[0].plan is not None and told.rows[1].plan is None and "too small" in told.rows[1].reason
    with pytest.raises(ResourceError, match="too small"):
        command.stream(job(name, "plan", tiny))
    with pytest.raises(ResourceError, match="too small"):
        command.stream(job(name, "bench", tiny, tiny))


def test_verify_looks_at_everything_and_finds_nothing(tmp_path: Path, inline: None) -> None:
    report = command.stream(job(streams.factory(tmp_path), "verify", HALF))
    checks = {check.name: check for check in did(report).checks}
    assert set(checks) == {"checksums", "outputs", "races", "order"} and all(check.passed for check in checks.values())
    assert all(gate.passed for gate in report.gates) and "fetched on demand" in checks["order"].detail


@pytest.mark.parametrize("broken", ["no wait for the copy", "no wait for the reader"])
def test_verify_finds_a_wait_that_is_missing(tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "no wait for the copy":
        monkeypatch.setattr("gpuopt.streaming.engines.simulated.SimulatedEngine.wait_compute", lambda self, event: None)
    else:
        monkeypatch.setattr("gpuopt.streaming.engines.simulated.SimulatedEngine.wait_copy", lambda self, event: None)
    report = command.stream(job(streams.factory(tmp_path), "verify", HALF))
    assert any(not gate.passed for gate in report.gates)


def test_verify_finds_a_copy_of_other_bytes(tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = streamer.Streamer._fetch

    def swapped(self: Any, lane: Any) -> None:
        kept(self, lane)
        if lane.unit.name.endswith(".3"):
            self.engine.drain()
            lane.target[3] ^= 0x40  # of an exponent

    monkeypatch.setattr(streamer.Streamer, "_fetch", swapped)
    checks = {check.name: check.passed for check in did(command.stream(job(streams.factory(tmp_path), "verify", HALF))).checks}
    assert checks["checksums"] is False and checks["outputs"] is False


def test_a_packed_folder_is_what_a_disk_tier_reads(tmp_path: Path, inline: None) -> None:
    name, folder = streams.factory(tmp_path), tmp_path / "packed"
    packed = did(command.stream(replace(job(name, "pack"), output=str(folder))))
    assert packed.packed_bytes == sum(file.stat().st_size for file in folder.glob("unit-*.bin"))
    spec = StreamSpec(budget_share=0.5, disk=str(folder), pin_limit_bytes=1)
    seen = did(command.stream(job(name, "run", spec, device="simulated:link=1e9,disk=1e8,block=0.05ms"))).rows[0].measured
    assert set(seen.plan.homes.values()) == {"disk"} and seen.median_ms == pytest.approx(seen.plan.predicted_ms, rel=0.05)


def test_what_is_asked_is_refused_before_a_child_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "Child", None)
    for asked, said in (
        (job("m", "plan"), "budget"),
        (job("m", "run", HALF, HALF), "one budget"),
        (job("m", "fly", HALF), "something to do"),
        (job("m", "pack"), "folder"),
        (replace(job("m", "plan", HALF), candidates=()), "one model"),
    ):
        with pytest.raises(UsageError, match=said):
            command.stream(asked)


def test_a_child_of_its_own_does_the_work(tmp_path: Path) -> None:
    told = did(command.stream(job(streams.factory(tmp_path), "run", HALF)))
    assert told.rows[0].measured.num_calls == 6


@pytest.mark.parametrize(
    ("text", "spec"), [("50%", {"budget_share": 0.5}), ("8GiB", {"budget_bytes": 8 << 30}), ("1.5GB", {"budget_bytes": 1_500_000_000})]
)
def test_a_budget_is_bytes_or_a_share(text: str, spec: dict[str, Any]) -> None:
    assert command.spec_of(text) == StreamSpec(**spec)
    assert command.spec_of(arms.budget_text(StreamSpec(**spec))) == StreamSpec(**spec)


@pytest.mark.parametrize("text", ["0%", "101%", "-1GiB", "0", "much", ""])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        command.spec_of(text)


def test_a_device_on_paper_is_written_as_it_is_read() -> None:
    device = parse("simulated:link=25e9,block=0.5ms,activations=1GiB,schedule=random,seed=3")
    assert (device.rate("link"), device.rate("pageable")) == (25e9, RATES["pageable"])
    assert device.settings["block"] == 0.5 and device.settings["activations"] == 1 << 30 and device.schedule == "random"
    assert parse(str(device)).settings.items() >= device.settings.items()


@pytest.mark.parametrize(
    "text",
    ["simulated:speed=9", "simulated:link=0", "simulated:link=fast", "simulated:block", "simulated:schedule=never", "cpu", "tpu", ""],
)
def test_a_device_there_is_none_of_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_a_recipe_says_the_same_as_the_command_line() -> None:
    text = """
verb: stream
model: m.py:build
generate: 8
device: "simulated:link=1e9,block=0.1ms"
stream: {action: bench, budget: ["8GiB", "50%"], slots: 2, rival: [mmgp, diffusers], alone: true}
"""
    found = recipe.parse(text)
    assert found.stream == StreamRequest(
        action="bench",
        specs=(StreamSpec(budget_bytes=8 << 30, num_slots=2), StreamSpec(budget_share=0.5, num_slots=2)),
        generate=8,
        rivals=("mmgp", "diffusers"),
        alone=True,
    )
    assert found.candidates[0].device == "simulated:link=1e9,block=0.1ms" and found.generate is None


@pytest.mark.parametrize(
    "text",
    [
        "verb: stream\nmodel: m",
        "model: m\nstream: {action: plan}",
        "verb: stream\nmodel: m\nstream: {action: fly}",
        "verb: stream\nmodel: m\nstream: {budget: 50}",
        "verb: stream\nmodel: m\nstream: {budget: '0%'}",
        "verb: stream\nmodel: m\ndevice: cpu\nstream: {budget: '50%'}",
        "verb: stream\nmodel: m\nstream: {calls: 0}",
        "verb: stream\nmodel: m\nstream: {budget: '50%', rival: airllm}",
        "verb: stream\nmodel: m\ngenerate: 1\nstream: {budget: '50%'}",
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        recipe.parse(text)
