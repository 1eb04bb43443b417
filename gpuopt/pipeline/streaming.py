"""A Job with `stream` -> Report: plan, run, bench, verify or pack a model whose weights are streamed. The parent's side: models live in children."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeVar

from gpuopt.core import stats, units
from gpuopt.core.errors import GpuoptError, ResourceError, UsageError
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import SCHEMA_VERSION, GateResult, Report, Run
from gpuopt.core.spec import Candidate, Job
from gpuopt.core.streamed import ACTIONS, StreamArm, StreamReport, StreamRequest, StreamRow
from gpuopt.core.streaming import Plan, Streamed, StreamSpec
from gpuopt.pipeline import gates, isolate, machine
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.stream_facts import Answer, Checked, Meters, Opened, PackedFolder, Planned, Ready, Timed

T = TypeVar("T")

CHILD = "gpuopt.pipeline.stream_child"
BLOCK_CALLS = 5
"""Of one arm, before it is another's turn."""
RESIDENT = "everything resident"
ACCELERATE = "accelerate device_map"


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
    return {"plan": _planned, "run": _ran, "bench": _benched, "verify": _verified}[request.action](job, request, progress)


@dataclass(slots=True)
class Arm:
    """A child, and what it was told."""

    child: isolate.Child
    progress: Progress
    timeout_s: float
    key: str
    opened: Opened | None = None

    def ask(self, verb: str, result: type[T], **arguments: object) -> T:
        """One step. Raises the child's own error where the user can act on it."""
        return self.child.call(
            verb,
            result,
            timeout_s=self.timeout_s,
            on_progress=lambda fraction, note: self.progress.update(self.key, fraction, note),
            **arguments,
        )

    def load(self, candidate: Candidate, request: StreamRequest) -> Opened:
        """Open the model."""
        self.opened = self.ask("load", Opened, candidate=candidate, request=request)
        return self.opened

    @property
    def known(self) -> Opened:
        """After `load`."""
        assert self.opened is not None, "load comes first"
        return self.opened


@contextmanager
def _child(job: Job, progress: Progress, name: str) -> Iterator[Arm]:
    """A child of our own, ended on the way out whatever happens; its failure is the command's error."""
    with isolate.Child(CHILD) as child:
        arm = Arm(child=child, progress=progress, timeout_s=job.bench.timeout_s, key=f"{name}#{child.pid}")
        progress.start(arm.key, name)
        try:
            yield arm
        except ChildFailed as failure:
            raise machine.told(failure, name) from failure
        finally:
            progress.done(arm.key)


# -- one action each ----------------------------------------------------------------------------------------------------------------------------


def _planned(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    with _child(job, progress, f"planning {candidate.model.text}") as arm:
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
        _raise_if_all(errors, len(rows))
    return _report(job, opened, replace(_base("plan", opened), rows=tuple(rows), load_s=None))


def _ran(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    with _child(job, progress, f"streaming {candidate.model.text}") as arm:
        opened = arm.load(candidate, request)
        (spec,) = request.specs
        planned = arm.ask("plan", Planned, spec=spec)
        ready = arm.ask("bind", Ready, spec=spec)
        arm.ask("warm", type(None))
        answer = arm.ask("answer", Answer)
        blocks = [arm.ask("block", Timed, count=count) for count in _blocks(request)]
        measured = _measured(opened, ready, blocks, arm.ask("meters", Meters))
    row = StreamRow(measured=measured, spans=planned.spans)
    told = replace(_base("run", opened), rows=(row,), tokens=answer.tokens)
    return _report(job, opened, told, runs=[_run(job, opened, measured, _flat(blocks))])


def _benched(job: Job, request: StreamRequest, progress: Progress) -> Report:
    """Each budget in turns with everything resident and with accelerate; a failure of an arm is its reason, and the others go on."""
    (candidate,) = job.candidates
    rows: list[StreamRow] = []
    arms: list[StreamArm] = []
    runs: list[Run] = []
    errors: list[GpuoptError] = []
    with ExitStack() as stack:
        # First of all: what others hold on the device by then is not taken for this child's own.
        whole, arm, digest = _resident(job, request, progress, stack, candidate) if request.rivals else (None, None, None)
        own = stack.enter_context(_child(job, progress, f"streaming {candidate.model.text}"))
        opened = own.load(candidate, request)
        if arm is not None:
            arms.append(arm)
        resident_blocks: list[Timed] = []
        for number, spec in enumerate(request.specs):
            try:
                planned = own.ask("plan", Planned, spec=spec)
                ready = own.ask("bind", Ready, spec=spec)
                own.ask("warm", type(None))
            except ChildFailed as failure:
                if failure.error is None:
                    raise
                errors.append(failure.error)
                rows.append(StreamRow(reason=failure.error.message, fix=failure.error.fix))
                continue
            answer, meters = own.ask("answer", Answer), own.ask("meters", Meters)
            with ExitStack() as pair:
                rival, rival_arm = (
                    _accelerated(job, request, progress, pair, candidate, planned.plan, number) if request.rivals else (None, None)
                )
                mine, theirs = _interleaved(request, own, whole, rival, progress)
            measured = _measured(opened, ready, mine[own.key], meters)
            measured = replace(measured, exact=None if digest is None else answer.digest == digest)
            rows.append(StreamRow(measured=measured, spans=planned.spans))
            runs.append(_run(job, opened, measured, _flat(mine[own.key])))
            if whole is not None:
                resident_blocks += mine[whole.key]
            if rival_arm is not None:
                arms.append(_timed_arm(rival_arm, theirs))
        if whole is not None and resident_blocks and arms:
            arms[0] = _timed_arm(arms[0], resident_blocks)
            runs.insert(0, _run_of_arm(job, opened, arms[0], _flat(resident_blocks)))
        _raise_if_all(errors, len(rows))
    told = replace(_base("bench", opened), rows=tuple(rows), arms=tuple(arms))
    return _report(job, opened, told, runs=runs)


def _resident(
    job: Job, request: StreamRequest, progress: Progress, stack: ExitStack, candidate: Candidate
) -> tuple[Arm | None, StreamArm, str | None]:
    """A child with everything on the device; None where it does not fit, with the reason in its row."""
    with ExitStack() as trying:
        try:
            arm = trying.enter_context(_child(job, progress, RESIDENT))
            opened = arm.load(candidate, request)
            ready = arm.ask("resident", Ready, spec=request.specs[0])
            arm.ask("warm", type(None))
            answer = arm.ask("answer", Answer)
        except ChildFailed as failure:
            return None, StreamArm(name=RESIDENT, reason=failure.reason), None
        stack.push(trying.pop_all())
    return arm, StreamArm(name=RESIDENT, setup_s=ready.setup_s, simulated=opened.device is None), answer.digest


def _accelerated(
    job: Job, request: StreamRequest, progress: Progress, stack: ExitStack, candidate: Candidate, plan: Plan, number: int
) -> tuple[Arm | None, StreamArm]:
    with ExitStack() as trying:
        try:
            arm = trying.enter_context(_child(job, progress, ACCELERATE))
            arm.load(candidate, request)
            held = plan.ledger.fixed + plan.ledger.residents + plan.ledger.slots
            ready = arm.ask("accelerate", Ready, spec=plan.spec, weight_bytes=held)
            arm.ask("warm", type(None))
        except ChildFailed as failure:
            return None, StreamArm(name=ACCELERATE, row=number, reason=failure.reason)
        stack.push(trying.pop_all())
    return arm, StreamArm(name=ACCELERATE, row=number, setup_s=ready.setup_s)


def _interleaved(
    request: StreamRequest, own: Arm, whole: Arm | None, rival: Arm | None, progress: Progress
) -> tuple[dict[str, list[Timed]], list[Timed]]:
    """Blocks of calls in turns, the order turned round each time: whatever the machine does meets all of them alike."""
    live = [arm for arm in (own, whole, rival) if arm is not None]
    found: dict[str, list[Timed]] = {arm.key: [] for arm in live}
    blocks = _blocks(request)
    for number, count in enumerate(blocks):
        progress.update(own.key, number / len(blocks), "timing in turns")
        for arm in live if number % 2 == 0 else live[::-1]:
            try:
                found[arm.key].append(arm.ask("block", Timed, count=count))
            except ChildFailed as failure:
                if arm is own:
                    raise
                progress.warn(f"{arm.key.partition('#')[0]} stopped: {failure.reason}")
                live = [one for one in live if one is not arm]
    return found, found[rival.key] if rival is not None else []


def _verified(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    with _child(job, progress, f"verifying {candidate.model.text}") as arm:
        opened = arm.load(candidate, request)
        (spec,) = request.specs
        found = arm.ask("verify", Checked, spec=spec, forwards=request.forwards)
    told = replace(_base("verify", opened), rows=(StreamRow(plan=found.plan),), checks=found.checks)
    judged = tuple(
        GateResult(name=check.name, passed=check.passed, figure=check.detail, limit="equal bit for bit", run=opened.name)
        for check in found.checks
        if check.passed is not None
    )
    if not judged:
        raise ResourceError(found.checks[0].detail, fix="a smaller model of the same classes, or a larger device, to compare with")
    return _report(job, opened, told, judged=judged)


def _packed(job: Job, request: StreamRequest, progress: Progress) -> Report:
    (candidate,) = job.candidates
    spec = request.specs[0] if request.specs else StreamSpec(budget_share=1.0)
    folder = job.output or spec.disk
    if folder is None:
        raise UsageError("pack writes a folder", fix="--disk FOLDER")
    # Nothing is computed, so no device is needed.
    here = replace(candidate, device="simulated")
    with _child(job, progress, f"packing {candidate.model.text}") as arm:
        opened = arm.load(here, request)
        found = arm.ask("pack", PackedFolder, spec=spec, folder=folder)
    told = replace(_base("pack", opened), device="", packed=found.folder, packed_bytes=found.num_bytes, notes=(*opened.notes, *found.notes))
    return replace(_report(job, opened, told), output=found.folder)


# -- figures ------------------------------------------------------------------------------------------------------------------------------------


def _blocks(request: StreamRequest) -> list[int]:
    """Calls of each block. A generation is many forwards already."""
    size = 1 if request.generate else BLOCK_CALLS
    calls = max(1, -(-request.calls // request.generate)) if request.generate else request.calls
    return [min(size, calls - start) for start in range(0, calls, size)]


def _flat(blocks: Sequence[Timed]) -> tuple[int, ...]:
    return tuple(ns for block in blocks for ns in block.samples_ns)


def _measured(opened: Opened, ready: Ready, blocks: Sequence[Timed], meters: Meters) -> Streamed:
    assert ready.plan is not None
    plan = ready.plan
    ordered = sorted(ns / 1e6 for ns in _flat(blocks))
    if not ordered:
        raise UsageError("one token is the prompt's forward, and no other was timed", fix="--generate 2 or more")
    middle = median(ordered)
    stalls = [ns / 1e6 for block in blocks for ns in block.stall_ns]
    prompts = [ns / 1e6 for block in blocks for ns in block.prompt_ns]
    notes = list(ready.notes)
    if prompts:
        notes.append(f"the prompt's forward, which makes the first token, takes {median(prompts):.4g} ms")
    return Streamed(
        plan=plan,
        workload=opened.workload,
        median_ms=middle,
        p10_ms=stats.quantile(ordered, 0.1),
        p90_ms=stats.quantile(ordered, 0.9),
        num_calls=len(ordered),
        pct_of_bound=100 * plan.bound_ms / middle,
        link_bytes_per_s=plan.streamed_bytes / middle * 1e3,
        stall_ms=median(stalls) if stalls else max(0.0, middle - plan.compute_ms),
        demand_fetches=blocks[-1].demand_fetches,
        peak_allocated_bytes=meters.peak_allocated_bytes,
        peak_reserved_bytes=meters.peak_reserved_bytes,
        peak_device_bytes=meters.peak_device_bytes,
        host_rss_bytes=meters.host_rss_bytes,
        pinned_bytes=ready.pinned_bytes,
        setup_s=ready.setup_s,
        simulated=opened.device is None,
        notes=tuple(notes),
    )


def _timed_arm(arm: StreamArm, blocks: Sequence[Timed]) -> StreamArm:
    ordered = sorted(ns / 1e6 for ns in _flat(blocks))
    if not ordered:
        return arm
    return replace(
        arm, median_ms=median(ordered), p10_ms=stats.quantile(ordered, 0.1), p90_ms=stats.quantile(ordered, 0.9), num_calls=len(ordered)
    )


def budget_text(spec: StreamSpec) -> str:
    """As it is typed: `50%`, `8GiB`."""
    if spec.budget_share is not None:
        return f"{100 * spec.budget_share:g}%"
    assert spec.budget_bytes is not None
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("GB", 10**9), ("MB", 10**6)):
        if spec.budget_bytes % size == 0:
            return f"{spec.budget_bytes // size}{unit}"
    return f"{spec.budget_bytes}B"


def _run(job: Job, opened: Opened, measured: Streamed, samples: Sequence[int]) -> Run:
    """The row that `compare`, gates and every format of a report read."""
    (candidate,) = job.candidates
    budget = budget_text(measured.plan.spec)
    told = StreamArm(name="streamed", simulated=measured.simulated, peak_device_bytes=measured.peak_device_bytes)
    run = _run_of_arm(job, opened, told, samples)
    reproduce = f"gpuopt stream run {candidate.model.text} --budget {budget}"
    return replace(run, backend="streamed", preset=budget, reproduce=reproduce, notes=measured.notes)


def _run_of_arm(job: Job, opened: Opened, arm: StreamArm, samples: Sequence[int]) -> Run:
    summary = stats.summarize(samples)
    return Run(
        model=opened.name,
        backend="eager" if arm.name == RESIDENT else arm.name,
        precision=None,
        batch=opened.dims.get("N"),
        dims=dict(opened.dims),
        inputs=opened.inputs,
        signature=opened.signature,
        input_source=opened.input_source,
        device=opened.device.id if opened.device else "simulated",
        latency_ms=summary,
        samples_per_s=opened.dims.get("N", 1) / summary.median * 1e3,
        samples_ns=tuple(samples),
        clock="simulated" if arm.simulated else "cuda-event",
        load_s=opened.load_s,
        peak_bytes=arm.peak_device_bytes,
    )


def _base(action: str, opened: Opened) -> StreamReport:
    return StreamReport(action=action, device=opened.device_text, model=opened.name, load_s=opened.load_s, notes=opened.notes)


def _report(job: Job, opened: Opened, told: StreamReport, *, runs: Sequence[Run] = (), judged: Sequence[GateResult] = ()) -> Report:
    return Report(
        schema_version=SCHEMA_VERSION,
        command=job.command,
        verb=job.verb,
        environment=opened.environment,
        device=opened.device,
        runs=tuple(runs),
        gates=(*judged, *gates.judge(runs, job.gates)),
        streamed=told,
    )


def _raise_if_all(errors: Sequence[GpuoptError], count: int) -> None:
    if errors and len(errors) == count:
        raise errors[0]


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


def on(candidate: Candidate, device: str) -> Candidate:
    """The candidate on a device as `stream` names them."""
    return replace(candidate, device=device)


def require_known(device: str) -> None:
    """Raises UsageError for a text that is no device to stream to: before a child is started for it."""
    from gpuopt.pipeline import stream_device

    stream_device.parse(device)
