"""Report -> JSON: all of it, keys sorted, as docs/report.schema.json describes."""

from __future__ import annotations

from gpuopt.core import codec
from gpuopt.core.result import Report


def render(report: Report) -> str:
    """The same report gives the same bytes."""
    return codec.to_json(report, indent=1)
