"""Bars in percent: they add up, keep to their scale and stand side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuopt.core import codec
from gpuopt.core import result as r
from gpuopt.reports import batches, strips
from gpuopt.reports.strips import Span

GOLDEN = Path(__file__).parents[1] / "golden" / "reports"


def profile() -> r.Report:
    return codec.read_json(r.Report, GOLDEN / "profile.json")


def numbers(span: Span) -> tuple[float, float]:
    return float(span.left[:-1]), float(span.width[:-1])


def test_the_bars_of_a_waterfall_follow_each_other_and_fill_the_wall_time() -> None:
    found = strips.falls(profile())
    assert found is not None
    (stack,) = found.stacks
    place = 0.0
    for left, width in map(numbers, stack.spans):
        assert left == pytest.approx(place, abs=0.02)
        place = left + width
    assert place == pytest.approx(100.0, abs=0.1)


def test_two_waterfalls_share_one_scale_and_say_what_changed_part_by_part() -> None:
    report = profile()
    run = report.runs[0]
    assert run.waterfall is not None
    parts = tuple(replace(p, ms=p.ms / 2) for p in run.waterfall.parts)
    fast = replace(run, backend="inductor", waterfall=replace(run.waterfall, wall_ms=run.waterfall.wall_ms / 2, parts=parts))
    found = strips.falls(replace(report, runs=(run, fast)))
    assert found is not None
    ends = [sum(numbers(s.spans[-1])) for s in found.stacks]
    assert ends == pytest.approx([100.0, 50.0], abs=0.1)
    compute = next(p for p in found.parts if p.name == "tensor-core compute")
    assert (compute.change, compute.change_tone) == ("−12.0 ms", "good")
    assert all(len(p.cells) == 2 for p in found.parts)


def test_a_part_only_one_of_two_reports_knows_is_a_dash_in_the_other() -> None:
    report = profile()
    run = report.runs[0]
    old = r.Waterfall(wall_ms=10.0, parts=(r.WaterfallPart(name="compute-bound", ms=10.0),), unaccounted_ms=0.0)
    found = strips.falls(replace(report, runs=(run, replace(run, backend="b", waterfall=old))))
    assert found is not None
    compute = next(p for p in found.parts if p.name == "tensor-core compute")
    assert compute.cells[1][1:] == ("—", "—")
    assert compute.change == ""


def test_parts_below_zero_or_beyond_the_wall_stay_on_the_scale() -> None:
    report = profile()
    odd = r.Waterfall(
        wall_ms=1.0,
        parts=(r.WaterfallPart(name="a", ms=-3.0), r.WaterfallPart(name="b", ms=9.0), r.WaterfallPart(name="c", ms=1e-15)),
        unaccounted_ms=0.0,
    )
    found = strips.falls(replace(report, runs=(replace(report.runs[0], waterfall=odd, bounds=None),)))
    assert found is not None
    for span in (*found.stacks[0].spans, *(cell[0] for part in found.parts for cell in part.cells)):
        left, width = numbers(span)
        assert 0 <= left <= 100
        assert 0 <= width <= 100
    assert found.empty == ("c",)


def test_scatter_is_of_each_run_around_its_own_median() -> None:
    report = profile()
    run = report.runs[0]
    steady = replace(
        run, latency_ms=replace(run.latency_ms, median=40.0, ci95_low=39.9, ci95_high=40.1, p95=40.2), samples_ns=(40_000_000,)
    )  # type: ignore[type-var]
    wide = replace(
        run,
        backend="b",
        latency_ms=replace(run.latency_ms, median=10.0, ci95_low=9.0, ci95_high=11.0, p95=12.0),
        samples_ns=(9_000_000, 12_000_000),
    )  # type: ignore[type-var]
    found = strips.strips(replace(report, runs=(steady, wide)))
    assert found is not None
    narrow, broad = (numbers(s.interval)[1] for s in found.rows if s.interval)
    assert broad == pytest.approx(40 * narrow, rel=0.15)
    assert found.rows[0].dots == (found.middle,)
    assert [s.bar.width for s in found.rows] == ["100.00%", "25.00%"]
    assert "95% interval 9.00 ms to 11.0 ms, p95 12.0 ms" in found.rows[1].told


def test_runs_at_several_sizes_become_curves_and_what_ran_out_of_memory_ends_them() -> None:
    report = codec.read_json(r.Report, GOLDEN / "bench.json")
    base = report.runs[0]
    runs = [
        replace(base, backend=b, batch=n, dims={"N": n, "S": 7}, samples_per_s=100.0 * n) for b in ("eager", "inductor") for n in (8, 1, 64)
    ]
    runs += [r.Run(model=base.model, backend="eager", precision="fp16", dims={"N": 512, "S": 7}, status=r.Status.OOM_DEVICE)]
    found = batches.curves(replace(report, runs=tuple(runs)))
    assert [(c.label, c.dim, [n for n, _ in c.runs], [n for n, _ in c.lost]) for c in found] == [
        ("eager", "N", [1, 8, 64], [512]),
        ("inductor", "N", [1, 8, 64], []),
    ]
    assert {row.kind for row in found[0].ceilings} == {"measured", "spec"}


def test_one_size_or_sizes_that_change_together_are_no_curve() -> None:
    report = codec.read_json(r.Report, GOLDEN / "bench.json")
    assert batches.curves(report) == ()
    both = tuple(replace(report.runs[0], dims={"N": n, "S": n}) for n in (1, 2))
    assert batches.curves(replace(report, runs=both)) == ()


def test_a_gain_is_drawn_from_its_low_to_its_high_on_the_scale_of_the_largest() -> None:
    findings = (
        r.Finding(code="A", severity="info", message="", gain_low_ms=1.0, gain_high_ms=2.0),
        r.Finding(code="B", severity="warning", message="", gain_low_ms=5.0, gain_high_ms=10.0, measured_gain_ms=7.5, confirmed=True),
        r.Finding(code="C", severity="warning", message="", measured_gain_ms=-0.5),
    )
    found = {x.code: x for x in strips.findings(replace(profile(), findings=findings))}
    assert list(found) == ["B", "A", "C"]
    (left_a, width_a), (left_b, width_b) = (numbers(found[c].predicted) for c in "AB")  # type: ignore[arg-type]
    assert left_b + width_b == pytest.approx(100 / 1.04, abs=0.02)
    assert (left_b, width_b) == pytest.approx((5 * left_a, 5 * width_a), abs=0.06)
    assert left_a == pytest.approx(width_a, abs=0.02)
    assert float((found["B"].measured or "")[:-1]) == pytest.approx(left_b * 1.5, abs=0.02)
    assert (found["C"].measured, found["C"].measured_text, found["C"].predicted) == ("0.00%", "−500 µs", None)
