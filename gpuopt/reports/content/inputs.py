"""Runs -> what their model was called with: each input, where that comes from, and which sizes are accepted."""

from __future__ import annotations

from gpuopt.core.result import Report, Run
from gpuopt.reports.content.blocks import Block, Cell, Facts
from gpuopt.reports.content.naming import several_models
from gpuopt.reports.figures import clean

MOST = 3
"""Sizes of one input told one by one."""


def build(report: Report) -> list[Block]:
    """One block a model; nothing where no run names its inputs."""
    blocks: list[Block] = []
    models: dict[str, list[Run]] = {}
    for run in report.runs:
        if run.inputs:
            models.setdefault(run.model, []).append(run)
    for model, runs in models.items():
        suffix = f": {clean(model, 60)}" if several_models(report) else ""
        blocks.append(Facts(title=f"Inputs{suffix}", rows=tuple(_rows(runs))))
    return blocks


def _rows(runs: list[Run]) -> list[tuple[str, Cell]]:
    bound: dict[str, list[str]] = {}
    free: dict[str, str] = {}
    for run in runs:
        for text in run.inputs:
            name, kind = _split(text)
            if kind not in bound.setdefault(name, []):
                bound[name].append(kind)
        for text in run.signature:
            name, kind = _split(text)
            free.setdefault(name, kind)
    rows = []
    for name, kinds in bound.items():
        told = " · ".join(kinds[:MOST]) + (f" · {len(kinds) - MOST} more" if len(kinds) > MOST else "")
        declared = free.get(name, "")
        rows.append((name, Cell(told + (f"   of {declared}" if declared not in ("", *kinds) else ""))))
    first = runs[0]
    if first.input_source:
        rows.append(("from", Cell(clean(first.input_source, 200), "warn" if first.input_source.startswith("guess") else "dim")))
    ranges = {name: span for run in runs for name, span in run.dim_ranges.items()}
    if ranges:
        accepted = ", ".join(f"{clean(name, 20)} from {low} to {high}" for name, (low, high) in ranges.items())
        rows.append(("accepts", Cell(accepted, "dim")))
    return rows


def _split(text: str) -> tuple[str, str]:
    """`ids:int64[8,N]` -> its two halves."""
    name, found, kind = clean(text, 200).partition(":")
    return (name, kind) if found else ("", name)
