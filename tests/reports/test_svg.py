"""The roofline as a file: well-formed, self-contained, and with everything where its figures say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpuopt.core import codec
from gpuopt.core import result as r
from gpuopt.reports import plots, svg
from gpuopt.reports.roofline import pictures

ROOT = Path(__file__).parents[2]
NAMESPACE = "{http://www.w3.org/2000/svg}"
REAL = [
    "recipes/profile/bert_large-h200.json",
    "recipes/profile/resnet101-h200.json",
    "recipes/resnet101/h200.json",
    "recipes/device/h200.json",
]


def profile() -> r.Report:
    return codec.read_json(r.Report, ROOT / "tests" / "golden" / "reports" / "profile.json")


def drawn(report: r.Report) -> ElementTree.Element:
    return ElementTree.fromstring(svg.render(report))


@pytest.mark.parametrize("path", REAL)
def test_a_real_report_is_a_picture_whose_parts_lie_on_the_sheet(path: str) -> None:
    root = drawn(codec.read_json(r.Report, ROOT / path))
    inner = next(e for e in root.iter(NAMESPACE + "svg") if e is not root)
    width, height = (float(v) for v in (inner.get("viewBox") or "").split()[2:])
    for circle in inner.iter(NAMESPACE + "circle"):
        x, y = float(circle.get("cx", "nan")), float(circle.get("cy", "nan"))
        assert 0 < x < width
        assert 0 < y < height
    for line in inner.iter(NAMESPACE + "line"):
        for name, limit in (("x1", width), ("x2", width), ("y1", height), ("y2", height)):
            assert -1 <= float(line.get(name, "nan")) <= limit + 1


def test_a_point_lies_where_its_logarithms_say_and_a_point_at_its_peak_on_the_line() -> None:
    report = profile()
    base = report.runs[0].roofline[0]

    def point(intensity: float, speed: float) -> r.RooflinePoint:
        return replace(base, name=f"{intensity}", flops=intensity * 1e6, bytes=1e6, time_ns=intensity * 1e6 / speed * 1e9)

    at = [(1.0, 1e12), (10.0, 1e13), (100.0, 1e14), (1000.0, 800e12)]
    report = replace(report, runs=(replace(report.runs[0], roofline=tuple(point(*xy) for xy in at)),))
    root = drawn(report)
    circles = {}
    for circle in (c for c in root.iter(NAMESPACE + "circle") if c.find(NAMESPACE + "title") is not None):
        name = (circle.find(NAMESPACE + "title").text or "").split(" in ")[0]  # type: ignore[union-attr]
        circles[float(name)] = (float(circle.get("cx", "nan")), float(circle.get("cy", "nan")))
    (x1, y1), (x10, y10), (x100, y100), (x1000, y1000) = (circles[x] for x, _ in at)
    assert x10 - x1 == pytest.approx(x100 - x10, abs=0.2)
    assert x1000 - x100 == pytest.approx(x100 - x10, abs=0.2)
    assert y1 - y10 == pytest.approx(y10 - y100, abs=0.2)
    assert y100 - y1000 == pytest.approx((y10 - y100) * math.log10(8), abs=0.2)
    peak = next(e for e in root.iter(NAMESPACE + "line") if e.get("class") == "roof measured" and e.get("y1") == e.get("y2"))
    assert float(peak.get("y1", "nan")) == pytest.approx(y1000, abs=0.2)


def test_area_is_time() -> None:
    report = profile()
    points = tuple(replace(report.runs[0].roofline[0], name=str(i), time_ns=t) for i, t in enumerate((8e6, 2e6)))
    root = drawn(replace(report, runs=(replace(report.runs[0], roofline=points),)))
    radii = [float(c.get("r", "nan")) for c in root.iter(NAMESPACE + "circle") if c.find(NAMESPACE + "title") is not None]
    assert radii[0] ** 2 / radii[1] ** 2 == pytest.approx(4.0, rel=0.05)


def test_ops_without_flops_have_a_panel_of_their_own_and_ops_without_a_count_are_told_of() -> None:
    report = profile()
    run = report.runs[0]
    moving = replace(run.roofline[1], flops=0.0, intensity=0.0)
    report = replace(report, runs=(replace(run, roofline=(run.roofline[0], moving, run.roofline[3])),))
    text = svg.render(report)
    assert "ops without FLOPs: bytes a second" in text
    assert "1 op with 6.2% of the time have no known FLOPs or bytes" in text
    assert len([c for c in drawn(report).iter(NAMESPACE + "circle") if c.find(NAMESPACE + "title") is not None]) == 2


def test_a_bench_shows_its_runs_as_points_and_a_device_its_ceilings() -> None:
    bench = codec.read_json(r.Report, ROOT / "recipes/resnet101/h200.json")
    timed = [run for run in bench.runs if run.latency_ms is not None]
    (picture,) = pictures(bench)
    assert picture.is_runs
    assert len(picture.computing) == len(timed)
    text = svg.render(codec.read_json(r.Report, ROOT / "recipes/device/h200.json"))
    assert "fp8" in text
    assert "<circle" not in text


def test_measured_sustained_and_data_sheet_are_told_apart() -> None:
    report = profile()
    assert report.device is not None
    sustained = r.Ceiling(quantity="fp16", value=700e12, unit="FLOP/s", kind="sustained", source="between blocks")
    device = replace(report.device, ceilings=replace(report.device.ceilings, rows=(*report.device.ceilings.rows, sustained)))
    text = svg.render(replace(report, device=device))
    assert {m for m in re.findall(r'class="roof (\w+)"', text)} == {"measured", "sustained", "spec"}
    assert "fp16 700 TFLOP/s, sustained" in text


def test_a_hostile_report_is_well_formed_and_has_the_elements_of_a_harmless_one(hostile: r.Report) -> None:
    root = drawn(hostile)
    names = {e.tag.removeprefix(NAMESPACE) for e in root.iter()}
    assert names <= {"svg", "title", "style", "rect", "text", "line", "circle"}
    assert not [a for e in root.iter() for a in e.attrib if a.startswith("on") or "href" in a]


def test_nothing_to_draw_is_said() -> None:
    report = profile()
    empty = replace(report, runs=(), device=None)
    assert "nothing to draw" in svg.render(empty)
    drawn(empty)
    assert plots.roofline(pictures(report)[0])


def test_many_points_stay_a_small_file() -> None:
    report = profile()
    points = tuple(replace(report.runs[0].roofline[i % 3], module=f"m{i}") for i in range(20_000))
    assert len(svg.render(replace(report, runs=(replace(report.runs[0], roofline=points),)))) < 1_500_000
