"""Search -> the answer in a sentence, every trial with what was expected and what came out, and what the change costs."""

from __future__ import annotations

from dataclasses import replace

from gpuopt.core.result import Report
from gpuopt.core.search import Economics, Search, Trial
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Facts, Message, Messages, Table
from gpuopt.reports.figures import clean

SHOWN = 24
"""Trials in the table; the report holds all."""
REASONS = 8
"""Different reasons of failure that are told in full."""
_PHASES = {
    "screening": "building and screening",
    "explaining": "tracing",
    "mending": "looking for what must stay in fp32",
    "finals": "finals",
}
_AS_IS = "as is "
"""How a label begins that keeps the input's precision."""
_TONES = {"chosen": "good", "finalist": "strong", "screened": "", "slower": "dim", "pruned": "dim", "planned": "dim"}


def headline(report: Report) -> list[Message]:
    """The answer of a search, before anything else."""
    found = report.search
    if found is None:
        return []
    others = [t for t in found.trials if t.origin != "input"]
    if others and all(t.outcome == "planned" for t in others):
        return [Message("info", _plan(found, others))]
    lines = []
    if found.choice is None:
        lines.append(Message("error", clean(found.stopped, 300)))
    elif found.choice.keeps_input:
        lines.append(Message("info", clean(found.choice.because, 400)))
    else:
        lines.append(Message("good", clean(f"{found.choice.change.removeprefix(_AS_IS)}: {found.choice.because}", 400)))
    lost = _failed(found)
    tried = sum(t.seconds is not None for t in found.trials)
    if found.choice is not None:
        out = f"; {len(lost)} of them failed (What failed says why)" if lost else ""
        lines.append(
            Message("info", f"{tried} candidate{'s' * (tried != 1)} tried of {len(found.trials)}{out}; {clean(found.stopped, 200)}")
        )
    return lines


def _plan(found: Search, planned: list[Trial]) -> str:
    """What a search would begin with; nothing was built, so nothing can be kept or chosen."""
    best = min((t for t in planned if t.predicted_ms is not None), key=lambda t: t.predicted_ms or 0.0, default=None)
    now = next((t.time_ms for t in found.trials if t.origin == "input"), None)
    against = f" against {f.ms(now)} as it is" if now else ""
    hope = f", {_name(best)} the fastest by expectation: {f.ms(best.predicted_ms)}{against}" if best and best.predicted_ms else ""
    return clean(f"a plan of {len(planned)} candidates{hope}; nothing was built but the input", 400)


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
    blocks: list[Block] = [_trials(found), *_reasons(found)]
    if found.economics is not None:
        blocks.append(_economics(found, found.economics))
    return blocks


def _failed(found: Search) -> list[Trial]:
    return [t for t in found.trials if t.seconds is not None and t.outcome not in (*_TONES, "over budget")]


def _reasons(found: Search) -> list[Block]:
    """Why candidates failed, in full: a table has no room for it, and what failed together is told once."""
    told: dict[str, list[str]] = {}
    for trial in _failed(found):
        told.setdefault(f"{trial.outcome.replace('_', ' ')}: {trial.reason}", []).append(_name(trial))
    items = [Message("warning", clean(f"{', '.join(names)}: {reason}", 500)) for reason, names in told.items()]
    more = [Message("info", f"{len(items) - REASONS} more reasons are in the report (--json)")] if len(items) > REASONS else []
    return [Messages(title="What failed", items=(*items[:REASONS], *more))] if items else []


def _name(trial: Trial) -> str:
    """Without the words for a precision that nobody changed."""
    own = trial.label.removeprefix(_AS_IS)
    return f"{own} (as it is)" if trial.origin == "input" else own


def _trials(found: Search) -> Table:
    """What was tried, or all of a plan: what no figure spoke for is counted below."""
    tried = [t for t in found.trials if t.seconds is not None or t.outcome not in ("pruned", "planned")]
    is_plan = len(tried) < 2
    rows_of = list(found.trials) if is_plan else tried
    shown = rows_of[:SHOWN]
    many_batches = len({t.batch for t in found.trials if t.time_ms}) > 1 or found.goal == "throughput"
    has_origins = any(t.origin not in ("input", "space") for t in shown)
    has_reasons = any(t.reason for t in shown)
    columns = [
        Column("candidate", shrinks=24),
        *([Column("from", spare=4)] if has_origins else []),
        Column("expected", right=True, spare=2),
        Column("screened", right=True),
        Column("in pairs", right=True, spare=3),
        *([Column("samples/s", right=True, spare=5)] if many_batches else []),
        Column("outcome"),
        *([Column("why", spare=6, shrinks=20)] if has_reasons else []),
    ]
    rows = []
    for trial in shown:
        tone = _TONES.get(trial.outcome, "bad")
        rows.append(
            (
                Cell(clean(_name(trial), 100), "strong" if trial.outcome == "chosen" else ""),
                *([Cell(clean(trial.origin, 20), "dim")] if has_origins else []),
                Cell(_expected(trial), "dim"),
                Cell(f.ms(trial.screened_ms) if trial.screened_ms else f.MISSING),
                Cell(f.ms(trial.measured_ms) if trial.measured_ms else f.MISSING),
                *([Cell(f.rate(trial.samples_per_s) if trial.samples_per_s else f.MISSING)] if many_batches else []),
                Cell(clean(trial.outcome.replace("_", " "), 30), tone),
                *([Cell(clean(trial.reason, 160), "dim")] if has_reasons else []),
            )
        )
    missed = f"; it missed by {f.share(found.prediction_error)} in the median" if found.prediction_error is not None else ""
    notes = [f"expected: before it was built, from the roofline and from what was measured until then{missed}"]
    if not is_plan:
        notes.append("screened: a few short blocks, to choose by; what stands under Speed was timed for longer")
    if len(found.trials) > len(shown):
        untried = f", {len(found.trials) - len(tried)} of them not tried" if not is_plan and len(tried) > len(shown) else ""
        said = "more are in the report (--json)" if is_plan or untried else "more were not tried, the report (--json) says why"
        notes.append(f"{len(found.trials) - len(shown)} {said}{untried}")
    notes += [f"{clean(_name(t), 100)}: {clean(t.note, 500)}" for t in found.trials if t.note]
    if found.resumed:
        notes.append(f"{found.resumed} answers came from the journal")
    if len(found.pareto) > 1:
        labels = {t.key: _name(t) for t in found.trials}
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

    phases = ", ".join(f"{_PHASES.get(k, clean(k))} {f.seconds(v)}" for k, v in found.by_phase_s.items())
    row("search", f.seconds(found.seconds) + (f": {phases}" if phases else ""))
    if found.choice is not None and found.choice.keeps_input:  # nothing new has to be built
        return Facts(title="What it cost", rows=tuple(rows))
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
