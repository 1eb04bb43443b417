"""A report of one architecture -> at each batch, the fastest candidate that is verified and beats eager beyond the noise; where none does, eager is kept."""

from __future__ import annotations

from dataclasses import dataclass

from gpuopt.core.result import Report, Run, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one would put into service at one batch."""

    batch: int
    eager: Run | None
    """fp16 eager as timed; None where it failed or never was."""
    best: Run | None
    """None: eager is kept."""
    failures: tuple[str, ...]
    """Candidates that have no time or are wrong, with why."""
    slower: tuple[str, ...] = ()
    """Candidates that are right and do not beat eager beyond noise, with how they did."""

    @property
    def speedup(self) -> float | None:
        """Of what is put into service, over eager: 1 where it is kept. None where there is nothing to compare with."""
        if self.eager is None:
            return None
        return self.best.relative.ratio if self.best is not None and self.best.relative is not None else 1.0

    @property
    def label(self) -> str:
        """What is put into service."""
        return label(self.best) if self.best is not None else "eager, kept"


def verdicts(report: Report) -> tuple[Verdict, ...]:
    """One for each batch, smallest first. The first run of a batch is eager, which the others of that batch were interleaved with."""
    batches = sorted({run.batch for run in report.runs if run.batch is not None})
    return tuple(_at(batch, [run for run in report.runs if run.batch == batch]) for batch in batches)


def _at(batch: int, runs: list[Run]) -> Verdict:
    eager, others = runs[0], runs[1:]
    failures = [f"{label(run)}: {why_not(run)}" for run in runs if why_not(run)]
    if eager.backend != "eager" or why_not(eager):
        return Verdict(batch=batch, eager=None, best=None, failures=tuple(failures))
    right = [run for run in others if not why_not(run)]
    faster = [run for run in right if run.relative is not None and run.relative.verdict == "faster"]
    best = max(faster, key=lambda run: run.relative.ratio if run.relative is not None else 0.0, default=None)
    slower = [
        f"{label(run)}: {run.relative.verdict} ({run.relative.ratio:.2f}x)" if run.relative else f"{label(run)}: not compared"
        for run in right
        if run not in faster
    ]
    return Verdict(batch=batch, eager=eager, best=best, failures=tuple(failures), slower=tuple(slower))


def why_not(run: Run) -> str:
    """Why this run cannot be put into service; empty where it can."""
    if run.status is not Status.OK:
        return f"{run.status}: {run.reason}"
    if run.latency_ms is None:
        return "not timed: the command ended before"
    if run.accuracy is None:
        return "not verified"
    if not run.accuracy.passed:
        return f"not accurate: {run.accuracy.reason}"
    if run.precision_audit is not None and not run.precision_audit.honoured:
        return f"not in its precision: {run.precision_audit.reason}"
    return ""


def label(run: Run) -> str:
    """Precision, where it is not the fp16 of all; backend; changes."""
    return " ".join(
        [
            *([run.precision] if run.precision and run.precision != "fp16" else []),
            run.backend + (f":{run.preset}" if run.preset else ""),
            *run.transforms,
        ]
    )
