"""The breakdown of today's reports and of those in the tree, whose parts have older names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuopt.core import codec
from gpuopt.core.result import (
    IDLE_PARTS,
    WATERFALL_PARTS,
    Bounds,
    Ceilings,
    Environment,
    Report,
    Run,
    Stats,
    Status,
    Waterfall,
    WaterfallPart,
)
from gpuopt.reports import console
from gpuopt.reports.content import breakdown
from gpuopt.reports.content.blocks import Bars, View

OLD = [Path(__file__).parent / "data" / "older-part-names.json"]


def bars(run: Run) -> Bars:
    return next(b for b in breakdown.build(run, Ceilings(), View(), "") if isinstance(b, Bars))


@pytest.mark.parametrize("path", OLD, ids=lambda p: p.stem)
def test_a_report_with_older_part_names_still_shows_all_of_its_time(path: Path) -> None:
    report = codec.read_json(Report, path)
    (run,) = (r for r in report.runs if r.waterfall)
    assert run.waterfall is not None
    shown = bars(run)
    assert sum(bar.share for bar in shown.bars) == pytest.approx(1.0)
    assert all(bar.tone != "other" for bar in shown.bars if bar.label != "other")
    assert run.waterfall.idle_ms == run.waterfall.ms("launch gaps") > 0


def test_every_part_has_a_colour_and_the_idle_ones_that_of_a_gap() -> None:
    tones = {name: breakdown.part_tone(name) for name in WATERFALL_PARTS}
    assert "other" not in tones.values()
    assert {name for name, tone in tones.items() if tone == "gap"} == set(IDLE_PARTS)
    assert tones["copy calls"] == tones["device-to-host"] == tones["host-to-device (pageable)"] == "copy"
    assert tones["tensor-core compute"] == tones["other compute"] == "compute"
    assert {tone for name, tone in tones.items() if name.startswith("avoidable")} == {"memory"}


def a_run(**parts: float) -> Run:
    names = {name.replace(" ", "_").replace("-", "_"): name for name in WATERFALL_PARTS}
    values = {names[key]: ms for key, ms in parts.items()}
    found = Waterfall(
        wall_ms=10.0,
        parts=tuple(WaterfallPart(name=n, ms=values.get(n, 0.0)) for n in WATERFALL_PARTS),
        unaccounted_ms=values.get("unaccounted", 0.0),
    )
    latency = Stats(num_samples=1, median=10.0, mean=10.0, min=10.0, max=10.0)
    return Run(model="m", backend="eager", waterfall=found, latency_ms=latency)


def test_parts_without_time_take_no_line_but_the_unaccounted_one() -> None:
    shown = bars(a_run(tensor_core_compute=9.0, idle=1.0))
    assert [bar.label for bar in shown.bars] == ["tensor-core compute", "idle", "unaccounted"]


def test_the_bounds_become_one_sentence() -> None:
    run = a_run(memory_bound=10.0)
    allowed = Bounds(precision="fp16", unfused_ms=8.1, fused_ms=5.0, by_precision={"fp8": 4.0, "bf16": 8.0, "fp32": 40.0})
    notes = bars(replace(run, bounds=allowed)).notes
    assert "81% of what fp16 allows op by op (8.10 ms), 50% of what fp16 allows fused (5.00 ms); fp8 would allow 4.00 ms" in notes
    assert not any("allows" in note for note in bars(run).notes)
    only_fused = replace(run, bounds=Bounds(precision="fp16", unfused_ms=None, fused_ms=5.0))
    assert "50% of what fp16 allows fused (5.00 ms)" in bars(only_fused).notes


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_what_is_said_of_a_part_is_said_whole_at_every_width(width: int) -> None:
    detail = "73% of the kernel time has no known count: placed by kernel name"
    part = WaterfallPart(name="tensor-core compute", ms=1.0, detail=detail)
    told = Run(model="m", backend="eager", status=Status.OK, waterfall=Waterfall(wall_ms=1.0, parts=(part,), unaccounted_ms=0.0))
    report = Report(
        schema_version=1,
        environment=Environment(gpuopt="0", python="3", platform="x"),
        command="gpuopt profile m",
        verb="profile",
        runs=(told,),
    )
    text = " ".join(console.text(report, width=width).split())
    assert detail in text and "…" not in text
