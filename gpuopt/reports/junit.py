"""Report -> JUnit XML: one test case a candidate and one a gate.

`failure` is a verdict against the model, `error` something that broke on the way, `skipped` what cannot be here. `time` is the median seconds a call,
so that a CI's trend of a test case is the trend of its latency.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from gpuopt.core.result import Report, Run, Status
from gpuopt.reports.content.naming import run_label
from gpuopt.reports.figures import clean

FAILURES = (Status.ACCURACY_FAIL, Status.NAN)
SKIPPED = (Status.UNSUPPORTED, Status.ENV_MISSING, Status.SKIPPED, Status.CANCELLED)


def render(report: Report) -> str:
    """XML 1.0; control characters never reach it."""
    cases = [_run(run) for run in report.runs] + [_gate(g.name, g.run, g.passed, g.figure, g.limit) for g in report.gates]
    if report.error:
        message = _attribute(f"{report.error.id}: {report.error.message}")
        cases.append(
            f'    <testcase classname="gpuopt" name={_attribute(report.verb)}>\n      <error message={message}>{_text(report.error.fix)}</error>\n    </testcase>'
        )
    failures = sum(run.status in FAILURES for run in report.runs) + sum(not g.passed for g in report.gates)
    skipped = sum(run.status in SKIPPED for run in report.runs)
    errors = sum(run.status not in (*FAILURES, *SKIPPED, Status.OK) for run in report.runs) + (report.error is not None)
    counts = f'tests="{len(cases)}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
    body = "\n".join(cases)
    suite = (
        f"  <testsuite name={_attribute(f'gpuopt {report.verb}')} {counts}>\n{body}\n  </testsuite>"
        if cases
        else f'  <testsuite name="gpuopt" {counts}/>'
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n{suite}\n</testsuites>\n'


def _run(run: Run) -> str:
    time = f' time="{run.latency_ms.median / 1e3:.9f}"' if run.latency_ms else ""
    head = f"    <testcase classname={_attribute(f'gpuopt.{run.model}')} name={_attribute(run_label(run, model=False))}{time}"
    inside = []
    figures = {name: getattr(run, name) for name in ("samples_per_s", "tflops", "pct_of_measured", "pct_of_sustained", "peak_bytes")}
    known = [
        f"<property name={_attribute(name)} value={_attribute(f'{value:.10g}')}/>" for name, value in figures.items() if value is not None
    ]
    if known:
        inside.append("      <properties>" + "".join(known) + "</properties>")
    if run.status != Status.OK:
        kind = "failure" if run.status in FAILURES else "skipped" if run.status in SKIPPED else "error"
        message = _attribute(f"{run.status.value}: {run.reason}".rstrip(": "))
        told = " ".join(part for part in (run.fix, run.reproduce) if part)
        inside.append(f"      <{kind} message={message}>{_text(told)}</{kind}>" if told else f"      <{kind} message={message}/>")
    return head + (">\n" + "\n".join(inside) + "\n    </testcase>" if inside else "/>")


def _gate(name: str, run: str, passed: bool, figure: str, limit: str) -> str:
    head = f'    <testcase classname="gpuopt.gate" name={_attribute(f"{name} {run}".strip())}'
    return head + ("/>" if passed else f">\n      <failure message={_attribute(f'{figure}, limit {limit}')}/>\n    </testcase>")


def _attribute(text: str) -> str:
    return quoteattr(clean(text, 2000))


def _text(text: str) -> str:
    return escape(clean(text, 4000))
