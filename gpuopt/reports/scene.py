"""Report -> plain data for the page's script: points, ceilings, modules and curves. Every text is cleaned, every number short.

Rows are arrays in the order of the names given beside them, texts are indices into one list: ten thousand modules stay within a megabyte or two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from gpuopt.core.result import Ceiling, ModuleRow, Report, RooflinePoint, Run, Stats
from gpuopt.reports import roofline
from gpuopt.reports.batches import curves
from gpuopt.reports.content import naming
from gpuopt.reports.figures import clean

POINT = ("name", "module", "dtype", "count", "time", "flops", "bytes", "bound", "pct", "ceiling", "floor", "note")
MODULE = ("name", "class", "time", "flops", "bytes", "parameters", "pct")


def scene(report: Report) -> dict[str, Any]:
    """What the script draws from; empty lists where there is nothing."""
    words: dict[str, int] = {}

    def word(text: object, limit: int = 160) -> int:
        return words.setdefault(clean(text, limit), len(words))

    rooflines = [
        {
            "title": picture.title,
            "isRuns": picture.is_runs,
            "points": [_point(p, word) for p in picture.points],
            "compute": [_ceiling(row) for row in picture.compute],
            "bandwidth": [_ceiling(row) for row in picture.bandwidth],
        }
        for picture in roofline.pictures(report)
        if picture.points
    ]
    return {
        "rooflines": rooflines,
        "trees": [_tree(run, label, word) for run, label in profiled(report) if run.modules or run.roofline],
        "curves": _curves(report),
        "pointFields": POINT,
        "moduleFields": MODULE,
        "words": list(words),
    }


def profiled(report: Report) -> list[tuple[Run, str]]:
    """Runs with ops or modules, and what tells them apart."""
    runs = [run for run in report.runs if run.roofline or run.modules]
    name = naming.labels(report.runs)
    return [(run, name(run) if len(runs) > 1 else "") for run in runs]


def to_script(data: Any) -> str:
    """JSON that may stand inside a <script> element: ASCII, and nothing in it that could end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _point(point: RooflinePoint, word: Callable[..., int]) -> list[Any]:
    bound = point.bound if point.bound in ("compute", "memory") else "unknown"
    return [
        word(point.name),
        word(point.module, 300),
        word(point.dtype or ""),
        point.count,
        _short(point.time_ns),
        _short(point.flops),
        _short(point.bytes),
        word(bound),
        _short(point.pct_of_ceiling, 4),
        word(point.ceiling),
        _short(point.floor_ns),
        word(point.note, 300),
    ]


def _module(row: ModuleRow, word: Callable[..., int]) -> list[Any]:
    return [
        word(row.name, 300),
        word(row.module_class),
        _short(row.time_ns),
        _short(row.flops),
        _short(row.bytes),
        row.num_parameters,
        _short(row.pct_of_ceiling, 4),
    ]


def _tree(run: Run, label: str, word: Callable[..., int]) -> dict[str, Any]:
    return {
        "title": label,
        "root": clean(run.model, 60),
        "modules": [_module(row, word) for row in run.modules],
        "ops": [_point(point, word) for point in run.roofline if point.time_ns],
    }


def _ceiling(row: Ceiling) -> dict[str, Any]:
    kind = row.kind if row.kind in roofline.KINDS else "spec"
    return {"quantity": clean(row.quantity, 20), "kind": kind, "value": _short(row.value), "source": clean(row.source, 200)}


def _curves(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "label": curve.label,
            "dim": clean(curve.dim, 20),
            "rows": [
                [size, _short(run.samples_per_s), _short(run.tflops), *_spread(run.latency_ms, run.samples_per_s)]
                for size, run in curve.runs
            ],
            "lost": [[size, clean(run.status.value)] for size, run in curve.lost],
            "ceilings": [_ceiling(row) for row in curve.ceilings],
        }
        for curve in curves(report)
    ]


def _spread(stats: Stats | None, rate: float | None) -> list[float | None]:
    """The 95% interval of the median time, as rates: lower, upper."""
    if stats is None or rate is None or not stats.ci95_low or not stats.ci95_high or stats.median <= 0:
        return [None, None]
    return [_short(rate * stats.median / stats.ci95_high), _short(rate * stats.median / stats.ci95_low)]


def _short(value: float | None, digits: int = 6) -> float | int | None:
    """Six digits; what is no finite number is missing."""
    if value is None or not math.isfinite(value):
        return None
    number = float(f"{value:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
