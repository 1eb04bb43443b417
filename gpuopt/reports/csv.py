"""Report -> CSV: one row a run, raw numbers with the unit in the column's name."""

from __future__ import annotations

import csv
import io

from gpuopt.core.result import Report, Run
from gpuopt.reports.content.naming import dims_label
from gpuopt.reports.figures import clean

COLUMNS = (
    "model",
    "backend",
    "preset",
    "precision",
    "transforms",
    "dims",
    "input_mode",
    "status",
    "reason",
    "median_ms",
    "p95_ms",
    "samples_per_s",
    "flops",
    "flop_coverage",
    "tflops",
    "pct_of_measured",
    "pct_of_sustained",
    "pct_of_spec",
    "peak_bytes",
    "energy_j_per_sample",
    "compile_s",
    "cold_start_s",
    "accuracy_passed",
    "relative_rmse",
)


def render(report: Report) -> str:
    """What is missing is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in report.runs:
        writer.writerow([_cell(value) for value in _row(run)])
    return out.getvalue()


def _row(run: Run) -> tuple[object, ...]:
    stats, accuracy = run.latency_ms, run.accuracy
    return (
        run.model,
        run.backend,
        run.preset,
        run.precision,
        " ".join(run.transforms),
        dims_label(run),
        run.input_mode,
        run.status.value,
        run.reason,
        stats.median if stats else None,
        stats.p95 if stats else None,
        run.samples_per_s,
        run.flops,
        run.flop_coverage,
        run.tflops,
        run.pct_of_measured,
        run.pct_of_sustained,
        run.pct_of_spec,
        run.peak_bytes,
        run.energy_j_per_sample,
        run.compile_s,
        run.cold_start_s,
        accuracy.passed if accuracy else None,
        accuracy.relative_rmse if accuracy else None,
    )


def _cell(value: object) -> object:
    """A spreadsheet runs text that begins like a formula: such text gets a quote in front."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
