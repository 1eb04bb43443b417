"""The machine under the candidates: what a child of its own found about it, and a second look when a figure contradicts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from gpuopt.core.errors import ResourceError, Unavailable
from gpuopt.core.progress import Progress
from gpuopt.core.result import Ceiling, Device, Status
from gpuopt.core.spec import Job
from gpuopt.pipeline import facts, figures, isolate, preflight
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.profiling.roofline import ImpossibleFigure

T = TypeVar("T")

SURVEY_TIMEOUT_S = 300.0


def _is_impossible(error: ImpossibleFigure | ChildFailed) -> bool:
    """A figure above its ceiling, found here or in a child."""
    return isinstance(error, ImpossibleFigure) or "ImpossibleFigure" in error.reason


@dataclass(slots=True)
class Machine:
    """What the survey found, and a second look when a figure contradicts it."""

    job: Job
    progress: Progress
    survey: facts.Survey
    is_fresh: bool = False
    is_beside_others: bool = False
    """One of several in this report."""
    sustained: dict[str, Ceiling] = field(default_factory=dict)
    """What products kept up between the blocks of the last group."""

    @property
    def device(self) -> Device:
        """The device with the ceilings that hold now."""
        return self.found.device

    @property
    def found(self) -> facts.Survey:
        """The survey with what was measured since."""
        device = self.survey.device
        rows = (*device.ceilings.rows, *self.sustained.values())
        return replace(self.survey, device=replace(device, ceilings=replace(device.ceilings, rows=rows)))

    def judged(self, work: Callable[[Device], T]) -> T:
        """`work` against the ceilings; where a figure lies above the measured ones, against ceilings measured again: the old ones may have been
        taken while the machine was busy. Raises ImpossibleFigure or ChildFailed when it does so even then."""
        try:
            return work(self.device)
        except (ImpossibleFigure, ChildFailed) as error:
            if self.is_fresh or not _is_impossible(error):
                raise
        self._measure_again()
        try:
            return work(self.device)
        except (ImpossibleFigure, ChildFailed) as error:
            if self.device.kind != "cpu" or not _is_impossible(error):
                raise
            # Nothing vouches for a CPU's ceilings but this measurement: others use its cores, and no data sheet is kept.
            raise ResourceError(
                f"this machine is too busy to be measured: {str(error).splitlines()[0][:300]}",
                fix="stop what else runs on it, and try again",
            ) from error

    def keep(self, sustained: dict[str, Ceiling]) -> None:
        """These sustained ceilings hold from now on. Products that beat the measured one show that it was taken on a busy machine."""
        self.sustained = sustained
        beaten = [
            row
            for row in sustained.values()
            if (peak := self.survey.device.ceilings.flops(row.quantity, "measured")) and row.value > peak * (1 + figures.slack(self.device))
        ]
        if beaten and not self.is_fresh:
            self._measure_again()

    def _measure_again(self) -> None:
        self.progress.warn("a figure lies above the measured ceilings: measuring them again")
        self.survey, self.is_fresh = survey(replace(self.job, refresh=True), self.progress), True


def surveyed(job: Job, progress: Progress) -> Machine:
    """The machine under the candidates, with its ceilings."""
    return Machine(job=job, progress=progress, survey=survey(job, progress), is_fresh=job.refresh)


def all_surveyed(job: Job, progress: Progress) -> tuple[Job, list[Machine]]:
    """The machines of all devices that the candidates name, in their order, and the job with the devices' ids in place of those names. Raises Unavailable
    for one that is not here."""
    names = list(dict.fromkeys(candidate.device for candidate in job.candidates))
    found: dict[str, Machine] = {}
    for name in names:
        machine = surveyed(job if len(names) == 1 else replace(job, candidates=(), device=name), progress)
        found[name] = next((known for known in found.values() if known.device.id == machine.device.id), machine)
    unique = list({id(machine): machine for machine in found.values()}.values())
    for machine in unique:
        machine.is_beside_others = len(unique) > 1
    candidates = [replace(candidate, device=found[candidate.device].device.id) for candidate in job.candidates]
    return replace(job, candidates=tuple(c for i, c in enumerate(candidates) if len(names) == 1 or c not in candidates[:i])), unique


def survey(job: Job, progress: Progress, *, ceilings: bool = True) -> facts.Survey:
    """Environment, device and its ceilings, from a child of their own. Raises first what the job would end with anyway, where a look at it tells."""
    preflight.require(job)
    wanted = job.candidates[0].device if job.candidates else job.device or "auto"
    with isolate.Child() as child:
        progress.start("device", "looking at this machine")
        try:
            for spec in preflight.presets(job):
                child.call("require_preset", type(None), timeout_s=SURVEY_TIMEOUT_S, backend=spec.name, preset=spec.preset)
            found = child.call(
                "survey",
                facts.Survey,
                timeout_s=SURVEY_TIMEOUT_S,
                on_progress=lambda fraction, note: progress.update("device", fraction, note),
                device_id=wanted,
                refresh=job.refresh,
                ceilings=ceilings,
            )
        except ChildFailed as failure:
            raise told(failure, "looking at the device") from failure
        progress.done("device", found.device.name)
    for note in found.device.notes:
        progress.warn(note)
    return found


def told(failure: ChildFailed, what: str) -> Exception:
    """A failure outside any candidate: the user's to act on, a library's that took the process with it, or a bug of ours with its traceback."""
    if failure.error is not None:
        return failure.error
    if failure.status is Status.BUG:
        failure.add_note(failure.traceback)
        return failure
    return Unavailable(
        f"{what} failed: {failure.reason}", fix=failure.fix or "gpuopt device and gpuopt backends show what this machine can do"
    )
