"""Every format of every report against a golden file; hostile names; every width."""

from __future__ import annotations

import csv as csv_module
import io
import json as json_module
import os
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from gpuopt.core import codec, registry
from gpuopt.core.errors import UsageError
from gpuopt.core.result import Report, Run, Status
from gpuopt.reports import FORMATS, WITH_VIEW, console, csv, github, jsonl, junit, markdown
from gpuopt.reports.content.blocks import Table, View
from gpuopt.reports.figures import clean
from gpuopt.reports.page import page

GOLDEN = Path(__file__).parents[1] / "golden" / "reports"
SUFFIX = {
    "console": "txt",
    "json": "json",
    "jsonl": "jsonl",
    "markdown": "md",
    "html": "html",
    "junit": "xml",
    "github": "github.txt",
    "csv": "csv",
    "svg": "svg",
    "perfetto": "perfetto.json",
}
ASSETS = re.compile(r"(<style>).*?(?=</style>)|(<script>).*?(?=</script>)|'sha256-[^']*'", re.DOTALL)
"""What every page has in common: it is read in its own files, not in each golden one."""


def check_golden(name: str, text: str) -> None:
    """GPUOPT_UPDATE_GOLDEN=1 rewrites; the change is then read in review."""
    path = GOLDEN / name
    if os.environ.get("GPUOPT_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{name} changed; GPUOPT_UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_format_of_every_report_is_as_it_was_reviewed(sample: tuple[str, Report], format: str) -> None:
    name, report = sample
    text = registry.resolve(FORMATS, format, kind="format")(report)
    check_golden(f"{name}.{SUFFIX[format]}", ASSETS.sub(r"\1\2", text) if format == "html" else text)


def test_every_format_has_a_suffix_here_and_the_same_report_gives_the_same_bytes(sample: tuple[str, Report]) -> None:
    assert set(SUFFIX) == set(FORMATS)
    assert WITH_VIEW <= set(FORMATS)
    for format in FORMATS:
        render = registry.resolve(FORMATS, format, kind="format")
        assert render(sample[1]) == render(sample[1])


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal(sample: tuple[str, Report], width: int) -> None:
    for line in console.text(sample[1], width=width).splitlines():
        assert len(line) <= width, line


@pytest.mark.parametrize("width", [80, 140])
def test_the_answer_stays_at_the_end_where_the_prompt_is(width: int) -> None:
    report = codec.read_json(Report, GOLDEN / "bench.json")
    text = console.text(report, width=width)
    assert text.index("Gates") < text.index("1 of 2 gates missed") < text.index("fastest is inductor:freezing")


def test_a_narrow_terminal_keeps_the_time_and_the_share_of_the_ceiling_and_says_what_it_left_out() -> None:
    text = console.text(codec.read_json(Report, GOLDEN / "bench.json"), width=60)
    assert "12.8 ms" in text
    assert "39%" in text
    assert "a wider terminal, or --json, also shows" in text


def test_colours_are_escape_codes_and_plain_text_has_none(sample: tuple[str, Report]) -> None:
    assert "\x1b[" in console.coloured(sample[1], width=100)
    assert "\x1b" not in console.text(sample[1], width=100)


def test_rows_have_a_cell_for_every_column(sample: tuple[str, Report], hostile: Report) -> None:
    for report in (sample[1], hostile):
        for block in page(report).blocks:
            if isinstance(block, Table):
                assert all(len(row) == len(block.columns) for row in block.rows), block.title


def test_a_report_of_nothing_is_shown_in_every_format(sample: tuple[str, Report]) -> None:
    empty = Report(schema_version=1, command="", verb="bench", environment=sample[1].environment)
    for format in FORMATS:
        registry.resolve(FORMATS, format, kind="format")(empty)


@pytest.mark.parametrize("status", list(Status))
def test_a_run_of_any_status_with_nothing_known_is_shown_in_every_format(status: Status, sample: tuple[str, Report]) -> None:
    report = replace(sample[1], runs=(Run(model="m", backend="b", status=status),), gates=())
    for format in FORMATS:
        assert registry.resolve(FORMATS, format, kind="format")(report) is not None


def test_a_missing_figure_is_a_dash_never_none_or_nan(sample: tuple[str, Report]) -> None:
    for format in ("console", "markdown", "html"):
        text = registry.resolve(FORMATS, format, kind="format")(sample[1])
        assert not re.search(r"\b(None|nan|inf)\b", ASSETS.sub("", text))


def test_order_depth_and_top_are_a_choice_of_the_view() -> None:
    report = codec.read_json(Report, GOLDEN / "profile.json")
    by_bytes = console.text(report, View(sort="bytes", top=1, depth=1))
    assert "Ops by bytes" in by_bytes
    assert "aten.batch_norm" in by_bytes
    assert "aten.convolution" not in by_bytes
    assert "├─ 0" not in by_bytes
    assert "--depth 2 shows more" in by_bytes
    by_gap = console.text(report, View(sort="gap"))
    assert by_gap.index("aten.convolution") < by_gap.index("aten.batch_norm")
    with pytest.raises(UsageError, match="told by 'name'"):
        View(by="name")
    with pytest.raises(UsageError, match="sorted by 'name'"):
        View(sort="name")
    with pytest.raises(UsageError) as raised:  # what --by meant before --sort was there
        View(by="gap")
    assert raised.value.fix == "--sort gap"


def test_a_figure_names_its_ceiling_and_where_that_came_from() -> None:
    text = markdown.render(codec.read_json(Report, GOLDEN / "bench.json"))
    assert "measured 800 TFLOP/s (GEMM 8192³)" in text
    assert "data sheet of the X100, dense" in text


def test_a_run_that_misses_formulas_is_marked() -> None:
    report = codec.read_json(Report, GOLDEN / "bench.json")
    run = replace(report.runs[0], flop_coverage=0.5, unknown_ops=("aten.fft",))
    text = console.text(replace(report, runs=(run,)))
    assert "100*" in text
    assert "too low" in text
    assert "no FLOP formula for aten.fft" in text


def test_junit_parses_and_counts_what_it_holds(sample: tuple[str, Report], hostile: Report) -> None:
    for report in (sample[1], hostile):
        suite = ElementTree.fromstring(junit.render(report)).find("testsuite")
        assert suite is not None
        cases = suite.findall("testcase")
        assert int(suite.get("tests", "-1")) == len(cases) == len(report.runs) + len(report.gates) + (report.error is not None)
        for kind, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(count, "-1")) == len(suite.findall(f"testcase/{kind}"))


def test_junit_tells_a_verdict_from_a_crash_from_what_cannot_be(sample: tuple[str, Report]) -> None:
    runs = tuple(Run(model="m", backend=s.value, status=s) for s in (Status.ACCURACY_FAIL, Status.CRASH, Status.UNSUPPORTED, Status.OK))
    suite = ElementTree.fromstring(junit.render(replace(sample[1], runs=runs, gates=(), error=None))).find("testsuite")
    assert suite is not None
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]


def test_github_annotations_cannot_be_ended_or_forged_by_a_name(hostile: Report) -> None:
    for line in github.render(hostile).splitlines():
        match = re.fullmatch(r"::(error|warning|notice) title=([^:,]*)::(.*)", line)
        assert match, line
        assert "%0A]]" not in line or "%250A" in line


def test_github_shows_ten_of_a_kind_and_says_how_many_more(sample: tuple[str, Report]) -> None:
    runs = tuple(Run(model=f"m{i}", backend="b", status=Status.CRASH, reason="SIGSEGV") for i in range(25))
    lines = github.render(replace(sample[1], runs=runs, gates=(), findings=(), error=None)).splitlines()
    assert len(lines) == github.LIMIT
    assert lines[-1].endswith("16 more errors in the report")


def test_markdown_of_a_hostile_report_keeps_its_tables_and_runs_nothing(hostile: Report) -> None:
    text = markdown.render(hostile)
    tokens = [t for block in MarkdownIt("commonmark").enable("table").parse(text) for t in (block, *(block.children or ()))]
    assert {t.content for t in tokens if t.type in ("html_inline", "html_block")} <= {"<sub>", "</sub>", "<br>"}
    assert not [t for t in tokens if t.type in ("link_open", "image")]
    columns = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        columns = columns or count
        assert count == columns, line


def test_markdown_mentions_nobody() -> None:
    assert "@team" not in markdown.escape("ping @team")
    assert markdown.code("a`b``c") == "``` a`b``c ```"


def test_csv_runs_no_formula_in_a_spreadsheet(hostile: Report) -> None:
    report = replace(hostile, runs=(Run(model="=1+1", backend="@SUM(A1)", reason="-2"), *hostile.runs))
    rows = list(csv_module.reader(io.StringIO(csv.render(report))))
    assert len(rows) == 1 + len(report.runs)
    assert all(len(row) == len(csv.COLUMNS) for row in rows)
    assert not any(cell[:1] in ("=", "@", "+") for row in rows[1:] for cell in row)


def test_plain_text_of_a_hostile_report_moves_no_cursor(hostile: Report) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", console.text(hostile))
    assert re.sub(r"\x1b\[[0-9;]*m", "", console.coloured(hostile, width=120)).count("\x1b") == 0


def test_jsonl_holds_the_whole_report_line_by_line(sample: tuple[str, Report]) -> None:
    lines = [json_module.loads(line) for line in jsonl.render(sample[1]).splitlines()]
    assert lines[0].pop("kind") == "report"
    runs = [{k: v for k, v in line.items() if k not in ("kind", "index")} for line in lines[1:]]
    assert codec.from_plain(Report, {**lines[0], "runs": runs}) == sample[1]


def test_json_comes_back_as_the_same_report(sample: tuple[str, Report], hostile: Report) -> None:
    for report in (sample[1], hostile):
        assert codec.from_json(Report, codec.to_json(report)) == report


def test_an_unknown_table_is_shown_as_it_is(sample: tuple[str, Report]) -> None:
    tables = {
        "checks": [{"what": "loads again", "passed": True, "error": 1.5e-7}, {"what": "same outputs", "passed": None}],
        "sizes": {"before_bytes": 10},
    }
    text = console.text(replace(sample[1], tables=tables))
    assert "Checks" in text
    assert "loads again" in text
    assert "before bytes  10" in text


def test_clean_is_one_printable_line() -> None:
    assert clean("a\x1b[2Jb\r\nc\x00") == "a\N{REPLACEMENT CHARACTER}[2Jb c\N{REPLACEMENT CHARACTER}"
    assert clean("x" * 1000) == "x" * 399 + "…"


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120, 140])
def test_rows_that_differ_in_their_changes_alone_can_be_told_apart_at_any_width(width: int) -> None:
    """Two runs of one backend: what else a narrow page leaves out, it says which is which."""
    found = codec.read_json(Report, GOLDEN / "bench.json")
    first = found.runs[0]
    changed = ("no_mask", "fuse_linears", "gelu_epilogue:tanh", "attention:cudnn")
    runs = (first, replace(first, transforms=changed[:1]), replace(first, transforms=changed), replace(first, input_mode="host"))
    text = console.text(replace(found, runs=runs), width=width)
    table = text[text.index("\nSpeed") : text.index("ceiling:", text.index("\nSpeed"))]
    assert "fuse_linears" in table and "attention:cudnn" in table and table.count("no_mask") == 2, table
    assert "host" in table, table
    assert all(len(line) <= width for line in table.splitlines())
