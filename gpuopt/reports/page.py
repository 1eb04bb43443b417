"""Report -> a page: what is shown, in which order, in every human-readable format. Pure."""

from __future__ import annotations

from dataclasses import replace

from gpuopt.core.result import Ceilings, Report
from gpuopt.reports.content import (
    breakdown,
    devices,
    generation,
    headline,
    inputs,
    machine,
    naming,
    program,
    proof,
    search,
    speed,
    steps,
    streaming,
    tables,
    verdicts,
)
from gpuopt.reports.content.blocks import Block, Page, View
from gpuopt.reports.figures import clean


def page(report: Report, view: View | None = None) -> Page:
    """The page of any report, whatever its verb."""
    view = view or View()
    ceilings = report.device.ceilings if report.device else Ceilings()
    whole, report = report, search.finalists(report)
    # What was streamed has tables of its own, for its times and for what was compared.
    told = replace(report, runs=(), gates=report.gates if report.runs else ()) if report.streamed else report
    detailed = [run for run in report.runs if (run.waterfall or run.roofline or run.modules) and not report.search]
    name = naming.labels(report.runs)
    blocks: list[Block] = []
    is_doctor = report.verb == "doctor"
    if is_doctor:  # what to change is the answer: where the time goes is its ground, and ops one by one are the profile's
        blocks += verdicts.findings(report)
    else:
        blocks += machine.of_all(report)
        blocks += inputs.build(report)
    blocks += devices.build(report)
    blocks += search.build(whole)
    blocks += streaming.build(report)
    blocks += tables.build(report, view)
    for run in detailed:
        shown = replace(run, modules=(), roofline=()) if is_doctor else run
        blocks += breakdown.build(shown, ceilings, view, name(run) if len(detailed) > 1 else "")
    blocks += generation.build(report, name)
    blocks += speed.build(told, ceilings, name)
    blocks += program.notes(report)
    blocks += proof.build(report, name)
    blocks += verdicts.gates(told)
    if is_doctor:
        blocks += machine.build(replace(report, runs=()))
    else:
        blocks += verdicts.findings(report)
    return Page(
        title=clean(f"gpuopt {report.verb}"),
        subtitle=clean(report.command, 1000),
        headline=(
            *search.headline(whole),
            *devices.headline(report),
            *generation.headline(report, name),
            *streaming.headline(report),
            *headline.build(told, ceilings, name),
        ),
        blocks=tuple(blocks),
        next=tuple(steps.build(report, ceilings)),
        footer=_footer(report),
    )


def _footer(report: Report) -> str:
    environment = report.environment
    parts = [f"gpuopt {environment.gpuopt}", f"Python {environment.python}"]
    parts += [
        f"{name} {version}"
        for name, version in environment.packages.items()
        if name in ("torch", "onnxruntime", "tensorrt", "transformers", "triton")
    ]
    if environment.cuda:
        parts.append(f"CUDA {environment.cuda}")
    if report.device and report.device.driver:
        parts.append(f"driver {report.device.driver}")
    parts.append(environment.platform)
    flags = " ".join(f"{k}={v}" for k, v in environment.flags.items())
    return clean(" · ".join(parts) + (f" · {flags}" if flags else ""), 600)
