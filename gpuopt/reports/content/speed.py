"""Runs -> times and rates beside their ceilings, what was paid once, and what gave no result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpuopt.core.result import Ceilings, Report, Run, Status
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Facts, Message, Messages, Table
from gpuopt.reports.content.machine import shows_ceilings
from gpuopt.reports.content.naming import (
    backend_label,
    base_of,
    compute_quantity,
    dims_label,
    group,
    run_label,
    several_models,
    status_tone,
)
from gpuopt.reports.content.program import OBSERVED
from gpuopt.reports.figures import clean

LOW_COVERAGE = 0.95
"""Below this share of counted traffic a TFLOP/s figure is called out: what is not counted would move it."""


def build(report: Report, ceilings: Ceilings, name: Callable[[Run], str]) -> list[Block]:
    """The table of times, costs, and whatever gave none."""
    if not report.runs:
        return []
    blocks: list[Block] = []
    timed = [run for run in report.runs if run.latency_ms is not None]
    if timed:
        blocks.append(_run_table(report, timed, ceilings))
        # A search tells the costs of its answer itself, and nobody will pay those of the others.
        blocks += _costs(timed, name) if report.search is None else []
    failures = [run for run in report.runs if run.status != Status.OK]
    if failures:
        blocks.append(
            Messages(
                title="No result" if not timed else "Not ranked",
                items=tuple(_failure(run, name(run)) for run in failures),
            )
        )
    untimed_ok = [run for run in report.runs if run.status == Status.OK and run.latency_ms is None and run.backend not in OBSERVED]
    if untimed_ok:
        blocks.append(
            Messages(
                title="Done",
                items=tuple(
                    Message("good", f"{run_label(run)}: built, not timed" + "".join(f"; {clean(note)}" for note in run.notes))
                    for run in untimed_ok
                ),
            )
        )
    return blocks


def _failure(run: Run, label: str) -> Message:
    tone = status_tone(run.status)
    text = f"{label}: {run.status.value.replace('_', ' ')}"
    if run.reason:
        text += f": {clean(run.reason, 600)}"
    fix = clean(run.fix, 600)
    return Message("info" if tone == "dim" else "error", text, fix or (f"again: {clean(run.reproduce, 600)}" if run.reproduce else ""))


def _run_table(report: Report, runs: Sequence[Run], ceilings: Ceilings) -> Table:
    names = several_models(report)
    hosts = any(run.input_mode != "device" for run in runs)
    transforms = any(run.transforms for run in runs)
    relative = any(run.relative for run in runs)
    sustained = any(run.pct_of_sustained is not None for run in runs)
    unit, scale = f.tflops_column(run.tflops for run in runs)
    # What tells rows apart is never left out for want of room: where it is the same in all of them, it folds.
    columns: list[Column] = []
    columns += [Column("model", folds=True)] if names else []
    columns += [Column("backend"), Column("precision", folds=True)]
    columns += [Column("changes", folds=True, wraps=16)] if transforms else []
    columns += [Column("shape", folds=True)]
    columns += [Column("device", folds=True)] if report.devices else []
    columns += [Column("inputs", folds=True)] if hosts else []
    columns += [
        Column("a call", right=True),
        Column("±95%", right=True, spare=7),
        Column("p95", right=True, spare=8),
        Column("samples/s", right=True, spare=2),
    ]
    columns += [Column("vs first", right=True, spare=1)] if relative else []
    columns += [Column(unit, right=True, spare=1), Column("of measured", right=True)]
    columns += [Column("of sustained", right=True, spare=6)] if sustained else []
    columns += [Column("of spec", right=True, spare=5)]
    columns += [Column("peak memory", right=True, spare=4), Column("verified", spare=3)]
    best = {
        group(run): max((r.samples_per_s or 0.0) for r in runs if group(r) == group(run) and r.status == Status.OK)
        for run in runs
        if run.status == Status.OK
    }
    bases = {id(base) for run in runs if run.relative and (base := base_of(run, runs)) is not None}
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        assert run.latency_ms is not None
        winner = len(runs) > 1 and run.status == Status.OK and run.samples_per_s is not None and run.samples_per_s == best.get(group(run))
        cells = [Cell(clean(run.model, 40))] if names else []
        cells += [Cell(backend_label(run), "strong" if winner else ""), Cell(clean(run.precision or f.MISSING))]
        cells += [Cell(", ".join(clean(t) for t in run.transforms) or f.MISSING)] if transforms else []
        cells += [Cell(dims_label(run) or f.MISSING)]
        cells += [Cell(clean(run.device or f.MISSING))] if report.devices else []
        cells += [Cell(clean(run.input_mode))] if hosts else []
        cells += [
            Cell(f.ms(run.latency_ms.median), "strong"),
            Cell(_interval(run), "dim"),
            Cell(f.ms(run.latency_ms.p95), "" if run.latency_ms.p95 is not None else "dim"),
            Cell(f.rate(run.samples_per_s), "good" if winner else ""),
        ]
        cells += [_relative(run, bases)] if relative else []
        low = run.flop_coverage is not None and run.flop_coverage < LOW_COVERAGE
        cells += [
            Cell(f.MISSING if run.tflops is None else f.digits(run.tflops * scale) + ("*" if low else "")),
            Cell(f.percent(run.pct_of_measured), "strong", None if run.pct_of_measured is None else min(1.0, run.pct_of_measured / 100)),
        ]
        cells += [Cell(f.percent(run.pct_of_sustained))] if sustained else []
        cells += [Cell(f.percent(run.pct_of_spec)), Cell(f.memory(run.peak_bytes)), _verified(run)]
        rows.append(tuple(cells))
    notes = _run_notes(runs, None if shows_ceilings(report) else ceilings)
    return Table(title="Speed", columns=tuple(columns), rows=tuple(rows), notes=notes).folded()


def _interval(run: Run) -> str:
    stats = run.latency_ms
    if stats is None or stats.ci95_low is None or stats.ci95_high is None or stats.median <= 0:
        return f.MISSING
    half = (stats.ci95_high - stats.ci95_low) / 2 / stats.median
    return f"±{f.percent(half * 100)}"


def _relative(run: Run, bases: set[int]) -> Cell:
    if id(run) in bases:
        return Cell("1×", "dim")
    if run.relative is None:
        return Cell(f.MISSING, "dim")
    tone = {"faster": "good", "slower": "bad"}.get(run.relative.verdict, "dim")
    if run.relative.verdict == "inconclusive":
        return Cell(f"{f.ratio(run.relative.ratio)} ?", "warn")
    return Cell(f.ratio(run.relative.ratio), tone)


def _verified(run: Run) -> Cell:
    if run.accuracy is None:
        return Cell("not verified", "warn")
    if not run.accuracy.passed:
        return Cell("failed", "bad")
    if run.precision_audit is not None and not run.precision_audit.honoured:
        return Cell("other precision", "bad")
    return Cell(f"yes, {f.error(run.accuracy.relative_rmse)}" if run.accuracy.relative_rmse is not None else "yes", "good")


def _run_notes(runs: Sequence[Run], ceilings: Ceilings | None) -> tuple[str, ...]:
    notes: list[str] = []
    for quantity in dict.fromkeys(q for q in map(compute_quantity, runs) if q and ceilings):
        assert ceilings is not None
        measured, spec = ceilings.find(quantity, "measured"), ceilings.find(quantity, "spec")
        sustained = ceilings.find(quantity, "sustained")
        told = []
        if measured:
            told.append(f"measured {f.ceiling(measured.value, measured.unit)} ({clean(measured.source)})")
        if sustained:
            told.append(f"sustained {f.ceiling(sustained.value, sustained.unit)} ({clean(sustained.source)})")
        if spec:
            told.append(f"data sheet {f.ceiling(spec.value, spec.unit)} ({clean(spec.source)})")
        notes.append(
            f"{clean(quantity)} ceiling: {', '.join(told)}" if told else f"{clean(quantity)} ceiling: not known here, so no percentages"
        )
    counted = [run for run in runs if run.flops is not None]
    if counted:
        run = counted[0]
        coverages = [r.flop_coverage for r in counted if r.flop_coverage is not None]
        text = f"FLOPs: {f.si(run.flops, 'FLOP')} a call"
        if len({r.flops for r in counted}) > 1:
            text = "FLOPs: counted for each run"
        text += f", {clean(run.flop_source)}" if run.flop_source else ""
        if coverages:
            text += f"; formulas cover {f.share(min(coverages))} of the traffic"
            if min(coverages) < LOW_COVERAGE:
                text = "* " + text + ", so the rate is too low"
        notes.append(text)
    unknown = list(dict.fromkeys(op for run in runs for op in run.unknown_ops))
    if unknown:
        notes.append(
            "no FLOP formula for "
            + ", ".join(clean(op, 60) for op in unknown[:5])
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        )
    clocks = list(dict.fromkeys(run.clock for run in runs if run.clock))
    if clocks:
        notes.append(f"a call is the median by {', '.join(clean(c) for c in clocks)}; compile time is never part of it")
    if any(run.relative for run in runs):
        pairs = [r.relative for r in runs if r.relative]
        turns = [p.num_pairs for p in pairs if p.num_pairs]
        notes.append(
            "vs first: against the first of the same shape"
            + (f", {f.plural(min(turns), 'interleaved pair')}" if turns else "")
            + f"; above 1× is faster, within {f.percent(100 * pairs[0].threshold)} the same"
        )
        notes += [f"? inconclusive: {clean(p.reason)}" for p in pairs if p.verdict == "inconclusive" and p.reason]
    for run in runs:
        notes += [clean(note, 300) for note in run.notes if "Traceback" not in note]
        lost = {k: v for k, v in run.throttled_ms.items() if v > 0}
        if lost:
            notes.append(f"{run_label(run, model=False)} was throttled: " + ", ".join(f"{clean(k)} {f.ms(v)}" for k, v in lost.items()))
    return tuple(dict.fromkeys(notes))


def _costs(runs: Sequence[Run], name: Callable[[Run], str]) -> list[Block]:
    """Build time, cold start and energy: what is paid once, and what each sample costs."""
    wanted = (
        ("load", lambda r: r.load_s, f.seconds),
        ("compile", lambda r: r.compile_s, f.seconds),
        ("cold start", lambda r: r.cold_start_s, f.seconds),
        ("energy a sample", lambda r: r.energy_j_per_sample, lambda v: f.MISSING if v is None else f"{f.digits(v)} J"),
        ("mean power", lambda r: r.mean_power_w, lambda v: f.MISSING if v is None else f"{v:.0f} W"),
    )
    present = [(title, get, show) for title, get, show in wanted if any(get(run) is not None for run in runs)]
    if not present:
        return []
    if len(runs) == 1:
        return [Facts(title="Costs", rows=tuple((title, Cell(show(get(runs[0])))) for title, get, show in present))]
    columns = (Column("run"), *(Column(title, right=True, spare=i) for i, (title, _, _) in enumerate(present)))
    rows = tuple((Cell(name(run)), *(Cell(show(get(run))) for _, get, show in present)) for run in runs)
    return [Table(title="Costs", columns=columns, rows=rows)]
