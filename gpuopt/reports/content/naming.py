"""Run -> its name among others, its tone and the ceiling it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpuopt.core.result import CEILING_OF_DTYPE, Report, Run, Status
from gpuopt.reports.figures import clean


def run_label(run: Run, *, model: bool = True) -> str:
    """`resnet101 · inductor:freezing · fp16 · N=256 · host inputs`: a run alone, in full."""
    return " · ".join(part for name, part in _parts(run).items() if part and name != "device" and (model or name != "model"))


def labels(runs: Sequence[Run]) -> Callable[[Run], str]:
    """What tells these runs apart: a label without the parts that all of them share."""
    all_parts = [_parts(run) for run in runs]
    varying = {name for name in _parts(runs[0]) if len({parts[name] for parts in all_parts}) > 1} if runs else set()
    shown = varying or {"backend", "precision", "dims"}

    def label(run: Run) -> str:
        text = " · ".join(part for name, part in _parts(run).items() if part and name in shown)
        return text or backend_label(run)

    return label


def _parts(run: Run) -> dict[str, str]:
    return {
        "model": clean(run.model, 60),
        "backend": backend_label(run),
        "precision": clean(run.precision or ""),
        "changes": ", ".join(clean(t) for t in run.transforms),
        "dims": dims_label(run),
        "inputs": f"{clean(run.input_mode)} inputs" if run.input_mode != "device" else "",
        "device": f"on {clean(run.device)}" if run.device else "",
    }


def backend_label(run: Run) -> str:
    """`inductor:freezing`."""
    return clean(run.backend + (f":{run.preset}" if run.preset else ""), 60)


def dims_label(run: Run) -> str:
    """`N=8 S=128`; the batch alone where there are no named dimensions."""
    dims = run.dims or ({"N": run.batch} if run.batch is not None else {})
    return " ".join(f"{clean(k, 20)}={v}" for k, v in dims.items())


def status_tone(status: str) -> str:
    """A status -> the tone it is printed in."""
    if status == Status.OK:
        return "good"
    return "dim" if status in (Status.UNSUPPORTED, Status.ENV_MISSING, Status.SKIPPED, Status.CANCELLED) else "bad"


def compute_quantity(run: Run) -> str | None:
    """The ceiling a run's FLOPs are measured against: the precision asked for, else the dtype that carries most FLOPs."""
    if run.precision:
        return run.precision
    if run.flops_by_dtype:
        dtype = max(run.flops_by_dtype, key=lambda d: run.flops_by_dtype[d])
        return CEILING_OF_DTYPE.get(dtype, dtype)
    return None


def several_models(report: Report) -> bool:
    return len({run.model for run in report.runs}) > 1


def group(run: Run) -> tuple[Any, ...]:
    """Runs that answer the same question may be ranked against each other."""
    return (run.model, tuple(sorted(run.dims.items())), run.batch, _inputs_in(run.input_mode), run.device)


def base_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that `relative` of this one is against: the first that has times, of the same sizes, its inputs in the same memory."""
    sizes = (run.dims, run.batch, _inputs_in(run.input_mode), run.device)
    same = [r for r in runs if (r.dims, r.batch, _inputs_in(r.input_mode), r.device) == sizes and r.latency_ms is not None]
    return next((r for r in same if r.relative is None), None)


def _inputs_in(mode: str) -> str:
    """The memory that a call's inputs lie in; copied by each call or meanwhile, they begin on the host."""
    return "device" if mode == "device" else "host"
