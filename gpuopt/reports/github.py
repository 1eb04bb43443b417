"""Report -> workflow commands: annotations on a GitHub Actions run.

GitHub shows about ten annotations of a kind for a step, so the tenth says how many more there are.
"""

from __future__ import annotations

from gpuopt.core.result import Report, Status
from gpuopt.reports.content.naming import run_label, status_tone
from gpuopt.reports.figures import clean, plural

LIMIT = 10


def render(report: Report) -> str:
    """`::error title=…::message` lines: gates missed and broken runs are errors, what cannot run here is a notice, findings as they are."""
    found: dict[str, list[tuple[str, str]]] = {"error": [], "warning": [], "notice": []}
    if report.error:
        found["error"].append((f"gpuopt {report.verb}: {report.error.id}", _sentence(report.error.message, report.error.fix)))
    for gate in report.gates:
        if not gate.passed:
            found["error"].append(
                (f"gate {gate.name} missed", _sentence(f"{gate.run + ': ' if gate.run else ''}{gate.figure}, limit {gate.limit}", ""))
            )
    for run in report.runs:
        if run.status != Status.OK:
            kind = "notice" if status_tone(run.status) == "dim" else "error"
            found[kind].append((f"{run_label(run)}: {run.status.value}", _sentence(run.reason, run.fix or run.reproduce)))
    for finding in report.findings:
        kind = {"error": "error", "warning": "warning"}.get(finding.severity, "notice")
        found[kind].append((finding.code, _sentence(finding.message, finding.fix)))
    lines = []
    for kind, items in found.items():
        shown = items if len(items) <= LIMIT else items[: LIMIT - 1]
        lines += [f"::{kind} title={escape_property(title)}::{escape_data(text)}" for title, text in shown]
        if len(items) > LIMIT:
            lines.append(f"::{kind} title=gpuopt::{plural(len(items) - len(shown), 'more ' + kind)} in the report")
    return "\n".join(lines) + "\n" if lines else ""


def _sentence(text: str, fix: str) -> str:
    return clean(text, 1000) + (f" → {clean(fix, 600)}" if fix else "")


def escape_data(text: str) -> str:
    """What follows `::`."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """A property's value, where a colon or a comma would end it."""
    return escape_data(clean(text, 200)).replace(":", "%3A").replace(",", "%2C")
