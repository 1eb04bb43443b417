"""A Job with `stream` -> Report: plan, run, bench, verify or pack a model whose weights are streamed. The parent's side: models live in children."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpuopt.core import units
from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import GateResult, Report
from gpuopt.core.spec import Candidate, Job
from gpuopt.core.streamed import ACTIONS, StreamRequest, StreamRow
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.streamed import bench, rivals
from gpuopt.pipeline.streamed.arms import base, blocks_of, child, flat, measured, raise_if_all, report, run_of
from gpuopt.pipeline.streamed.facts import Answer, Checked, Meters, PackedFolder, Planned, Ready, Timed

NO_RIVAL = "none"


def stream(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt stream plan|run|bench|verify|pack MODEL`. Raises UsageError, whatever loading raises, and the planner's refusal where no budget could be met."""
    progress = progress or Silent()
    request = job.stream
    if request is None or request.action not in ACTIONS:
        raise UsageError("stream wants something to do", fix="gpuopt stream plan MODEL --budget 50%; one of: " + ", ".join(ACTIONS))
    if len(job.candidates) != 1:
        raise UsageError(
            f"stream takes one model, one batch and one device, and there are {len(job.candidates)}", fix="one --batch and one --device"
        )
    if request.action == "pack":
        return _packed(job, request, progress)
    if not request.specs:
        raise UsageError("a budget is wanted", fix="--budget 8GiB of device memory, or --budget 50% of the weights")
    if request.action in ("run", "verify") and len(request.specs) > 1:
        raise UsageError(f"{request.action} takes one budget", fix="gpuopt stream bench compares several")
    rivals.require_known(request.rivals)
    return {"plan": _planned, "run": _ran, "bench": bench.benched, "verify": _verified}[request.action](job, request, progress)


# -- one action each ----------------------------------------------------------------------------------------------------------------------------


def _planned(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    with child(job, progress, f"planning {candidate.model.text}") as arm:
        opened = arm.load(candidate, request)
        rows, errors = [], []
        for spec in request.specs:
            try:
                found = arm.ask("plan", Planned, spec=spec)
                rows.append(StreamRow(plan=found.plan, spans=found.spans))
            except ChildFailed as failure:
                if failure.error is None or len(request.specs) == 1:
                    raise
                errors.append(failure.error)
                rows.append(StreamRow(reason=failure.error.message, fix=failure.error.fix))
        raise_if_all(errors, len(rows))
    return report(job, opened, replace(base("plan", opened), rows=tuple(rows), load_s=None))


def _ran(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    with child(job, progress, f"streaming {candidate.model.text}") as arm:
        opened = arm.load(candidate, request)
        (spec,) = request.specs
        planned = arm.ask("plan", Planned, spec=spec)
        ready = arm.ask("bind", Ready, spec=spec)
        arm.ask("warm", type(None))
        answer = arm.ask("answer", Answer)
        blocks = [arm.ask("block", Timed, count=count) for count in blocks_of(request)]
        seen = measured(opened, ready, blocks, arm.ask("meters", Meters))
    row = StreamRow(measured=seen, spans=planned.spans)
    told = replace(base("run", opened), rows=(row,), tokens=answer.tokens)
    return report(job, opened, told, runs=[run_of(job, opened, seen, flat(blocks))])


def _verified(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    with child(job, progress, f"verifying {candidate.model.text}") as arm:
        opened = arm.load(candidate, request)
        (spec,) = request.specs
        found = arm.ask("verify", Checked, spec=spec, forwards=request.forwards)
    told = replace(base("verify", opened), rows=(StreamRow(plan=found.plan),), checks=found.checks)
    judged = tuple(
        GateResult(name=check.name, passed=check.passed, figure=check.detail, limit="equal bit for bit", run=opened.name)
        for check in found.checks
        if check.passed is not None
    )
    if not judged:
        raise ResourceError(found.checks[0].detail, fix="a smaller model of the same classes, or a larger device, to compare with")
    return report(job, opened, told, judged=judged)


def _packed(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    spec = request.specs[0] if request.specs else StreamSpec(budget_share=1.0)
    folder = job.output or spec.disk
    if folder is None:
        raise UsageError("pack writes a folder", fix="--disk FOLDER")
    # Nothing is computed, so no device is needed.
    here = replace(candidate, device="simulated")
    with child(job, progress, f"packing {candidate.model.text}") as arm:
        opened = arm.load(here, request)
        found = arm.ask("pack", PackedFolder, spec=spec, folder=folder)
    told = replace(base("pack", opened), device="", packed=found.folder, packed_bytes=found.num_bytes, notes=(*opened.notes, *found.notes))
    return replace(report(job, opened, told), output=found.folder)


# -- what is typed ------------------------------------------------------------------------------------------------------------------------------


def spec_of(budget: str, **rest: Any) -> StreamSpec:
    """`8GiB`, `50%` and what goes with it -> StreamSpec. Raises UsageError for a budget that is none, and for words there are none of."""
    for name, known in (("granularity", ("block", "sub")), ("embed", ("device", "cpu"))):
        if rest.get(name, known[0]) not in known:
            raise UsageError(f"{name} {str(rest[name])[:40]!r} is unknown", fix="one of: " + ", ".join(known))
    if budget.strip().endswith("%"):
        share = units.parse_fraction(budget)
        if not 0 < share <= 1:
            raise UsageError(f"a budget of {budget[:40]} is no part of the weights", fix="--budget 50%, above 0% and at most 100%")
        return StreamSpec(budget_share=share, **rest)
    if re.fullmatch(r"\s*[\d.]+\s*", budget):
        raise UsageError(
            f"a budget of {budget[:40]} could be a share or a size",
            fix=f"--budget {budget.strip()[:40]}% of the weights, or --budget {budget.strip()[:40]}GiB of device memory",
        )
    num_bytes = units.parse_bytes(budget)
    if num_bytes < 1:
        raise UsageError(f"a budget of {budget[:40]} leaves nothing", fix="--budget 8GiB or --budget 50%")
    return StreamSpec(budget_bytes=num_bytes, **rest)


def rivals_of(names: Sequence[str] | None) -> tuple[str, ...]:
    """`accelerate`, `none`; without any, the one that is asked for most. Raises UsageError for a name there is none of."""
    if names is None:
        return StreamRequest().rivals
    chosen = tuple(dict.fromkeys(names))
    if chosen == (NO_RIVAL,):
        return ()
    rivals.require_known(chosen)
    return chosen


def on(candidate: Candidate, device: str) -> Candidate:
    """The candidate on a device as `stream` names them."""
    return replace(candidate, device=device)


def require_known(device: str) -> None:
    """Raises UsageError for a text that is no device to stream to: before a child is started for it."""
    from gpuopt.pipeline.streamed.device import parse

    parse(device)
