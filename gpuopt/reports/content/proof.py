"""Accuracy and precision audit -> whether it is still the same model, and what it really computes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gpuopt.core.result import Accuracy, Report, Run, Stage
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Table
from gpuopt.reports.figures import clean


def build(report: Report, name: Callable[[Run], str]) -> list[Block]:
    """Both tables, or what there is of them."""
    blocks: list[Block] = []
    verified = [run for run in report.runs if run.accuracy is not None]
    if verified:
        blocks.append(_accuracy(verified, name))
    audited = [run for run in report.runs if run.precision_audit is not None]
    if audited:
        blocks.append(_audit(audited, name))
    return blocks


def _accuracy(runs: Sequence[Run], name: Callable[[Run], str]) -> Table:
    """Every stage of a run alone; of several runs, the stage that failed or the last one."""
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for run in runs:
        accuracy = run.accuracy
        assert accuracy is not None
        rows += _rows(name(run), accuracy, every_stage=len(runs) == 1)
        if accuracy.mutates_inputs:
            notes.append(f"{name(run)} changes its inputs")
        if accuracy.deterministic is False:
            notes.append(f"{name(run)} gives other bits on a second call")
        notes += [clean(note) for note in accuracy.notes]
    references = dict.fromkeys(clean(run.accuracy.reference) for run in runs if run.accuracy)
    notes.insert(
        0, f"error: RMSE over RMS of the reference ({', '.join(references)}); ratio: to the error of eager PyTorch in the same precision"
    )
    columns = (
        Column("run"),
        Column("check", spare=3),
        Column("worst output", spare=4, folds=True),
        Column("error", right=True),
        Column("ratio", right=True, spare=2),
        Column("cosine", right=True, spare=6),
        Column("verdict"),
    )
    table = Table(title="Is it still the same model", columns=columns, rows=tuple(rows), notes=tuple(dict.fromkeys(notes)))
    return _without_run(table) if len(runs) == 1 else table.folded()


def _without_run(table: Table) -> Table:
    return replace(table, columns=table.columns[1:], rows=tuple(row[1:] for row in table.rows))


def _rows(label: str, accuracy: Accuracy, *, every_stage: bool) -> list[tuple[Cell, ...]]:
    if not accuracy.stages:
        last = Stage(name=f.MISSING, passed=accuracy.passed, outputs=(), reason=accuracy.reason)
        row = _row(label, last)
        return [(*row[:2], Cell(clean(accuracy.worst_output or f.MISSING, 40)), Cell(f.error(accuracy.relative_rmse)), *row[4:])]
    if every_stage:
        return [_row(label, stage) for stage in accuracy.stages]
    telling = next((stage for stage in accuracy.stages if not stage.passed), accuracy.stages[-1])
    done = accuracy.stages[: accuracy.stages.index(telling) + 1]
    return [_row(label, replace(telling, name=", ".join(stage.name for stage in done)))]


def _row(label: str, stage: Stage) -> tuple[Cell, ...]:
    worst = next((o for o in stage.outputs if o.name == stage.worst), stage.outputs[0] if stage.outputs else None)
    reason = clean(stage.reason or (worst.reason if worst and not worst.passed else ""))
    verdict = Cell("passed", "good") if stage.passed else Cell(f"failed: {reason}".rstrip(": "), "bad")
    return (
        Cell(label),
        Cell(clean(stage.name)),
        Cell(clean(worst.name if worst else f.MISSING, 40)),
        Cell(f.error(worst.relative_rmse) if worst else f.MISSING),
        Cell(f.ratio(worst.ratio) if worst else f.MISSING),
        Cell(f"{worst.cosine:.6f}" if worst and worst.cosine is not None else f.MISSING, "dim"),
        verdict,
    )


def _audit(runs: Sequence[Run], name: Callable[[Run], str]) -> Table:
    rows = []
    notes: list[str] = []
    for run in runs:
        audit = run.precision_audit
        assert audit is not None
        shares = sorted(audit.shares.items(), key=lambda item: -item[1])
        text = ", ".join(f"{clean(dtype)} {f.share(part)}" for dtype, part in shares) or "nothing could be read back"
        placed = ", ".join(f"{clean(k)} {f.share(v)}" for k, v in sorted(audit.placements.items(), key=lambda item: -item[1]))
        verdict = Cell("as asked", "good") if audit.honoured else Cell(f"not as asked: {clean(audit.reason)}".rstrip(": "), "bad")
        if audit.requested is None and audit.honoured:
            verdict = Cell("its own", "dim")
        rows.append(
            (
                Cell(name(run)),
                Cell(text + (f"; on {placed}" if placed else "")),
                verdict,
                Cell(clean(audit.method), "dim"),
            )
        )
        if audit.exceptions:
            notes.append("largest layers in another precision: " + ", ".join(clean(e, 60) for e in audit.exceptions[:3]))
    columns = (Column("run"), Column("share of FLOPs", folds=True), Column("verdict", folds=True), Column("read from", spare=1, folds=True))
    table = Table(title="What it really computes in", columns=columns, rows=tuple(rows), notes=tuple(dict.fromkeys(notes)))
    return _without_run(table) if len(runs) == 1 else table.folded()
