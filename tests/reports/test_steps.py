"""What a profile says to type next."""

from __future__ import annotations

import pytest

from gpuopt.core.result import Ceiling, Ceilings, Device, Environment, Report, Run, Status, Waterfall, WaterfallPart
from gpuopt.reports import console
from gpuopt.reports.content import steps

HERE = Environment(gpuopt="0", python="3", platform="x")
CEILINGS = Ceilings(
    rows=tuple(
        Ceiling(quantity=name, value=value, unit="FLOP/s", kind="measured", source="GEMM")
        for name, value in (("fp32", 50e12), ("fp16", 800e12))
    )
)


def told(backend: str, preset: str | None = None, part: str = "memory-bound", kind: str = "cuda") -> list[str]:
    run = Run(
        model="m.pt",
        backend=backend,
        preset=preset,
        precision="fp32",
        status=Status.OK,
        waterfall=Waterfall(wall_ms=2.0, parts=(WaterfallPart(name=part, ms=2.0),), unaccounted_ms=0.0),
    )
    report = Report(
        schema_version=1,
        environment=HERE,
        command=f"gpuopt profile m.pt --backend {backend}",
        verb="profile",
        runs=(run,),
        device=Device(id="x", name="X", kind=kind),
    )
    return [command for block in steps.build(report, CEILINGS) for _, command in block.steps]


def test_eager_is_told_to_compile() -> None:
    assert told("eager")[0] == "gpuopt bench m.pt --backend eager --backend inductor"


def test_what_is_compiled_is_not_told_to_compile_once_more() -> None:
    assert not any("--backend eager" in command for command in told("inductor"))
    assert all(command.count("inductor") == 1 for command in told("inductor"))


def test_what_runs_elsewhere_is_compared_with_itself() -> None:
    first, *more = told("ort")
    assert first == "gpuopt bench m.pt --backend ort --backend inductor"
    assert all(command.endswith("--backend ort") for command in more)


@pytest.mark.parametrize(("preset", "asked"), [(None, True), ("reduce-overhead", False)])
def test_compiled_code_whose_device_waits_may_still_become_a_graph(preset: str | None, asked: bool) -> None:
    found = told("inductor", preset, part="launch gaps")
    assert ("gpuopt bench m.pt --backend inductor --backend inductor:reduce-overhead" in found) == asked


def test_a_trace_from_elsewhere_says_last_where_its_time_goes() -> None:
    parts = (WaterfallPart(name="idle", ms=1.5), WaterfallPart(name="memory-bound", ms=0.5))
    run = Run(model="t.json", backend="trace", status=Status.OK, waterfall=Waterfall(wall_ms=2.0, parts=parts, unaccounted_ms=0.0))
    report = Report(schema_version=1, environment=HERE, command="gpuopt profile --trace t.json", verb="profile", runs=(run,))
    assert "the biggest slice of a traced call is idle, 75% of the wall time" in console.text(report)
