"""The tables and pictures of docs/streaming.md: made from reports, here from one that was made up on a device on paper."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from gpuopt.core import codec
from gpuopt.core.result import Device, Report
from gpuopt.core.spec import Candidate, DimSpec, InputSpec, Job, ModelRef
from gpuopt.core.streamed import RIVALS, OtherEager, OverEager, Ratio, StreamArm, StreamRequest
from gpuopt.core.streaming import Streamed, StreamSpec
from gpuopt.pipeline import isolate
from gpuopt.pipeline.streamed import command
from gpuopt.pipeline.streamed.device import parse
from gpuopt.reports import frontier

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # recipes are no part of the package

from recipes.streaming import paper, table  # noqa: E402


def _streams() -> ModuleType:
    path = ROOT / "tests" / "pipeline" / "streamed" / "streams.py"
    spec = importlib.util.spec_from_file_location("streams_of_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


STREAMS = _streams()
SIZES = {"N": 1, "S": 4}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Three budgets that were streamed on paper, told as if a device had run them, with rivals that are made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolate, "Child", STREAMS.Inline)
        name = STREAMS.factory(tmp_path_factory.mktemp("model"))
        candidate = Candidate(
            model=ModelRef(text=name, trust=(name.rpartition(":")[0],)),
            inputs=InputSpec(dims=tuple(DimSpec(name=k, values=(v,)) for k, v in SIZES.items())),
            dims=SIZES,
            device="simulated:link=1e8,block=0.3ms,outside=0.1ms",
        )
        specs = tuple(StreamSpec(budget_share=share) for share in (0.4, 0.5, 0.9))
        made = command.stream(Job(verb="stream", candidates=(candidate,), stream=StreamRequest(action="bench", specs=specs, calls=4)))
    told: Any = made.streamed
    rows = tuple(
        replace(row, measured=replace(row.measured, simulated=False, peak_device_bytes=row.measured.plan.budget_bytes - 1000))
        for row in told.rows
    )
    ours = rows[1].measured.median_ms
    arms = [replace(told.arms[0], peak_device_bytes=rows[0].measured.plan.anatomy.weight_bytes)]
    for rival, slower in (("accelerate", 6.5), ("accelerate-pinned", 1.4), ("diffusers", 2.5), ("mmgp", 0.9)):
        arm = StreamArm(name=RIVALS[rival].title, rival=rival, row=1, budgeted=RIVALS[rival].takes_budget, exact=True, setting="made up")
        peak = rows[1].measured.plan.budget_bytes
        arms.append(
            replace(arm, median_ms=slower * ours, p10_ms=ours, p90_ms=9 * ours, num_calls=3, streamed_ms=ours, peak_device_bytes=peak)
        )
    arms.append(StreamArm(name="mmgp", rival="mmgp", row=2, reason="it | fell\nover"))
    return replace(made, device=Device(id="cuda:0", name="A device", kind="cuda"), streamed=replace(told, rows=rows, arms=tuple(arms)))


def first(report: Report, index: int = 0) -> Streamed:
    told: Any = report.streamed
    found: Streamed = told.rows[index].measured
    return found


def only(report: Report, seen: Streamed) -> Report:
    """The same with one row."""
    told: Any = report.streamed
    return replace(report, streamed=replace(told, rows=(replace(told.rows[0], measured=seen),), arms=told.arms[:1]))


def lines(part: str, reports: dict[str, Report]) -> list[str]:
    return list(table.PARTS[part](reports))


def body(part: str, reports: dict[str, Report]) -> list[list[str]]:
    """Cells of a table's rows, its header left out."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines(part, reports) if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1, "every row has as many cells as the header"
    return rows[2:]


def test_the_page_says_what_the_reports_in_the_tree_say() -> None:
    reports = table.read()
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.render(text, reports) == text, "python -m recipes.streaming.table"
    assert set(re.findall(r"<!-- generated:([\w-]+) -->", text)) == set(table.PARTS)
    for name, made in table.drawings(reports).items():
        assert table.PAGE.with_name(f"{name}.svg").read_text(encoding="utf-8") == made


def test_every_recipe_that_is_told_of_is_in_the_tree_and_the_other_way_round() -> None:
    told = {*table.CELLS, *table.FIT, *table.BESIDE, *table.LARGE, *table.FROM_DISK, *table.VERIFIED}
    assert told == {path.parent.name for path in ROOT.glob("recipes/stream_*/recipe.yaml")}


def test_what_was_not_run_says_so_in_a_sentence_and_shows_no_figure() -> None:
    for name, part in table.PARTS.items():
        text = "\n".join(part({}))
        assert text.count("Not run yet") == 1 and "|" not in text and not re.search(r"\d\.\d", text), name


def test_each_cell_stands_against_the_bound_the_prediction_and_the_budget(report: Report) -> None:
    rows = body("bound", {"stream_llama_8b_prefill": report})
    assert [row[1] for row in rows] == ["40%", "50%", "90%"]
    assert [row[6].split()[0] for row in rows] == [f"{first(report, index).pct_of_bound:.1f}%" for index in range(3)]
    assert all(row[8].endswith("(aim)") for row in rows)
    assert not any("above" in row[9] for row in rows) and {row[11] for row in rows} == {"yes"}
    seen = first(report)
    slow = replace(seen, median_ms=3 * seen.median_ms, pct_of_bound=33.0, peak_device_bytes=1 << 40, exact=False)
    (row,) = body("bound", {"stream_llama_8b_prefill": only(report, slow)})
    fast = only(report, replace(seen, pct_of_bound=96.0)), only(report, replace(seen, pct_of_bound=99.5))
    assert [body("bound", {"stream_llama_8b_prefill": one})[0][6] for one in fast] == ["96.0% (must)", "99.5% (aim)"]
    assert row[6] == "33.0% **(missed)**" and row[8].endswith("**(missed)**") and "**above**" in row[9] and row[11] == "**no**"
    assert "Of 1 cell 0 reach" in lines("bound", {"stream_llama_8b_prefill": only(report, slow)})[0]


def test_rivals_are_held_against_the_goals_of_their_workload(report: Report) -> None:
    rows = {row[1]: row for row in body("rivals", {"stream_llama_8b_rivals_prefill": report})[:4]}
    assert rows["accelerate device_map"][5] == "6.50× (must)"  # the aim of a prompt is 7
    assert rows["accelerate, weights pinned by hand"][5] == "1.40× **(missed)**"  # 2 for a prompt
    assert rows["diffusers group offload"][2] == "takes none" and rows["diffusers group offload"][5] == "2.50× (must)"
    assert rows["mmgp"][5] == "0.90× **(missed)**"
    assert "not run: it / fell over" in body("rivals", {"stream_llama_8b_rivals_prefill": report})[4][3]


def test_nothing_streamed_stands_against_eager_in_the_same_process(report: Report) -> None:
    told: Any = report.streamed
    eager = told.arms[0].median_ms
    made = only(report, replace(first(report, 2), median_ms=1.03 * eager))
    told = made.streamed
    elsewhere = OtherEager(name="everything resident", median_ms=4.0, over=Ratio(ratio=0.97, low=0.968, high=0.972, num_pairs=60))
    for low, high, verdict in ((0.999, 1.003, "met"), (0.999, 1.012, "**inconclusive**"), (1.02, 1.04, "**missed**"), (None, None, "**inconclusive**")):  # fmt: skip
        over = Ratio(ratio=1.001, low=low, high=high, num_pairs=60)
        beside = OverEager(over=over, streamed_ms=5.0, eager_ms=4.9, block_forwards=15, apart=True, others=(elsewhere,))
        changed = replace(made, streamed=replace(told, rows=(replace(told.rows[0], over_eager=beside),)))
        (row,) = body("fits", {"stream_llama_8b_fits_decode": changed})
        assert row[4] == verdict and row[1:3] == ["4.90 ms", "5.00 ms"]
        assert row[3] == ("+0.10% (too few pairs)" if low is None else f"+0.10% ({100 * (low - 1):+.2f}..{100 * (high - 1):+.2f})")
        assert row[5] == "everything resident: -3.00% (-3.20..-2.80)" and row[6].endswith("+3.00%")
        assert "60 pairs of blocks of 15 forwards, plain eager with weights of its own." in lines(
            "fits", {"stream_llama_8b_fits_decode": changed}
        )


def test_a_report_without_plain_eager_in_its_process_is_held_to_the_goal_across_two(report: Report) -> None:
    told: Any = report.streamed
    for over, verdict in ((1.004, "met"), (1.02, "**missed**")):
        made = only(report, replace(first(report, 2), median_ms=over * told.arms[0].median_ms))
        (row,) = body("fits", {"stream_llama_8b_fits_decode": made})
        assert row[1:5] == ["", "", "not measured in one process", verdict] and row[6].endswith(f"{100 * (over - 1):+.2f}%")
    told = made.streamed
    failed = replace(told, rows=(replace(told.rows[0], over_eager=OverEager(reason="it fell over")),))
    (row,) = body("fits", {"stream_llama_8b_fits_decode": replace(made, streamed=failed)})
    assert row[3] == "not measured in one process: it fell over"


def test_a_disk_is_held_against_the_slower_of_disk_and_link(report: Report) -> None:
    seen = first(report)
    plan = replace(
        seen.plan, homes=dict.fromkeys(seen.plan.homes, "disk"), calibration=replace(seen.plan.calibration, disk_bytes_per_s=5e7)
    )
    moved = sum(unit.num_bytes for unit in plan.anatomy.units if unit.name in plan.homes)
    for share, verdict in ((0.9, "met"), (0.8, "**missed**")):
        made = only(report, replace(seen, plan=plan, median_ms=moved / 5e7 / share * 1e3))
        (row,) = body("disk", {"stream_llama_8b_disk": made})
        assert row[6] == f"{100 * share:.1f}%" and row[7] == verdict


def test_the_simulated_device_takes_what_the_same_protocol_took(report: Report) -> None:
    for index in range(3):
        seen = first(report, index)
        assert paper.simulated_ms(seen.plan) == pytest.approx(seen.median_ms, rel=0.002)
    assert all(row[5] == "met" for row in body("simulated", {"stream_llama_8b_decode": report}))
    half = only(report, replace(first(report), median_ms=first(report).median_ms / 2))
    assert body("simulated", {"stream_llama_8b_decode": half})[0][5] == "**missed**"


def test_the_line_for_a_machine_without_a_gpu_is_one_that_the_tool_takes(report: Report) -> None:
    plan = first(report).plan
    assert table.paper_device(plan) in "\n".join(lines("simulated", {"stream_llama_8b_decode": report}))
    device = parse(table.paper_device(plan))
    assert device.rate("link") == pytest.approx(plan.calibration.link_bytes_per_s, rel=1e-3)
    assert device.settings["block"] == pytest.approx(0.3)


def test_a_picture_holds_every_point_within_its_frame_and_stands_alone(report: Report) -> None:
    made = table.drawings({"stream_llama_8b_decode": report, "stream_llama_8b_rivals_decode": report})
    assert set(made) == {"streaming_decode"}
    text = made["streaming_decode"]
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    points = [circle for circle in root.iter(f"{space}circle") if circle.find(f"{space}title") is not None]
    assert len(points) == 3 + 1 + 4, "what two reports measured is drawn once"
    for circle in points:
        assert frontier.LEFT <= float(circle.attrib["cx"]) <= frontier.WIDTH - frontier.RIGHT
        assert frontier.TOP - 1 <= float(circle.attrib["cy"]) <= frontier.HEIGHT - frontier.FOOT + 1
    assert "prefers-color-scheme:dark" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "") and "<script" not in text
    assert "memory of the device that is taken, at its peak" in text and "the bound" in text


def test_without_peaks_a_picture_is_over_the_weights_there(report: Report) -> None:
    told: Any = report.streamed
    rows = tuple(replace(row, measured=replace(row.measured, peak_device_bytes=None)) for row in told.rows)
    found = frontier.picture([replace(report, streamed=replace(told, rows=rows))])
    assert found is not None and not found.of_peaks
    assert {m.num_bytes for m in found.marks if m.series == frontier.STREAMED} == {frontier.held(row.measured.plan) for row in rows}
    assert frontier.picture([replace(report, streamed=None)]) is None and frontier.svg(replace(report, streamed=None)) == ""


def test_a_report_with_rivals_is_shown_in_every_format(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpuopt.cli import app

    path = tmp_path / "report.json"
    path.write_text(codec.to_json(report, indent=1), encoding="utf-8")
    for format in ("console", "markdown", "csv", "jsonl", "html"):
        assert app.run(["report", str(path), "--format", format]) == 0
        text = capsys.readouterr().out
        if format in ("console", "markdown"):
            for words in ("Beside other libraries", "6.50× faster", "takes none", "Frontier, drawn", "everything resident"):
                assert words in text
    assert "off the prediction" in text and "bit for bit" in text
    assert 'class="frontier"' in text and "Beside other libraries" in text and "Frontier, drawn" not in text
