"""A live module, its inputs and a SearchSpec -> Optimized: the search of `optimize.py` over workers that hold the module, and its winner ready to be called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.live import Inputs, Model
from gpuopt.core.progress import Silent
from gpuopt.core.result import Finding, Report
from gpuopt.core.search import Search, SearchSpec
from gpuopt.core.spec import BenchSpec, Candidate, InputSpec, Job, ModelRef, Tolerance
from gpuopt.pipeline import isolate, livemodel, seats
from gpuopt.pipeline.search import optimize, tune
from gpuopt.pipeline.search.live import calls, standin
from gpuopt.pipeline.search.live import handed as handing
from gpuopt.pipeline.search.live.local import LocalChild, told

_serial = itertools.count(1)


@dataclass(slots=True, kw_only=True)
class Optimized:
    """What a search over a live module came to."""

    report: Report
    """Trials, runs, findings: all that the command line shows."""
    model: Callable[..., Any]
    """The winner, called as the module was: inputs and outputs have the module's own dtypes and nest. The module itself where the answer is to keep it."""
    candidate: Candidate
    """The winner's settings; those of the input where the answer is to keep it."""
    notes: tuple[str, ...] = ()
    """What the search warned of."""

    def __repr__(self) -> str:
        choice = self.search.choice
        return f"gpuopt.optimize(...): {choice.because if choice is not None else self.search.stopped}"

    @property
    def search(self) -> Search:
        """Its account."""
        assert self.report.search is not None
        return self.report.search

    @property
    def keeps_input(self) -> bool:
        """Whether nothing was found that beats the module as it is."""
        return self.search.choice is None or self.search.choice.keeps_input

    def close(self) -> None:
        """Give back what the winner holds; `model` cannot be called afterwards, unless it is the caller's own module."""
        if isinstance(self.model, standin.StandIn):
            self.model.close()


def optimized(
    module: torch.nn.Module,
    inputs: Any,
    *,
    spec: SearchSpec,
    bench: BenchSpec,
    tolerance: Tolerance,
    device: str,
    output: str | Path | None = None,
    more: tuple[Inputs, ...] = (),
) -> Optimized:
    """`more`: other calls of the same sizes; the winner is verified on them too. Raises what `gpuopt optimize` does."""
    heard = _Heard()
    if device == "auto":
        device = _place(module)
    model, bound = livemodel.handles(module, inputs)
    job = Job(
        verb="optimize",
        bench=bench,
        tolerance=tolerance,
        output=None if output is None else str(output),
        search=spec,
        command="gpuopt.optimize(...)",
    )
    known: dict[str, Candidate] = {}
    with _workers(model, bound, job, device) as (job, hire, identity, here):
        report = optimize.optimize(job, heard, hire=hire, identity=identity, known=known)
    report = _told(report, here)
    base = replace(job.candidates[0], device=report.device.id if report.device else device)
    choice = report.search.choice if report.search is not None else None
    if choice is None or choice.keeps_input:
        return Optimized(report=report, model=module, candidate=_plain(base), notes=tuple(heard.warnings))
    candidate = _plain(known[choice.key])
    try:
        model_call = _standing(module, bound, candidate, more=more, bench=bench, tolerance=tolerance)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything, and the search's findings are worth more than its traceback
        return _kept(module, report, base, told(error, "build").reason, heard)
    return Optimized(report=report, model=model_call, candidate=candidate, notes=tuple(heard.warnings))


@contextmanager
def _workers(model: Model, bound: Inputs, job: Job, device: str) -> Iterator[tuple[Job, seats.Hire, str, str]]:
    """The job with its candidate, who does its steps, which module it is, and why it stays in this process, if it does."""
    try:
        with handing.handed(model, bound) as files:
            model.module = None  # the copy has been written: its device memory is the children's now
            base = Candidate(
                model=ModelRef(text=str(files.path), trust=(files.sha256,), allow_nonfinite=True),
                inputs=InputSpec(file=str(files.inputs)),
                device=device,
            )
            yield replace(job, candidates=(base,)), lambda: isolate.Child(environment=files.environment), "", ""
            return
    except handing.CannotHand as stays:
        why = str(stays)
    base = Candidate(model=ModelRef(text=""), device=device)
    # What cannot be saved cannot be told from another: no journal fits it but the one of this very search.
    yield replace(job, candidates=(base,)), lambda: LocalChild(model, bound), f"{model.name} #{next(_serial)} of a process", why


def _standing(
    module: torch.nn.Module, bound: Inputs, candidate: Candidate, *, more: tuple[Inputs, ...], bench: BenchSpec, tolerance: Tolerance
) -> standin.StandIn:
    model, bound = livemodel.handles(module, bound)
    tensors, template = calls.taken(bound.args, bound.kwargs)
    name = type(module).__name__
    try:
        shape = calls.Shape.of(_once(model, bound))
    except calls.NotPlain:
        shape = None
    made = standin.way(
        model,
        bound,
        candidate,
        template=template,
        tensors=tensors,
        shape=shape,
        more=more,
        tolerance=tolerance,
        verify="off" if bench.verify == "off" else "precision",
    )
    return standin.StandIn(name=name, original=None, ways=[made])


def _once(model: Model, bound: Inputs) -> Any:
    """The outputs of the copy, where the caller's tensors are."""
    own = bound.map(lambda t: t.detach().clone())
    with torch.no_grad():
        return model.module(*own.args, **own.kwargs)


def _place(module: torch.nn.Module) -> str:
    """Where the module is: what takes its place is called where it was."""
    if not isinstance(module, torch.nn.Module):
        return "auto"
    return next((str(p.device) for p in module.parameters() if p.device.type == "cuda"), "cpu")


def _plain(candidate: Candidate) -> Candidate:
    """Its settings, for the live module."""
    return replace(candidate, model=ModelRef(text=""), inputs=InputSpec(), dims={})


def _kept(module: torch.nn.Module, report: Report, base: Candidate, why: str, heard: _Heard) -> Optimized:
    """A winner that does not stand in the caller's process is none."""
    assert report.search is not None
    because = f"keep what you have: the search's winner does not hold in this process: {why}"
    choice = replace(report.search.choice, key=tune.key(base), keeps_input=True, because=because, speedup=None, speedup_low=None, speedup_high=None, change="")  # type: ignore[type-var]  # fmt: skip
    finding = Finding(
        code="winner-not-reproduced", severity="error", message=because, fix="pass a bundle's output, and look at it with gpuopt bench"
    )
    report = replace(report, search=replace(report.search, choice=choice), findings=(*report.findings, finding))
    return Optimized(report=report, model=module, candidate=_plain(base), notes=tuple(heard.warnings))


def _told(report: Report, here: str) -> Report:
    """Files that are gone by now are nothing to reproduce with; and where nothing was isolated, that is said."""
    runs = tuple(replace(run, reproduce="", input_source="the caller's tensors") for run in report.runs)
    search = report.search
    if search is not None:
        search = replace(search, trials=tuple(replace(trial, reproduce="") for trial in search.trials))
    findings = report.findings
    if here:
        findings = (
            *findings,
            Finding(
                code="not-isolated",
                severity="info",
                message=f"searched in this process, where a crash or a hang is the caller's and --timeout is not kept: {here}",
                fix="a module whose classes can be imported and whose forward is its class's own is searched in processes of its own",
            ),
        )
    return replace(report, runs=runs, search=search, findings=findings)


@dataclass(slots=True)
class _Heard(Silent):
    """Keeps what a search warns of."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Kept for `Optimized.notes`."""
        self.warnings.append(text)
