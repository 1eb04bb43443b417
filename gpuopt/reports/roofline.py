"""Report -> what a roofline shows: which points, under which ceilings. Pure; drawn by plots.py and by the page's own script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gpuopt.core.result import CEILING_OF_DTYPE, Ceiling, Ceilings, Report, RooflinePoint, Run
from gpuopt.reports.content import naming
from gpuopt.reports.figures import clean

KINDS = ("measured", "sustained", "spec")
"""Kinds of ceiling, in the order they are drawn and named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One roofline."""

    title: str
    """What all its points belong to: the run's label, or "" where the report has one."""
    points: tuple[RooflinePoint, ...]
    """In the report's order; whichever lack a time lie nowhere."""
    compute: tuple[Ceiling, ...]
    """FLOP/s, of the dtypes that occur."""
    bandwidth: tuple[Ceiling, ...]
    """Bytes a second, of the device's memory."""
    is_runs: bool = False
    """Each point is a whole run, by its median, not an op."""

    @property
    def computing(self) -> tuple[RooflinePoint, ...]:
        """Points with a place on the roofline proper: FLOPs, bytes and a time, all above zero."""
        return tuple(p for p in self.points if _positive(p.time_ns) and _positive(p.flops) and _positive(p.bytes))

    @property
    def moving(self) -> tuple[RooflinePoint, ...]:
        """Points without FLOPs (known to be none, not unknown) that move bytes: held against the bandwidth alone."""
        return tuple(p for p in self.points if _positive(p.time_ns) and p.flops == 0 and _positive(p.bytes))


def _positive(value: float | None) -> bool:
    return value is not None and value > 0 and math.isfinite(value)


def pictures(report: Report) -> tuple[Picture, ...]:
    """One of the ops of each profiled run; else one with the runs as points; else the ceilings alone, where a device has any."""
    if report.verb == "compare":  # it holds differences, no points
        return ()
    if len(report.devices) > 1:  # a point lies under the ceilings of its own device
        mine = [
            (device, replace(report, device=device, devices=(device,), runs=tuple(run for run in report.runs if run.device == device.id)))
            for device in report.devices
        ]
        return tuple(
            replace(picture, title=" · ".join(part for part in (clean(device.id), picture.title) if part))
            for device, one in mine
            if one.runs
            for picture in pictures(one)
        )
    ceilings = report.device.ceilings if report.device else Ceilings()
    profiled = [run for run in report.runs if run.roofline]
    if profiled:
        name = naming.labels(report.runs)
        return tuple(_picture(name(run) if len(profiled) > 1 else "", run.roofline, ceilings) for run in profiled)
    runs = tuple(point for run in report.runs if (point := _of_run(run, naming.labels(report.runs)(run), ceilings)) is not None)
    if runs:
        return (_picture("", runs, ceilings, is_runs=True),)
    compute = _rows(ceilings, [row.quantity for row in ceilings.rows if row.unit == "FLOP/s"])
    if compute:
        return (Picture(title="", points=(), compute=compute, bandwidth=_rows(ceilings, ["memory"])),)
    return ()


def _picture(title: str, points: Sequence[RooflinePoint], ceilings: Ceilings, *, is_runs: bool = False) -> Picture:
    quantities = dict.fromkeys(_quantity(p.dtype) for p in points if p.flops and p.dtype)
    return Picture(
        title=title,
        points=tuple(points),
        compute=_rows(ceilings, quantities),
        bandwidth=_rows(ceilings, ["memory"]),
        is_runs=is_runs,
    )


def _quantity(dtype: str | None) -> str:
    return CEILING_OF_DTYPE.get(dtype or "", dtype or "")


def _rows(ceilings: Ceilings, quantities: Iterable[str]) -> tuple[Ceiling, ...]:
    found = (ceilings.find(quantity, kind) for quantity in dict.fromkeys(quantities) for kind in KINDS)
    return tuple(row for row in found if row is not None and _positive(row.value))


def _of_run(run: Run, label: str, ceilings: Ceilings) -> RooflinePoint | None:
    """A whole run as a point: bytes are each op's own, so its intensity is the one before any fusion."""
    if run.latency_ms is None or not _positive(run.latency_ms.median) or not _positive(run.flops) or not _positive(run.bytes):
        return None
    assert run.flops is not None and run.bytes is not None
    quantity = naming.compute_quantity(run)
    peak, bandwidth = ceilings.flops(quantity, "measured"), ceilings.bandwidth("measured")
    bound = "unknown"
    if peak and bandwidth:
        bound = "compute" if run.flops / peak >= run.bytes / bandwidth else "memory"
    return RooflinePoint(
        name=label,
        module=clean(run.model, 60),
        dtype=quantity,
        count=1,
        time_ns=run.latency_ms.median * 1e6,
        flops=run.flops,
        bytes=run.bytes,
        intensity=run.flops / run.bytes,
        bound=bound,
        pct_of_ceiling=run.pct_of_measured,
        ceiling=f"{quantity} measured" if quantity and run.pct_of_measured is not None else "",
    )
