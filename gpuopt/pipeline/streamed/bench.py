"""Budgets -> a frontier: each streamed in turns with everything resident, and with other libraries at the same bytes. The parent's side."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from gpuopt.core.errors import GpuoptError
from gpuopt.core.progress import Progress
from gpuopt.core.result import GateResult, Report, Run
from gpuopt.core.spec import Candidate, Job
from gpuopt.core.streamed import RIVALS, OverEager, StreamArm, StreamRequest, StreamRow
from gpuopt.core.streaming import Plan, StreamSpec
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.streamed import device, eager
from gpuopt.pipeline.streamed.arms import (
    BLOCK_CALLS,
    RESIDENT,
    TURNS,
    Arm,
    base,
    blocks_of,
    budget_text,
    child,
    flat,
    measured,
    raise_if_all,
    report,
    run_of,
    run_of_arm,
    timed_arm,
)
from gpuopt.pipeline.streamed.facts import Answer, Meters, Opened, Planned, Ready, Timed

RIVAL_S = 8.0
"""Of timed calls, a rival and budget: one that is slow gets fewer of them, and its row says how many."""
RIVAL_CALLS = 3
"""However slow."""
AGAIN = "resident"
"""The rival that is plain eager once more."""
RIVAL_TOKENS = 16
"""A rival generates at most so many: its forwards after the prompt's take the same time each."""


@dataclass(slots=True)
class _Bench:
    """What is under way."""

    job: Job
    request: StreamRequest
    progress: Progress
    candidate: Candidate
    own: Arm
    whole: Arm | None
    reference: Answer | None
    """Of everything resident."""
    others: Arm | None
    """Where rivals run, one after the other."""
    rows: list[StreamRow] = field(default_factory=list)
    arms: list[StreamArm] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    errors: list[GpuoptError] = field(default_factory=list)
    resident: list[Timed] = field(default_factory=list)
    """Blocks of everything resident, beside all rows."""

    def tell(self, opened: Opened) -> None:
        """What is known so far, for a run that is cut short."""
        told = replace(base("bench", opened), rows=tuple(self.rows), arms=tuple(self.arms))
        self.progress.so_far(report(self.job, opened, told, runs=self.runs))


def benched(job: Job, request: StreamRequest, progress: Progress) -> Report:
    """Each budget in turns with everything resident and with rivals; a failure of an arm is its reason, and the others go on."""
    (candidate,) = job.candidates
    on_paper = device.parse(candidate.device).is_simulated
    notes = []
    with ExitStack() as stack:
        # Both first: what others hold on the device by then is not taken for the streamed child's own.
        whole, arm, reference = (None, None, None) if request.alone else _resident(job, request, progress, stack, candidate)
        others = None
        if request.rivals and not request.alone:
            if on_paper:
                notes.append("other libraries move weights to a real device: beside one on paper they are not run")
            else:
                others, reason = _others(job, request, progress, stack, candidate)
                notes += [reason] if reason else []
        own = stack.enter_context(child(job, progress, f"streaming {candidate.model.text}"))
        opened = own.load(candidate, request)
        bench = _Bench(job, request, progress, candidate, own, whole, reference, others)
        if arm is not None:
            bench.arms.append(arm)
        for number, spec in enumerate(request.specs):
            _row(bench, number, spec)
            bench.tell(opened)
        if whole is not None and bench.resident:
            bench.arms[0] = timed_arm(bench.arms[0], bench.resident)
            bench.runs.insert(0, run_of_arm(job, opened, bench.arms[0], flat(bench.resident)))
        raise_if_all(bench.errors, len(bench.rows))
        # Asked politely, each would first bring its weights back to the host, which nobody needs any more and takes half a minute at 70 GB.
        for one in (whole, others, own):
            if one is not None:
                one.child.kill()
    told = base("bench", opened)
    told = replace(told, rows=tuple(bench.rows), arms=tuple(bench.arms), notes=(*told.notes, *notes))
    return report(job, opened, told, runs=bench.runs, judged=_same_bits(bench))


def _same_bits(bench: _Bench) -> tuple[GateResult, ...]:
    """A budget with other outputs than everything resident is fast at something else: such a bench fails."""
    return tuple(
        GateResult(
            name="outputs",
            passed=False,
            figure="not equal to everything resident",
            limit="equal bit for bit",
            run=f"streamed {budget_text(row.measured.plan.spec)}",
        )
        for row in bench.rows
        if row.measured is not None and row.measured.exact is False
    )


def _resident(
    job: Job, request: StreamRequest, progress: Progress, stack: ExitStack, candidate: Candidate
) -> tuple[Arm | None, StreamArm, Answer | None]:
    """A child with everything on the device; None where it does not fit, with the reason in its row."""
    with ExitStack() as trying:
        try:
            arm = trying.enter_context(child(job, progress, RESIDENT))
            opened = arm.load(candidate, request)
            ready = arm.ask("resident", Ready, spec=request.specs[0])
            arm.ask("warm", type(None))
            answer = arm.ask("answer", Answer)
            progress.update(arm.key, None, "waiting for its turn")
        except ChildFailed as failure:
            return None, StreamArm(name=RESIDENT, reason=failure.reason), None
        stack.push(trying.pop_all())
    return arm, StreamArm(name=RESIDENT, setup_s=ready.setup_s, simulated=opened.device is None), answer


def _others(job: Job, request: StreamRequest, progress: Progress, stack: ExitStack, candidate: Candidate) -> tuple[Arm | None, str]:
    """The child that rivals run in, with the model in its host memory; or why there is none."""
    with ExitStack() as trying:
        try:
            arm = trying.enter_context(child(job, progress, "other libraries"))
            arm.load(candidate, replace(request, generate=request.generate and min(request.generate, RIVAL_TOKENS)))
            progress.update(arm.key, None, "waiting for its turn")
        except ChildFailed as failure:
            return None, f"other libraries were not run: {failure.reason}"
        stack.push(trying.pop_all())
    return arm, ""


def _row(bench: _Bench, number: int, spec: StreamSpec) -> None:
    """One budget, with whatever runs beside it."""
    own = bench.own
    try:
        planned = own.ask("plan", Planned, spec=spec)
        ready = own.ask("bind", Ready, spec=spec)
        own.ask("warm", type(None))
    except ChildFailed as failure:
        if failure.error is None:
            raise
        bench.errors.append(failure.error)
        bench.rows.append(StreamRow(reason=failure.error.message, fix=failure.error.fix))
        return
    answer = own.ask("answer", Answer)
    live = [arm for arm in (own, bench.whole) if arm is not None]
    found = _in_turns(bench, live, blocks_of(bench.request))
    seen = measured(own.known, ready, found[own.key], own.ask("meters", Meters))
    seen = replace(seen, exact=None if bench.reference is None else answer.digest == bench.reference.digest)
    bench.rows.append(StreamRow(measured=seen, spans=planned.spans, over_eager=_over_eager(bench, seen.plan)))
    bench.runs.append(run_of(bench.job, own.known, seen, flat(found[own.key])))
    if bench.whole is not None:
        bench.resident += found[bench.whole.key]
        bench.arms[0] = replace(bench.arms[0], peak_device_bytes=_peak(bench.whole.ask("meters", Meters), seen.plan))
    for name in bench.request.rivals:
        if bench.others is None or not RIVALS[name].library:
            continue
        budgeted = RIVALS[name].takes_budget
        if budgeted or not any(arm.rival == name for arm in bench.arms):
            bench.arms.append(_against(bench, name, number, seen.plan, budgeted=budgeted))
            bench.tell(bench.own.known)


def _over_eager(bench: _Bench, plan: Plan) -> OverEager | None:
    """Against plain eager, where the plan is that but for what streaming adds: all weights on the device. None where it is not, where its blocks are compiled, and on paper."""
    if plan.binding or plan.anatomy.host or bench.own.known.device is None or bench.request.alone:
        if AGAIN in bench.request.rivals:
            bench.progress.warn(f"{RIVALS[AGAIN].title} is compared with where nothing is streamed, on a GPU: not within this budget")
        return None
    if plan.spec.compile:
        bench.progress.warn(
            "compiled blocks are held against everything resident and compiled; over plain eager they would be another program's gain"
        )
        return None
    others = {RESIDENT: bench.whole} if bench.whole is not None else {}
    again = _again(bench, plan) if AGAIN in bench.request.rivals else None
    if again is not None:
        others[RIVALS[AGAIN].title] = again

    def lost(name: str, reason: str) -> None:
        bench.progress.warn(f"{name} stopped: {reason}")
        if name == RESIDENT:
            bench.whole = None

    found = eager.over_eager(bench.own, others, bench.request, bench.progress, on_lost=lost)
    if again is not None and not _released(again):
        bench.others = None
    return found


def _again(bench: _Bench, plan: Plan) -> Arm | None:
    """Plain eager in the rivals' child; None, with a warning, where it cannot be."""
    arm = bench.others
    if arm is None:
        return None
    try:
        arm.ask("resident", Ready, spec=plan.spec)
        arm.ask("warm", type(None))
    except ChildFailed as failure:
        bench.progress.warn(f"{RIVALS[AGAIN].title}: {failure.reason}")
        if not _released(arm):
            bench.others = None
        return None
    return arm


def _against(bench: _Bench, name: str, number: int, plan: Plan, *, budgeted: bool) -> StreamArm:
    """One rival at the plan's bytes of weights, in turns with what is streamed. Its first call is its warm-up: it loads kernels, and some learn the order of blocks."""
    arm = bench.others
    assert arm is not None, "rivals have a child"
    row = StreamArm(name=RIVALS[name].title, rival=name, row=number, budgeted=budgeted)
    try:
        held = plan.ledger.fixed + plan.ledger.residents + plan.ledger.slots
        ready = arm.ask("rival", Ready, name=name, spec=plan.spec, weight_bytes=held)
        row = replace(row, setup_s=ready.setup_s, setting=" ".join(ready.notes))
        answer = arm.ask("answer", Answer)
        began = time.monotonic()
        arm.ask("block", Timed, count=1)
        found = _in_turns(bench, [bench.own, arm], turns_of(bench.request, time.monotonic() - began))
        meters = arm.ask("meters", Meters)
        arm.ask("release", type(None))
    except ChildFailed as failure:
        if not bench.own.child.alive:
            raise
        if not _released(arm):
            bench.others = None  # whatever came after it would not be what it says
        return replace(row, reason=failure.reason)
    row = timed_arm(row, found[arm.key])
    same = timed_arm(row, found[bench.own.key])
    return replace(row, streamed_ms=same.median_ms, exact=_equal(answer, bench.reference), peak_device_bytes=_peak(meters, plan))


def _released(arm: Arm) -> bool:
    """Whether the module is its own again after a rival that failed."""
    if not arm.child.alive:
        return False
    try:
        arm.ask("release", type(None))
    except ChildFailed:
        return False
    return True


def _peak(meters: Meters, plan: Plan) -> int | None:
    """What torch reserved, and the context the plan was measured with: what others hold changes meanwhile, so the device's own count cannot be split."""
    return None if meters.peak_reserved_bytes is None else meters.peak_reserved_bytes + plan.ledger.context


def _equal(answer: Answer, reference: Answer | None) -> bool | None:
    """Bit for bit; of a generation that was cut short, its tokens."""
    if reference is None:
        return None
    if len(answer.tokens) < len(reference.tokens):
        return answer.tokens == reference.tokens[: len(answer.tokens)]
    return answer.digest == reference.digest


def turns_of(request: StreamRequest, call_s: float) -> list[int]:
    """Calls of each turn against a rival that takes so long: as many as fit RIVAL_S, no more than are asked for, and no fewer than RIVAL_CALLS forwards."""
    least = TURNS if request.generate else RIVAL_CALLS
    most = sum(blocks_of(request))
    calls = max(least, min(most, int(RIVAL_S / max(call_s, 1e-9))))
    turns = max(TURNS, -(-calls // BLOCK_CALLS))
    return [calls // turns + (turn < calls % turns) for turn in range(turns)]


def _in_turns(bench: _Bench, live: list[Arm], blocks: list[int]) -> dict[str, list[Timed]]:
    """Blocks of calls in turns, the order turned round each time: whatever the machine does meets all of them alike."""
    found: dict[str, list[Timed]] = {arm.key: [] for arm in live}
    for number, count in enumerate(blocks):
        bench.progress.update(bench.own.key, number / len(blocks), "timing in turns")
        for arm in live if number % 2 == 0 else live[::-1]:
            try:
                found[arm.key].append(arm.ask("block", Timed, count=count))
            except ChildFailed as failure:
                if arm is not bench.whole:
                    raise
                bench.progress.warn(f"{RESIDENT} stopped: {failure.reason}")
                bench.whole = None
                live = [one for one in live if one is not arm]
    return found
