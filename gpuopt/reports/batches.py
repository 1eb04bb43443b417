"""Runs that differ in one size alone -> curves over it: samples/s and TFLOP/s, against the ceilings. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpuopt.core.result import Ceiling, Ceilings, Report, Run, Status
from gpuopt.reports.content import naming
from gpuopt.reports.roofline import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One candidate at several sizes."""

    label: str
    dim: str
    """The dimension that varies: `N`, `S`."""
    runs: tuple[tuple[int, Run], ...]
    """(size, run), smallest first; timed runs alone."""
    lost: tuple[tuple[int, Run], ...]
    """(size, run) that gave no result: the end of a curve is often out of memory."""
    ceilings: tuple[Ceiling, ...]
    """FLOP/s of the precision the runs are held against."""


def curves(report: Report) -> tuple[Curve, ...]:
    """One for each candidate with at least two timed sizes of one dimension, all else equal."""
    sizes = [(_sizes(run), run) for run in report.runs]
    found = []
    for dim in dict.fromkeys(name for dims, _ in sizes for name in dims):
        groups: dict[tuple[object, ...], list[tuple[int, Run]]] = {}
        for dims, run in sizes:
            if dim in dims:
                rest = tuple(sorted((k, v) for k, v in dims.items() if k != dim))
                key = (run.model, run.backend, run.preset, run.precision, run.transforms, run.input_mode, run.device, rest)
                groups.setdefault(key, []).append((dims[dim], run))
        found += [curve for rows in groups.values() if (curve := _curve(dim, rows, _ceilings(report, rows[0][1]))) is not None]
    labels = naming.labels([_without(curve) for curve in found])
    return tuple(replace(curve, label=labels(_without(curve))) for curve in found)


def _ceilings(report: Report, run: Run) -> Ceilings:
    device = report.device_of(run)
    return device.ceilings if device else Ceilings()


def _sizes(run: Run) -> dict[str, int]:
    return run.dims or ({"N": run.batch} if run.batch is not None else {})


def _without(curve: Curve) -> Run:
    """Its first run without the size that varies: what the curve as a whole is named by."""
    _, run = curve.runs[0]
    return replace(run, dims={k: v for k, v in _sizes(run).items() if k != curve.dim}, batch=None)


def _curve(dim: str, rows: Sequence[tuple[int, Run]], ceilings: Ceilings) -> Curve | None:
    ordered = sorted(rows, key=lambda row: row[0])
    timed = tuple((size, run) for size, run in ordered if run.status == Status.OK and run.samples_per_s is not None and size > 0)
    if len({size for size, _ in timed}) < 2:
        return None
    lost = tuple((size, run) for size, run in ordered if run.status != Status.OK and size > 0)
    quantity = naming.compute_quantity(timed[0][1]) or ""
    known = tuple(row for kind in KINDS if (row := ceilings.find(quantity, kind)) is not None and row.value > 0)
    return Curve(label="", dim=dim, runs=timed, lost=lost, ceilings=known)
