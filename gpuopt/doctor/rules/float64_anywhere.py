"""GPU201: something is in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpuopt.core import units
from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import Change, Precision
from gpuopt.doctor import modules, recast, sources
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.modules import Held
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for the model's tensors, else one for the inputs, else one for the ops: the first of them is the cause of the others and carries the price."""
    rows = [r for r in evidence.records if r.dtype == "float64" and r.time_ns]
    found = [f for f in (_in_model(evidence), _in_inputs(evidence)) if f is not None]
    if not found:
        inside = _in_ops(evidence, rows)
        found = [inside] if inside is not None else []
    for index, finding in enumerate(found):
        yield _priced(evidence, finding, rows) if index == 0 else finding


def _in_model(evidence: Evidence) -> Finding | None:
    """fp64 tensors with dimensions; those without do not promote others, and a wholly fp64 model that was asked to run in another format is no finding."""
    held = [
        h for h in modules.tensors(evidence.module) if modules.dtype(h.tensor) == "float64" and h.tensor.dim() and _is_used(evidence, h)
    ]
    is_whole = modules.own_dtype(evidence.module) == "float64"
    if not held or (is_whole and modules.running(evidence, "float64") != "float64"):
        return None
    size = float(sum(h.tensor.numel() * h.tensor.element_size() for h in held))
    kind = (
        "parameter or buffer"
        if any(h.kind == "parameter" for h in held)
        else "buffer"
        if any(h.kind == "buffer" for h in held)
        else "attribute"
    )
    first = held[0]
    return Finding(
        code="",
        severity="warning",
        message=f"in float64: {modules.number(len(held), kind)}, {units.format_bytes(size)}: {modules.listed(h.name for h in held)}",
        fix="model.float() before .to('cuda')"
        if is_whole
        else f"{first.name}: make it torch.float32 (numpy's default is float64: array.astype('float32'))",
        module=first.owner,
        line=modules.line(evidence.module, first.owner),
        count=len(held),
        bytes=size,
        change=Change(precision=Precision.FP32),
    )


def _in_inputs(evidence: Evidence) -> Finding | None:
    names = [(name, t) for name, t in modules.inputs(evidence) if modules.dtype(t) == "float64" and t.dim()]
    own = modules.own_dtype(evidence.module)
    if not names or own == "float64":
        return None
    size = float(sum(t.numel() * 8 for _, t in names))
    return Finding(
        code="",
        severity="warning",
        message=f"in float64: {modules.number(len(names), 'input')}, {units.format_bytes(size)} a call: {modules.listed(n for n, _ in names)}; the model is {own or 'without parameters'}",
        fix=f"{names[0][0]} = {names[0][0]}.to(torch.{own or 'float32'}); numpy makes float64: array.astype('float32')"
        if names[0][0].isidentifier()
        else "cast it to torch.float32; numpy makes float64: array.astype('float32')",
        count=len(names),
        bytes=size,
    )


def _in_ops(evidence: Evidence, rows: list[OpRecord]) -> Finding | None:
    if not rows or (evidence.precision == "fp64" and modules.own_dtype(evidence.module) != "float32"):
        return None
    worst = max(rows, key=lambda r: r.time_ns or 0.0)
    places = modules.listed(f"{r.op} in {r.module or 'the root'}" for r in rows)
    return Finding(
        code="",
        severity="warning",
        message=f"{modules.number(len(rows), 'op')} in float64 though no weight or input is: {places}",
        fix="find the .double() or the float64 constant in their forward and make it float32",
        module=worst.module,
        line=worst.line or modules.line(evidence.module, worst.module),
        op=worst.op,
        count=sum(r.count for r in rows),
    )


def _priced(evidence: Evidence, finding: Finding, rows: list[OpRecord]) -> Finding:
    """At the fp32 ceiling of this GPU: half the bytes, and 2 (data centre) to 64 (consumer) times the FLOPs a second."""
    if not rows:
        return finding
    time_ms = recast.total_ms(rows)
    ceilings = evidence.device.ceilings if evidence.device is not None else None
    slow, fast = (ceilings.flops(d, "measured") if ceilings else None for d in ("float64", "float32"))
    ratio = f"; fp32 is {fast / slow:.3g} times as fast here" if slow and fast and fast > slow else ""
    finding = replace(finding, time_ms=time_ms, message=f"{finding.message}; {time_ms:.3g} ms in float64 ops{ratio}")
    return priced(finding, recast.saved_ms(evidence, rows, "float32"), wall_ms=evidence.wall_ms)


def _is_used(evidence: Evidence, h: Held) -> bool:
    """A bare attribute counts where forward reads it."""
    if h.kind in ("parameter", "buffer"):
        return True
    part = modules.parts(evidence.module).get(h.owner)
    return bool(sources.uses(part, h.attribute))


RULE = Rule(
    code="GPU201",
    name="float64-anywhere",
    what="A parameter, buffer, input or op is in float64.",
    why="One float64 tensor makes everything computed from it float64: twice the bytes, and half (data centre) to a 64th (consumer GPUs) of the fp32 rate, without tensor cores.",
    before="self.mean = torch.from_numpy(numpy.array([0.485, 0.456, 0.406]))",
    after="self.mean = torch.tensor([0.485, 0.456, 0.406])  # float32",
    safe=False,
    needs=frozenset({"module"}),
    find=find,
    source="CUDA C++ programming guide, arithmetic throughput; ceilings measured by gpuopt device",
)
