"""Format name -> `package.module:render`. A renderer takes a Report (and a View, where it shows a choice of it) and returns text."""

from __future__ import annotations

FORMATS = {
    "console": "gpuopt.reports.console:text",
    "json": "gpuopt.reports.json:render",
    "jsonl": "gpuopt.reports.jsonl:render",
    "markdown": "gpuopt.reports.markdown:render",
    "html": "gpuopt.reports.html:render",
    "junit": "gpuopt.reports.junit:render",
    "github": "gpuopt.reports.github:render",
    "csv": "gpuopt.reports.csv:render",
    "svg": "gpuopt.reports.svg:render",
    "perfetto": "gpuopt.reports.perfetto:render",
}

WITH_VIEW = frozenset({"console", "markdown", "html"})
"""Formats for people: they show a choice of the report, which a View sets."""
