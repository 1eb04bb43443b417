"""The timeline: slices that nest, lengths that are those of the report, and a word that none of it was recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.core import codec
from gpuopt.core import result as r
from gpuopt.reports import perfetto

ROOT = Path(__file__).parents[2]
REAL = [
    "recipes/profile/bert_large-h200.json",
    "recipes/profile/resnet101-h200.json",
    "recipes/bert_large/h200.json",
    "recipes/device/h200.json",
]


def profile() -> r.Report:
    return codec.read_json(r.Report, ROOT / "tests" / "golden" / "reports" / "profile.json")


def slices(report: r.Report) -> dict[tuple[int, int], list[dict[str, Any]]]:
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in json.loads(perfetto.render(report))["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    return tracks


def assert_nested(rows: list[dict[str, Any]]) -> None:
    """The format wants slices of a thread to hold each other or to be apart. In whole nanoseconds, as a viewer reads them."""
    open_ends: list[int] = []
    for event in sorted(rows, key=lambda e: (round(e["ts"] * 1000), -round(e["dur"] * 1000))):
        start, end = round(event["ts"] * 1000), round(event["ts"] * 1000) + round(event["dur"] * 1000)
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], event
        open_ends.append(end)


@pytest.mark.parametrize("path", REAL)
def test_a_real_report_becomes_tracks_that_nest(path: str) -> None:
    report = codec.read_json(r.Report, ROOT / path)
    body = json.loads(perfetto.render(report))
    assert set(body) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert "not recorded" in body["otherData"]["note"]
    for event in body["traceEvents"]:
        assert event["ph"] in "XMC"
        assert isinstance(event["pid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0
    for rows in slices(report).values():
        assert_nested(rows)


def test_lengths_are_the_reports_own() -> None:
    report = profile()
    run = report.runs[0]
    assert run.waterfall is not None
    tracks = {rows[0]["name"]: rows for rows in slices(report).values()}
    parts = {e["name"]: e["dur"] / 1e3 for e in tracks["one call, untraced"]}
    assert parts == {"one call, untraced": 40.0} | {p.name: p.ms for p in run.waterfall.parts if p.ms > 0}
    assert [e["dur"] for e in tracks["call 1"]] == [ns / 1e3 for ns in run.samples_ns]
    modules = {e["args"].get("module"): e["dur"] for e in tracks["(root)"]}
    assert modules == {(m.name or "(root)"): m.time_ns / 1e3 for m in run.modules if m.time_ns}
    assert tracks["aten.convolution"][0]["dur"] == 9000.0


def test_each_track_says_whether_it_was_recorded_and_each_run_is_a_process() -> None:
    events = json.loads(perfetto.render(codec.read_json(r.Report, ROOT / "tests/golden/reports/bench.json")))["traceEvents"]
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert len(processes) == len(set(processes)) == 5
    assert any(name.endswith("(crash)") for name in processes)
    threads = {e["args"]["name"] for e in json.loads(perfetto.render(profile()))["traceEvents"] if e["name"] == "thread_name"}
    assert {name for name in threads if "not recorded" not in name} == {"counted calls, in the order taken, without the pauses between"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.floats(-1e3, 1e12, allow_nan=False))), max_size=40),
    st.lists(st.floats(-5.0, 1e6, allow_nan=False), max_size=12),
    st.floats(0.0, 1e6, allow_nan=False),
)
def test_whatever_times_a_report_holds_its_slices_nest(modules: list[tuple[int, float | None]], parts: list[float], wall: float) -> None:
    report = profile()
    rows = tuple(
        r.ModuleRow(name=f"m{i}", module_class="", depth=depth, time_ns=time, flops=None, bytes=None)
        for i, (depth, time) in enumerate(modules)
    )
    fall = r.Waterfall(wall_ms=wall, parts=tuple(r.WaterfallPart(name=f"p{i}", ms=ms) for i, ms in enumerate(parts)), unaccounted_ms=0.0)
    for track in slices(replace(report, runs=(replace(report.runs[0], modules=rows, waterfall=fall),))).values():
        assert_nested(track)


def test_names_are_cleaned_and_the_file_is_plain_ascii(hostile: r.Report) -> None:
    text = perfetto.render(hostile)
    assert text.isascii()
    assert "\\u001b" not in text
    assert "\\u202e" not in text
