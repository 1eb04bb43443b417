"""A child of `gpuopt stream` and what it answers -> what was measured: medians, shares of the bound, the rows that reports are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

from gpuopt.core import stats
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.progress import Progress
from gpuopt.core.result import SCHEMA_VERSION, GateResult, Report, Run
from gpuopt.core.spec import Candidate, Job
from gpuopt.core.streamed import StreamArm, StreamReport, StreamRequest
from gpuopt.core.streaming import Streamed, StreamSpec
from gpuopt.pipeline import gates, isolate, machine
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.streamed.facts import Meters, Opened, Ready, Timed

T = TypeVar("T")

CHILD = "gpuopt.pipeline.streamed.child"
BLOCK_CALLS = 5
"""Of one arm, before it is another's turn."""
TURNS = 2
"""At least, where a call is a generation: so that each arm is first once and last once."""
RESIDENT = "everything resident"


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
def child(job: Job, progress: Progress, name: str) -> Iterator[Arm]:
    """A child of our own, ended on the way out whatever happens; its failure is the command's error."""
    with isolate.Child(CHILD) as process:
        arm = Arm(child=process, progress=progress, timeout_s=job.bench.timeout_s, key=f"{name}#{process.pid}")
        progress.start(arm.key, name)
        try:
            yield arm
        except ChildFailed as failure:
            raise machine.told(failure, name) from failure
        finally:
            progress.done(arm.key)


def blocks_of(request: StreamRequest) -> list[int]:
    """Calls of each block. A generation is many forwards already."""
    size = 1 if request.generate else BLOCK_CALLS
    calls = max(TURNS, -(-request.calls // request.generate)) if request.generate else request.calls
    return [min(size, calls - start) for start in range(0, calls, size)]


def flat(blocks: Sequence[Timed]) -> tuple[int, ...]:
    """All samples, in order, nanoseconds."""
    return tuple(ns for block in blocks for ns in block.samples_ns)


def measured(opened: Opened, ready: Ready, blocks: Sequence[Timed], meters: Meters) -> Streamed:
    """What the blocks say of a plan. Raises UsageError where none has a sample."""
    assert ready.plan is not None
    plan = ready.plan
    ordered = sorted(ns / 1e6 for ns in flat(blocks))
    if not ordered:
        raise UsageError("one token is the prompt's forward, and no other was timed", fix="--generate 2 or more")
    middle = median(ordered)
    stalls = [ns / 1e6 for block in blocks for ns in block.stall_ns]
    prompts = [ns / 1e6 for block in blocks for ns in block.prompt_ns]
    notes = list(dict.fromkeys((*ready.notes, *meters.notes)))
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


def timed_arm(arm: StreamArm, blocks: Sequence[Timed]) -> StreamArm:
    """The arm with its times."""
    ordered = sorted(ns / 1e6 for ns in flat(blocks))
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


def run_of(job: Job, opened: Opened, measured: Streamed, samples: Sequence[int]) -> Run:
    """The row that `compare`, gates and every format of a report read."""
    (candidate,) = job.candidates
    budget = budget_text(measured.plan.spec)
    told = StreamArm(name="streamed", simulated=measured.simulated, peak_device_bytes=measured.peak_device_bytes)
    run = run_of_arm(job, opened, told, samples)
    reproduce = f"gpuopt stream run {candidate.model.text} --budget {budget}"
    return replace(run, backend="streamed", preset=budget, reproduce=reproduce, notes=measured.notes)


def run_of_arm(job: Job, opened: Opened, arm: StreamArm, samples: Sequence[int]) -> Run:
    """An arm as a row of its own."""
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


def base(action: str, opened: Opened) -> StreamReport:
    """What every action tells."""
    return StreamReport(action=action, device=opened.device_text, model=opened.name, load_s=opened.load_s, notes=opened.notes)


def report(job: Job, opened: Opened, told: StreamReport, *, runs: Sequence[Run] = (), judged: Sequence[GateResult] = ()) -> Report:
    """All of it."""
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


def raise_if_all(errors: Sequence[GpuoptError], count: int) -> None:
    """Where no budget came to anything, the first one's error is the command's."""
    if errors and len(errors) == count:
        raise errors[0]
