"""GPU201: something is in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpuopt.core import units
from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import Change, Precision
from gpuopt.doctor import modules, recast, sources, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.modules import Held
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

MOST = 5
"""Modules named one by one."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """Findings for the model's tensors by module, one for the inputs, else one for the ops: the first is a cause of the others and carries the price."""
    rows = [r for r in evidence.records if r.dtype == "float64" and r.time_ns]
    found = [*_in_model(evidence), *_in_inputs(evidence)]
    found = found or [*_in_ops(evidence, rows)]
    for index, finding in enumerate(found):
        yield _priced(evidence, finding, rows) if index == 0 else finding


def _in_model(evidence: Evidence) -> Iterator[Finding]:
    """fp64 tensors with dimensions; those without do not promote others, and a wholly fp64 model that was asked to run in another format is no finding."""
    held = [
        h for h in modules.tensors(evidence.module) if modules.dtype(h.tensor) == "float64" and h.tensor.dim() and _is_used(evidence, h)
    ]
    is_whole = modules.own_dtype(evidence.module) == "float64"
    if not held or (is_whole and modules.running(evidence, "float64") != "float64"):
        return
    if is_whole:
        yield _held(evidence, held, "", "model.float() before .to('cuda')")
        return
    owners: dict[str, list[Held]] = {}
    for h in held:
        owners.setdefault(h.owner, []).append(h)
    order = sorted(owners, key=lambda name: -sum(h.tensor.numel() for h in owners[name]))
    for name in order[:MOST]:
        which = words.listed(h.attribute for h in owners[name])
        yield _held(
            evidence,
            owners[name],
            name,
            f"make {which} float32 where it is set: numpy's arrays are float64 unless array.astype('float32') says otherwise",
        )
    rest = [h for name in order[MOST:] for h in owners[name]]
    if rest:
        yield _held(evidence, rest, modules.common(h.owner for h in rest), "as above, for each")


def _held(evidence: Evidence, held: list[Held], module: str, fix: str) -> Finding:
    size = float(sum(h.tensor.numel() * h.tensor.element_size() for h in held))
    kinds = {h.kind for h in held}
    kind = {"plain": "attribute", "unregistered": "parameter"}.get(held[0].kind, held[0].kind) if len(kinds) == 1 else "tensor"
    return Finding(
        code="",
        severity="warning",
        message=f"{words.number(len(held), kind)} in float64 ({units.format_bytes(size)}): {words.listed(h.name for h in held)}",
        fix=fix,
        module=module,
        line=modules.line(evidence.module, module),
        count=len(held),
        bytes=size,
        change=Change(precision=Precision.FP32),
    )


def _in_inputs(evidence: Evidence) -> Iterator[Finding]:
    names = [(name, t) for name, t in modules.inputs(evidence) if modules.dtype(t) == "float64" and t.dim()]
    own = modules.own_dtype(evidence.module)
    if not names or own == "float64":
        return
    size = float(sum(t.numel() * 8 for _, t in names))
    yield Finding(
        code="",
        severity="warning",
        message=f"{words.number(len(names), 'input')} in float64 ({units.format_bytes(size)} a call): {words.listed(n for n, _ in names)}; the model {'is ' + own if own else 'has no parameters'}",
        fix=f"{names[0][0]} = {names[0][0]}.to(torch.{own or 'float32'}); numpy makes float64: array.astype('float32')"
        if names[0][0].isidentifier()
        else "cast it to torch.float32; numpy makes float64: array.astype('float32')",
        count=len(names),
        bytes=size,
    )


def _in_ops(evidence: Evidence, rows: list[OpRecord]) -> Iterator[Finding]:
    if not rows or (evidence.precision == "fp64" and modules.own_dtype(evidence.module) != "float32"):
        return
    worst = max(rows, key=lambda r: r.time_ns or 0.0)
    places = words.listed(f"{r.op} in {r.module or 'the root'}" for r in rows)
    yield Finding(
        code="",
        severity="warning",
        message=f"{words.number(len(rows), 'op')} in float64 though no weight or input is: {places}",
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
    finding = replace(finding, time_ms=time_ms, message=f"{finding.message}; {words.ms(time_ms)} in float64 ops{ratio}")
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
    has_change=True,
)
