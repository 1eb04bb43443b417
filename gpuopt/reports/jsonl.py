"""Report -> JSON Lines: one line for the report's head, one for each run, so that many reports can be put in one file and filtered by line."""

from __future__ import annotations

import json

from gpuopt.core import codec
from gpuopt.core.result import Report


def render(report: Report) -> str:
    """First `{"kind": "report", …}` without its runs, then one `{"kind": "run", "index": …}` for each run."""
    head = codec.dump(report)
    runs = head.pop("runs")
    lines = [{"kind": "report", **head}, *({"kind": "run", "index": index, **run} for index, run in enumerate(runs))]
    return "".join(json.dumps(line, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
