"""A device id -> what is here: the survey of the machine with its ceilings, and every backend with the way to it or the reason why there is none. Nothing is built."""

from __future__ import annotations

from dataclasses import replace

from gpuopt import backends, loaders
from gpuopt.backends import load_backend
from gpuopt.core.errors import GpuoptError, Unavailable, UsageError
from gpuopt.core.live import Model
from gpuopt.core.result import Device
from gpuopt.core.spec import Candidate, Precision
from gpuopt.devices import ceilings as measured_ceilings
from gpuopt.devices import info
from gpuopt.pipeline import environment, facts, route
from gpuopt.pipeline.facts import ProgressCall


def survey(device_id: str, refresh: bool, ceilings: bool, progress: ProgressCall) -> facts.Survey:
    """Environment and device, with measured and data-sheet ceilings."""
    device = info.describe(info.resolve(device_id))
    if ceilings:
        found = measured_ceilings.all_ceilings(
            device,
            refresh=refresh,
            progress=lambda share, note: progress(share, f"measuring its ceilings: {note}" if note else ""),
        )
        device = replace(device, ceilings=found)
    return facts.Survey(environment=environment.describe(), device=device)


def matrix(device_id: str, candidate: Candidate | None = None, *, model: Model | None = None) -> facts.Matrix:
    """Every backend, for this model where one is named or given: the way to it, or the reason why there is none."""
    where = info.resolve(device_id)
    device = info.describe(where)
    if candidate is not None:
        model = loaders.load(candidate.model)
    cells = tuple(_cell(name, model.form if model else None, device) for name in backends.listed())
    return facts.Matrix(
        environment=environment.describe(),
        device=device,
        cells=cells,
        form=model.form if model else None,
        model=model.name if model else None,
    )


def require_preset(name: str, preset: str) -> None:
    """Raises UsageError for a preset that there is none of. A library that is missing says so when it is built with."""
    try:
        known = tuple(load_backend(name).PRESETS)
    except Unavailable:
        return
    if preset not in known:
        raise UsageError(f"{name} has no preset {preset!r}", fix="one of: " + ", ".join(known) if known else "leave it away")


def _cell(name: str, form: str | None, device: Device) -> facts.MatrixCell:
    """One row of the matrix; nothing is built."""
    way, reason = "", ""
    presets: tuple[str, ...] = ()
    precisions_: dict[str, str] = {}
    try:
        backend = load_backend(name)
        presets = tuple(backend.PRESETS)
        way = route.find(form, backend, name) if form is not None else ""
        reached = "onnx" if way == "via ONNX" else form or next(iter(sorted(backend.FORMS)))
        reason = backend.available(device.id) or ""
        for precision in Precision:
            lacks = info.supports(device, precision) or info.supports(device, precision.carrier)
            precisions_[precision.value] = lacks or backend.supports(reached, precision, device.id) or ""
        if not reason and all(precisions_.values()):
            reason = precisions_[Precision.FP32.value]
    except GpuoptError as error:
        reason = error.message + (f" ({error.fix})" if error.fix else "")
    return facts.MatrixCell(
        backend=name, summary=backends.SUMMARY.get(name, ""), route=way, reason=reason, presets=presets, precisions=precisions_
    )
