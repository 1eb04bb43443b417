"""Job -> Report of a search: the questions of `strategy.py` answered by children, the answers kept in a journal, the winner published as a bundle.

Nothing here decides what is tried or what wins; it has things built, timed, verified and traced as it is asked to, and survives what goes wrong on the way.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gpuopt.bundles import write as bundle_writer
from gpuopt.core import codec, units
from gpuopt.core.errors import UsageError
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import Report, Run, Status
from gpuopt.core.search import GOALS, Screened, Search, SearchSpec
from gpuopt.core.spec import Candidate, Job
from gpuopt.pipeline import facts, isolate, jobs, outputs, reporting, seats
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.search import explaining, journal, published, race, trying, tune
from gpuopt.pipeline.search.crew import Crew, gathered
from gpuopt.pipeline.search.questions import Answer, Ask, Explain, Finalists, Finals, Mend, Screen
from gpuopt.pipeline.search.strategy import search
from gpuopt.trust import consent

FINGERPRINTED = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt")
"""Packages whose version times depend on."""


@isolate.forks
def optimize(
    job: Job,
    progress: Progress | None = None,
    *,
    hire: seats.Hire | None = None,
    identity: str = "",
    known: dict[str, Candidate] | None = None,
) -> Report:
    """`gpuopt optimize MODEL -o FOLDER`: the fastest verified way to run it that the search found, never one slower than the input.

    For a live module `hire` makes the workers that hold it, and `identity` says which module it is, so that no journal of another is resumed;
    `known` is filled with the candidates of the trials, by key.
    """
    progress = progress or Silent()
    base = jobs.only(job)
    spec = _checked(job.search)
    target = Path(job.output) if job.output is not None else None
    if target is not None:
        bundle_writer.check_target(target, force=job.force or spec.resume, source=outputs.source_of(base))
    machine = machines.surveyed(job, progress)
    base = _sized(replace(base, device=machine.device.id), job, hire)
    header = journal.Header(search=_digest(job, base, identity), fingerprint=_fingerprint(machine))
    path = journal.path_of(target) if target is not None else None
    crew = Crew(job=job, machine=machine, base=base, progress=progress, hire=hire, known={} if known is None else known)
    with journal.opened(path, header, resume=spec.resume) as book, gathered(crew):
        if spec.resume and not book.answers and target is not None and target.exists() and not job.force:
            raise UsageError(
                f"{path.name if path else ''} holds no answer to go on with, and {target.name} is already there",
                fix="--force, or another -o",
            )
        try:
            found = _searched(crew, book)
        except BaseException as ended:
            if target is not None and not isinstance(ended, Exception):  # Ctrl-C, or a signal that asks to end
                published.rescued(crew, target)
            raise
        crew.raise_if_base_failed()
        if target is not None and found.choice is not None and not spec.dry_run and spec.time_budget_s != 0:
            found = published.published(crew, found, target)
        elif found.choice is not None:
            found = replace(found, economics=published.economics(crew, found, None))
    report = _report(crew, found)
    progress.so_far(report)
    return report


def _searched(crew: Crew, book: journal.Journal) -> Search:
    """Every question answered: out of the journal where it was answered before, else by children, and then it goes into the journal."""
    steps = search(crew.base, crew.job.search)
    answer: Answer | None = None
    resumed, best = 0, _Best()
    crew.progress.start("search", "searching")
    while True:
        try:
            question = next(steps) if answer is None else steps.send(answer)
        except StopIteration as ended:
            found: Search = ended.value
            crew.progress.done("search", best.note)
            return replace(found, resumed=resumed)
        crew.learn(question)
        crew.progress.update("search", None, f"{best.note}; now {_doing(question, crew.base)}")
        line = book.get(question.key)
        if line is None:
            answer, runs = _answered(crew, question)
            book.add(question.key, answer, runs)
        else:
            answer, runs = line.answer, line.runs
            resumed += 1
        crew.keep(runs)
        crew.hear(question, answer)
        best.hear(question, answer, crew.base)
        crew.progress.so_far(_report(crew, None))


@dataclass(slots=True)
class _Best:
    """For whoever watches: how many were tried, and the fastest that passed the gates."""

    tried: int = 0
    ms: float | None = None
    words: str = ""

    @property
    def note(self) -> str:
        known = f", best {units.format_seconds(self.ms / 1e3)} a call: {self.words}" if self.ms is not None else ""
        return f"{self.tried} tried{known}"

    def hear(self, question: Ask, answer: Answer, base: Candidate) -> None:
        if not isinstance(question, Screen) or not isinstance(answer, Screened):
            return
        self.tried += 1
        per_call = answer.ms if answer.status == Status.OK else None
        if per_call is not None and (self.ms is None or per_call < self.ms):
            self.ms, self.words = per_call, tune.words(question.candidate, base)


def _doing(question: Ask, base: Candidate) -> str:
    if isinstance(question, Finals):
        return f"the finals of {len(question.candidates)}"
    verb = {Screen: "trying", Explain: "tracing", Mend: "looking for what must stay in fp32 in"}[type(question)]
    return f"{verb} {tune.words(question.candidate, base)}"


def _answered(crew: Crew, question: Ask) -> tuple[Answer, Mapping[str, Run]]:
    """Do what is asked; a candidate that fails is an answer too. With the runs that a report shows, by key."""
    began = time.monotonic()
    answer: Answer
    runs: Mapping[str, Run]
    if isinstance(question, Screen):
        answer, run = trying.tried(crew, question)
        runs = {tune.key(question.candidate): run}
    elif isinstance(question, Explain):
        answer, run = explaining.explained(crew, question.candidate)
        runs = {tune.key(question.candidate): run}
    elif isinstance(question, Mend):
        answer, runs = explaining.mended(crew, question.candidate), {}
    else:
        timed, runs = race.raced(crew, question)
        answer = Finalists(timed=timed)
    return replace(answer, seconds=time.monotonic() - began), runs


def _report(crew: Crew, found: Search | None) -> Report:
    """Runs in the order of their trials, the input first."""
    job = crew.job
    order = [t.key for t in found.trials if t.key in crew.runs] if found is not None else list(crew.runs)
    report = reporting.report(job, crew.machine.found, [crew.runs[key] for key in order])
    is_written = found is not None and found.economics is not None and bool(found.economics.artifact_bytes)
    return replace(report, search=found, output=Path(job.output).name if job.output is not None and is_written else None)


# -- what is asked for ----------------------------------------------------------------------------------------------------------------


def _checked(spec: SearchSpec) -> SearchSpec:
    if spec.goal not in GOALS:
        raise UsageError(f"goal {spec.goal!r} is unknown", fix="--goal " + " or ".join(GOALS))
    for name, value in (("--latency-budget", spec.latency_budget_ms), ("--max-memory", spec.max_memory_bytes)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} is {value}", fix="a figure above 0")
    if spec.time_budget_s is not None and spec.time_budget_s < 0:
        raise UsageError(f"--time-budget is {spec.time_budget_s:g} s", fix="0 for a plan, or more")
    if spec.finalists < 2:
        raise UsageError(f"{spec.finalists} finalists", fix="at least 2: the input and one other")
    return spec


def _sized(base: Candidate, job: Job, hire: seats.Hire | None) -> Candidate:
    """With the sizes that a search over batches starts from, where none were given: those that loading fills in."""
    if job.search.goal != "throughput" or "N" in base.dims:
        return base
    with (hire or isolate.Child)() as child:
        try:
            found = child.call("load", facts.Loaded, timeout_s=job.bench.timeout_s, candidate=base)
        except ChildFailed:
            return base  # the search says why it cannot be loaded
    return replace(base, dims={**found.dims, **base.dims})


# -- what answers belong to -----------------------------------------------------------------------------------------------------------


def _digest(job: Job, base: Candidate, identity: str) -> str:
    """Of what is searched for: the settings of this run that change an answer, and not where things are written."""
    spec = replace(job.search, resume=False, dry_run=False, time_budget_s=None, max_trials=0)
    asked: Mapping[str, object] = {
        "base": codec.dump(replace(base, device="")),
        "search": codec.dump(spec),
        "tolerance": codec.dump(job.tolerance),
        "verify": job.bench.verify,
        "source": identity,
        "files": _read_by(base),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read_by(base: Candidate) -> dict[str, str]:
    """Files that answers rest on, by what they hold: the model's, or its factory's source; a folder's by size and time, for weights are long to read; given inputs."""
    text, source = base.model.text, outputs.source_of(base)
    named = [source, base.inputs.file, text.rpartition(":")[0] if ".py:" in text else None]
    found = {str(name): consent.sha256_of(Path(name)) for name in named if name and Path(name).is_file()}
    if source is not None and source.is_dir():
        parts = sorted(path for path in source.rglob("*") if path.is_file())
        found |= {str(path.relative_to(source)): f"{(told := path.stat()).st_size} {told.st_mtime_ns}" for path in parts}
    return found


def _fingerprint(machine: Machine) -> dict[str, str]:
    device, environment = machine.device, machine.found.environment
    found = {"device": device.name, "driver": device.driver or "", "gpuopt": environment.gpuopt}
    return found | {name: version for name, version in environment.packages.items() if name in FINGERPRINTED}
