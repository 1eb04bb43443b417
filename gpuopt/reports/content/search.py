"""Search -> the answer in a sentence, every trial with what was expected and what came out, and what the change costs."""

from __future__ import annotations

from dataclasses import replace

from gpuopt.core.result import Report
from gpuopt.core.search import Economics, Search, Trial
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Facts, Message, Table
from gpuopt.reports.figures import clean

SHOWN = 24
"""Trials in the table; the report holds all."""
_TONES = {"chosen": "good", "finalist": "strong", "screened": "", "slower": "dim", "pruned": "dim", "planned": "dim"}


def headline(report: Report) -> list[Message]:
    """The answer of a search, before anything else."""
    found = report.search
    if found is None:
        return []
    lines = []
    if found.choice is None:
        lines.append(Message("error", clean(found.stopped, 300)))
    elif found.choice.keeps_input:
        lines.append(Message("info", clean(found.choice.because, 400)))
    else:
        lines.append(Message("good", clean(f"{found.choice.change}: {found.choice.because}", 400)))
    lost = [t for t in found.trials if t.seconds is not None and t.outcome not in (*_TONES, "over budget")]
    tried = sum(t.seconds is not None for t in found.trials)
    if found.choice is not None:
        out = f"; {len(lost)} of them failed, each with its reason below" if lost else ""
        lines.append(Message("info", f"{tried} candidates tried of {len(found.trials)}{out}; {clean(found.stopped, 200)}"))
    return lines


def finalists(report: Report) -> Report:
    """The same report with the runs that were timed in pairs: the others stand among the trials."""
    found = report.search
    if found is None:
        return report
    keep = [t.outcome in ("finalist", "chosen") or t.origin == "input" for t in found.trials if t.seconds is not None]
    runs = tuple(run for run, kept in zip(report.runs, keep) if kept) if len(keep) == len(report.runs) else report.runs
    return replace(report, runs=runs)


def build(report: Report) -> list[Block]:
    """Trials and costs."""
    found = report.search
    if found is None:
        return []
    blocks: list[Block] = [_trials(found)]
    if found.economics is not None:
        blocks.append(_economics(found, found.economics))
    return blocks


def _trials(found: Search) -> Table:
    shown = found.trials[:SHOWN]
    many_batches = len({t.batch for t in found.trials if t.time_ms}) > 1 or found.goal == "throughput"
    columns = [
        Column("candidate", shrinks=24),
        Column("from", spare=4),
        Column("expected", right=True, spare=2),
        Column("screened", right=True),
        Column("in pairs", right=True, spare=3),
        *([Column("samples/s", right=True, spare=5)] if many_batches else []),
        Column("outcome"),
        Column("why", spare=6, shrinks=20),
    ]
    rows = []
    for trial in shown:
        tone = _TONES.get(trial.outcome, "bad")
        rows.append(
            (
                Cell(clean(trial.label, 100), "strong" if trial.outcome == "chosen" else ""),
                Cell(clean(trial.origin, 20), "dim"),
                Cell(_expected(trial), "dim"),
                Cell(f.ms(trial.screened_ms) if trial.screened_ms else f.MISSING),
                Cell(f.ms(trial.measured_ms) if trial.measured_ms else f.MISSING),
                *([Cell(f.rate(trial.samples_per_s) if trial.samples_per_s else f.MISSING)] if many_batches else []),
                Cell(clean(trial.outcome.replace("_", " "), 30), tone),
                Cell(clean(trial.reason, 160), "dim"),
            )
        )
    notes = ["expected: before it was built, from the roofline and from what was measured until then"]
    if found.prediction_error is not None:
        notes.append(f"median miss of what was expected: {f.share(found.prediction_error)}")
    if len(found.trials) > SHOWN:
        notes.append(f"{len(found.trials) - SHOWN} more that were not tried are in the report (--json)")
    if found.resumed:
        notes.append(f"{found.resumed} answers came from the journal")
    if len(found.pareto) > 1:
        labels = {t.key: t.label for t in found.trials}
        knee = f"; the knee is {clean(labels.get(found.knee, ''), 80)}" if found.knee else ""
        notes.append(f"latency against throughput: {len(found.pareto)} candidates that no other beats in both{knee}")
    return Table(title="What was tried", columns=tuple(columns), rows=tuple(rows), notes=tuple(notes))


def _expected(trial: Trial) -> str:
    if trial.predicted_ms is None:
        return f.MISSING
    return f.ms(trial.predicted_ms)


def _economics(found: Search, cost: Economics) -> Facts:
    rows: list[tuple[str, Cell]] = []

    def row(name: str, text: str | None) -> None:
        if text is not None:
            rows.append((name, Cell(text)))

    row("search", f.seconds(found.seconds) + "".join(f", {clean(k)} {f.seconds(v)}" for k, v in found.by_phase_s.items()))
    row("build", f.seconds(cost.build_s) if cost.build_s is not None else None)
    row("build memory", f.memory(cost.build_peak_host_bytes) + " of host memory" if cost.build_peak_host_bytes else None)
    row("cold start", f.seconds(cost.cold_start_s) if cost.cold_start_s is not None else None)
    row("bundle", f.memory(cost.artifact_bytes) if cost.artifact_bytes is not None else None)
    if cost.energy_j_per_sample is not None:
        before = f", the input {cost.energy_before_j_per_sample:.3g} J" if cost.energy_before_j_per_sample is not None else ""
        row("energy", f"{cost.energy_j_per_sample:.3g} J a sample{before}")
    row("pays for its build", f"after {cost.calls_to_repay_build:,} calls" if cost.calls_to_repay_build is not None else None)
    row("pays for the search", f"after {cost.calls_to_repay_search:,} calls" if cost.calls_to_repay_search is not None else None)
    return Facts(title="What it costs", rows=tuple(rows))
