"""A trace from somebody's production job -> Report: waterfall, kernels, and what the doctor finds without their model. `gpuopt profile --trace FILE`.

Nothing is run and nothing is timed here: the wall time is the traced one, which is longer than the job's own, and everything that rests on it says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpuopt.core import kernels as kernel_names
from gpuopt.core.progress import Progress
from gpuopt.core.result import SCHEMA_VERSION, Ceilings, Count, Device, OpRecord, Report, RooflinePoint, Run
from gpuopt.core.spec import Job
from gpuopt.core.trace import Trace
from gpuopt.devices import peaks
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Evidence
from gpuopt.pipeline import environment, machine, tables
from gpuopt.profiling import attribute, roofline, waterfall
from gpuopt.profiling.foreign import MAX_BYTES, MAX_EVENTS, Foreign, read_foreign, uncollected

BACKEND = "trace"
"""In the place of a backend: nobody knows what ran."""
NOTHING_COUNTED = Count(records=(), flops=0.0, flops_by_dtype={}, bytes=0.0, coverage=0.0, method="none: a trace without its model")


def explain(
    path: Path,
    here: Device | None = None,
    *,
    command: str = "",
    ignore: Collection[str] = (),
    max_bytes: int = MAX_BYTES,
    max_events: int = MAX_EVENTS,
) -> Report:
    """One run, of backend `trace`: waterfall of the mean traced call, roofline of its ops, and `tables["kernels"]`, longest first.

    Parameters
    ----------
    here: this machine's device with its ceilings. They hold for the trace where it was taken on a device of the same name; else the data sheet's do, by the name in the file.
    ignore: codes or names of rules that stay silent. max_bytes, max_events: see `profiling.foreign.read_foreign`, whose BadInput passes through.
    """
    with uncollected():
        return explained(read_foreign(path, max_bytes=max_bytes, max_events=max_events), path, here, command=command, ignore=ignore)


def explained(foreign: Foreign, path: Path, here: Device | None = None, *, command: str = "", ignore: Collection[str] = ()) -> Report:
    """The same of a trace that has been read. `path`: for its name alone."""
    trace = foreign.trace
    device, notes = _device(foreign, here)
    wall_ms = mean_span_ms(trace)
    ceilings = device.ceilings
    records, points, refused = priced(trace, ceilings)
    parts = waterfall.build(trace, wall_ms, ceilings, records, is_traced=True)
    findings = diagnose(
        Evidence(
            # Another maker's GPU is judged by no rule that knows NVIDIA's.
            device=device if foreign.vendor in ("nvidia", "") else None,
            model=path.name,
            backend=BACKEND,
            wall_ms=wall_ms,
            trace=trace,
            records=records,
            waterfall=parts,
        ),
        ignore=ignore,
    )
    run = Run(
        model=path.name,
        backend=BACKEND,
        input_source="a trace from elsewhere",
        wall_ms=wall_ms,
        waterfall=parts,
        roofline=points,
        notes=(
            f"wall time is the mean of {_calls(trace)} as traced: tracing makes the host slower, so waits and gaps are upper bounds, and nothing here is a latency",
            *notes,
            *trace.notes,
            *told(trace),
            *refused,
        ),
        reproduce=f"gpuopt profile --trace {shlex.quote(path.name)}",
    )
    return Report(
        schema_version=SCHEMA_VERSION,
        command=command or run.reproduce,
        verb="profile",
        environment=environment.describe(),
        device=device,
        runs=(run,),
        findings=findings,
        tables={**tables_of(trace), "trace": {"events": foreign.num_events, "calls": len(trace.steps), **foreign.facts}},
    )


def same_here(device: Device | None, job: Job, progress: Progress) -> Device | None:
    """This machine's device with its ceilings, where it is one like the trace's; None where it is not, and then nothing is measured."""
    if device is None or device.kind != "cuda" or not torch.cuda.device_count():
        return None
    here = machine.survey(job, progress, ceilings=False).device
    return machine.survey(job, progress).device if (here.kind, here.name) == (device.kind, device.name) else None


def mean_span_ms(trace: Trace) -> float:
    """Mean length of a traced call, in milliseconds; 0 without steps."""
    return sum(step.dur_ns for step in trace.steps) / len(trace.steps) / 1e6 if trace.steps else 0.0


def tables_of(trace: Trace) -> dict[str, Any]:
    """`kernels`, and where the trace has them `lines`, `devices` and `communication`."""
    wire, busy, lines = tables.communication(trace), tables.devices(trace), tables.lines(trace)
    found: dict[str, Any] = {"kernels": tables.kernels(trace)}
    if lines:
        found["lines"] = lines
    if len(busy) > 1:
        found["devices"] = busy
    if wire is not None:
        found["communication"] = wire
    return found


def told(trace: Trace) -> list[str]:
    """What the tables show, in words: graphs, compiled regions, communication, devices."""
    notes: list[str] = []
    share = tables.replayed(trace)
    if share >= 0.5:
        notes.append(
            f"{100 * share:.0f}% of the kernel time was replayed from CUDA graphs: a trace does not say which op or module launched a replayed kernel, "
            "and the tracer makes a graph's launch longer than it is without it"
        )
    regions = tables.compiled(trace)
    if regions is not None:
        count = regions["regions"]
        notes.append(
            f"torch.compile: {count:.3g} compiled region{'s' if count != 1 else ''} a call, {regions['pct']:.0f}% of the kernel time in "
            + ("them" if count != 1 else "it")
            + (": more than one is a graph break each" if count > 1 else "")
        )
    wire = tables.communication(trace)
    if wire is not None:
        notes.append(
            f"communication: {wire['kernels']:.3g} collectives a call, {wire['time_ms']:.3g} ms, of which {wire['exposed_ms']:.3g} ms with nothing else running "
            "(a collective waits for the slowest rank inside its kernel; the waterfall has it under `other compute`)"
        )
    busy = tables.devices(trace)
    if len(busy) > 1:
        listed = ", ".join(f"{row['device']}: {row['busy_ms']:.3g} ms" for row in busy)
        notes.append(f"busy a call by device, of {mean_span_ms(trace):.3g} ms: {listed}")
    return notes


def _calls(trace: Trace) -> str:
    return f"{len(trace.steps)} call{'s' if len(trace.steps) != 1 else ''}"


def _device(foreign: Foreign, here: Device | None) -> tuple[Device, list[str]]:
    """What the trace was taken on, with the ceilings that hold there, and why those."""
    device = foreign.device
    if not foreign.trace.on_device:
        name = "a CPU the trace does not name"
        return Device(id="cpu", name=name, kind="cpu"), ["no ceilings: a trace does not say on which CPU it was taken"]
    if device is None:
        name = "a GPU the trace does not name"
        return Device(id=foreign.trace.device, name=name, kind="cuda"), [
            "no ceilings: the trace has no deviceProperties, so nobody knows on which GPU it was taken"
        ]
    if here is not None and here.kind == device.kind and here.name == device.name and here.ceilings.rows:
        # The trace's own id stays: what else is known of this machine's device today was not true of that one then.
        return replace(device, ceilings=here.ceilings, cache_bytes=here.cache_bytes), [
            f"ceilings are this machine's, whose device is {device.name} too"
        ]
    found = peaks.spec_ceilings(device)
    if found.rows:
        return replace(device, ceilings=found), [
            f"ceilings are the data sheet's of {device.name}, by the name in the trace: none was measured there"
        ]
    return replace(device, ceilings=found), [f"no ceilings: {note}" for note in found.notes]


def priced(trace: Trace, ceilings: Ceilings) -> tuple[tuple[OpRecord, ...], tuple[RooflinePoint, ...], list[str]]:
    """Records with points; FLOPs that the ceilings show to be impossible are taken back, for here nobody counted them: they come from recorded shapes."""
    records: list[OpRecord] = []
    points: list[RooflinePoint] = []
    refused: list[str] = []
    for record in map(_in_tf32, attribute.attribute(trace, NOTHING_COUNTED)):
        try:
            found = roofline.points([record], ceilings, cache_bytes=None)
        except roofline.ImpossibleFigure as error:
            refused.append(str(error))
            record = replace(record, flops=None, bytes=None)
            found = roofline.points([record], ceilings, cache_bytes=None)
        records.append(record)
        points += found
    notes = (
        [f"FLOPs of {len(refused)} ops were taken back, as their recorded shapes do not fit their times; the first: {refused[0]}"]
        if refused
        else []
    )
    return tuple(records), tuple(points), notes


def _in_tf32(record: OpRecord) -> OpRecord:
    """fp32 products that ran in TF32 by the names of their kernels: a trace does not record the switch."""
    if record.dtype == "float32" and record.flops and "tf32" in {kernel_names.dtype(name) for name in record.kernels}:
        return replace(record, dtype="tf32")
    return record
