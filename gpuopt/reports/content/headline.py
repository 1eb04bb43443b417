"""Report -> the answer, in a few sentences."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from gpuopt.core.result import Ceilings, Report, Run, Status
from gpuopt.reports import figures as f
from gpuopt.reports.content import changes, program
from gpuopt.reports.content.blocks import Message
from gpuopt.reports.content.naming import (
    base_of,
    compute_quantity,
    dims_label,
)
from gpuopt.reports.figures import clean


def build(report: Report, ceilings: Ceilings, name: Callable[[Run], str]) -> tuple[Message, ...]:
    lines: list[Message] = []
    if report.error:
        lines.append(Message("error", clean(report.error.message, 1000), clean(report.error.fix, 1000), report.error.id))
    missed = [gate for gate in report.gates if not gate.passed]
    if missed:
        first = f"{clean(missed[0].name)} of {clean(missed[0].run, 120)}: {clean(missed[0].figure)}, limit {clean(missed[0].limit)}"
        lines.append(
            Message("error", f"{len(missed)} of {f.plural(len(report.gates), 'gate')} missed: {first}" + (", …" if len(missed) > 1 else ""))
        )
    if report.verb == "doctor" and not report.error:
        lines.append(_doctors(report))
    lines += program.headline(report)
    lines += changes.headline(changes.of_report(report))
    ok = [run for run in report.runs if run.status == Status.OK]
    if len(report.runs) == 1 and ok and ok[0].latency_ms and report.search is None:
        lines += _one_run(report, ok[0], ceilings)
    elif len(report.runs) == 1 and ok and ok[0].backend == "trace":  # nothing in a trace is a latency, but its time goes somewhere
        lines += _biggest(ok[0], "a traced call")
    elif len(report.runs) > 1 and report.search is None:
        lines += _many_runs(report, ok, name)
    for run in report.runs:
        if run.input_source.startswith("guess"):
            lines.append(
                Message(
                    "warning",
                    f"inputs were guessed for {clean(run.model, 60)}: {', '.join(clean(i, 80) for i in run.inputs) or clean(run.input_source)}"
                    f" ({clean(run.input_source.removeprefix('guess').strip(': ') or 'from the first layer')})",
                    f"--input {shlex.quote(clean(run.inputs[0], 80))}" if run.inputs else "--input 'x:float32[N,…]'",
                )
            )
            break  # one model guesses the same for each candidate
    if report.output and not report.error:
        kept = report.search is not None and report.search.choice is not None and report.search.choice.keeps_input
        lines.append(Message("good", f"written: {clean(report.output)}" + (", the model as it is" if kept else "")))
    return tuple(lines)


def _doctors(report: Report) -> Message:
    """How many findings of each severity, or that there are none."""
    counts = {s: sum(x.severity == s for x in report.findings if x.code != "guessed-inputs") for s in ("error", "warning", "info")}
    if not any(counts.values()):
        return Message("good", "nothing to change was found")
    named = {"error": "error", "warning": "warning", "info": "note"}
    told = ", ".join(f.plural(number, named[severity]) for severity, number in counts.items() if number)
    worst = next(severity for severity, number in counts.items() if number)
    return Message(worst, f"{told}: gpuopt doctor --explain CODE says more about each")


def _one_run(report: Report, run: Run, ceilings: Ceilings) -> list[Message]:
    assert run.latency_ms is not None
    where = f" on {clean(report.device.name, 60)}" if report.device else ""
    text = f"{clean(run.model, 60)} takes {f.ms(run.latency_ms.median)} a call{_batch_words(run)}{where}"
    if run.samples_per_s is not None:
        text += f": {f.rate(run.samples_per_s)} samples/s"
    lines = [Message("info", text)]
    if run.tflops is not None:
        quantity = compute_quantity(run)
        measured = ceilings.find(quantity, "measured") if quantity else None
        spec = ceilings.find(quantity, "spec") if quantity else None
        sentence = f"that is {f.tflops(run.tflops)}"
        if run.pct_of_measured is not None and measured:
            sentence += f", {f.percent(run.pct_of_measured)} of the {f.ceiling(measured.value, measured.unit)} this device was measured to do in {quantity}"
            sustained = ceilings.find(quantity, "sustained") if quantity else None
            if run.pct_of_sustained is not None and sustained:
                sentence += f" and {f.percent(run.pct_of_sustained)} of the {f.ceiling(sustained.value, sustained.unit)} it keeps up under this load"
        elif run.pct_of_spec is not None and spec:
            sentence += f", {f.percent(run.pct_of_spec)} of the {f.ceiling(spec.value, spec.unit)} of its data sheet in {quantity}"
        lines.append(Message("info", sentence))
    return lines + _biggest(run, "it")


def _biggest(run: Run, what: str) -> list[Message]:
    if run.waterfall is None or not run.waterfall.parts or run.waterfall.wall_ms <= 0:
        return []
    biggest = max(run.waterfall.parts, key=lambda part: part.ms)
    share = f.share(biggest.ms / run.waterfall.wall_ms)
    return [Message("info", f"the biggest slice of {what} is {clean(biggest.name)}, {share} of the wall time")]


def _batch_words(run: Run) -> str:
    return f" ({dims_label(run)})" if run.dims or run.batch is not None else ""


def _many_runs(report: Report, ok: Sequence[Run], name: Callable[[Run], str]) -> list[Message]:
    lines: list[Message] = []
    trusted = [run for run in ok if run.samples_per_s is not None]
    for model in dict.fromkeys(run.model for run in trusted):
        mine = [run for run in trusted if run.model == model]
        best = max(mine, key=lambda run: run.samples_per_s or 0.0)
        if len(mine) < 2:
            continue
        text = f"fastest is {name(best)}: {f.rate(best.samples_per_s)} samples/s"
        if best.tflops is not None:
            text += f", {f.tflops(best.tflops)}"
        if best.relative and best.relative.verdict == "faster":
            base = base_of(best, report.runs)
            text += f", {f.ratio(best.relative.ratio)} the speed of {name(base)}" if base else ""
        lines.append(Message("good", text))
    failed = len(report.runs) - len(ok)
    if failed:
        lines.append(
            Message(
                "warning" if ok else "error",
                f"{failed} of {f.plural(len(report.runs), 'run')} gave no result; the reasons are below the table",
            )
        )
    return lines
