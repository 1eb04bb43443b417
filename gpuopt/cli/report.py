"""`gpuopt report FILE --format F`: a report written with --json -> any other format."""

from __future__ import annotations

import os
from pathlib import Path

from gpuopt.cli import options as o
from gpuopt.cli.streams import emit, require_writable, tell, write_whole
from gpuopt.core.errors import UsageError
from gpuopt.reports import FORMATS, WITH_VIEW

SUMMARY_LIMIT_BYTES = 1 << 20
"""GitHub refuses a longer step summary."""


def report(
    file: o.ReportArg,
    format: o.FormatOpt = "console",
    output: o.MaybeOutputOpt = None,
    depth: o.DepthOpt = 3,
    top: o.TopOpt = 10,
    by: o.ByOpt = "",
    sort: o.SortOpt = "time",
) -> int:
    """Show a report again, in any format: console, markdown, html (one file with its pictures, opens offline), svg (the roofline), perfetto (a
    timeline for ui.perfetto.dev), junit, github, csv, jsonl, json.

    Everything a command showed can be made again from what --json wrote. With --format github inside a GitHub job, the step summary gets the
    Markdown as well.

    Example: gpuopt report r.json --format html -o r.html
    """
    from gpuopt.cli.show import rendered
    from gpuopt.core import codec, registry
    from gpuopt.core.result import Report
    from gpuopt.reports.content.blocks import View

    view = View(depth=depth, top=top, by=by, sort=sort)
    render = registry.resolve(FORMATS, format, kind="format")
    if output is not None and output != "-":
        if Path(output).resolve() == Path(file).resolve():
            raise UsageError("the output is the report itself", fix="another -o")
        require_writable(Path(output))
    found = codec.read_json(Report, Path(file))
    if by and not any(run.roofline or run.modules for run in found.runs):
        tell(f"--by {by} has nothing to group: no run of this report was profiled (gpuopt profile --json writes one that was)\n")
    if format == "console" and output in (None, "-"):
        emit(rendered(found, view))
        return 0
    text = render(found, view) if format in WITH_VIEW else render(found)
    if output in (None, "-"):
        emit(text)
    else:
        write_whole(Path(str(output)), text)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if format == "github" and summary:
        _append(Path(summary), registry.resolve(FORMATS, "markdown", kind="format")(found, view))
    return 0


def _append(summary: Path, markdown: str) -> None:
    data = markdown.encode()
    room = SUMMARY_LIMIT_BYTES - (summary.stat().st_size if summary.exists() else 0)
    with summary.open("ab") as file:
        file.write(data if len(data) <= room else b"The report is too long for a step summary.\n"[: max(0, room)])
