"""Evidence -> findings, by every rule whose needs are met. A rule that raises is that rule's failure alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from gpuopt.core.result import Finding
from gpuopt.doctor import price
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule, rules

_ORDER = {"error": 0, "warning": 1, "info": 2}


def diagnose(evidence: Evidence, *, ignore: Collection[str] = (), table: Mapping[str, Rule] | None = None) -> tuple[Finding, ...]:
    """Findings, the worst first: errors, then by the middle of the predicted gain.

    ignore: codes or names that stay silent. A rule that raises gives one finding under its own code that says so; the others run.
    What another finding explains is left out: the cause stays, its symptom goes.
    """
    found: list[Finding] = []
    broken: list[Finding] = []
    asked = {rule.code: rule for rule in (table if table is not None else rules()).values()}
    for rule in asked.values():
        if rule.code in ignore or rule.name in ignore or not _has(evidence, rule.needs):
            continue
        try:
            found += [_stamped(finding, rule, evidence) for finding in rule.find(evidence)]
        except Exception as error:  # noqa: BLE001 - any rule may be wrong about a model nobody has seen; the others must still be heard
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            broken.append(
                Finding(
                    code=rule.code,
                    rule=rule.name,
                    severity="info",
                    message=f"this rule failed: {type(error).__name__}: {first}"[:300],
                    fix=f"report it; --ignore {rule.code} goes without it",
                )
            )
    told = [*(f for f in found if not any(_explains(asked[cause.code], cause, f) for cause in found)), *broken]
    return tuple(sorted(told, key=lambda f: (_ORDER.get(f.severity, 3), -_middle(f), f.code, f.module or "")))


def _explains(rule: Rule, cause: Finding, symptom: Finding) -> bool:
    """Whether one finding is why there is the other: of the same module, or the other names none; of the same op, where both name one."""
    if symptom.code not in rule.explains:
        return False
    is_same_op = cause.op is None or symptom.op is None or cause.op == symptom.op
    return is_same_op and (symptom.module is None or symptom.module == cause.module)


def _has(evidence: Evidence, needs: Iterable[str]) -> bool:
    for name in needs:
        value = getattr(evidence, name)
        if value is None or (isinstance(value, tuple | dict) and not value):
            return False
    return True


def _stamped(finding: Finding, rule: Rule, evidence: Evidence) -> Finding:
    """With its rule's code and name, and a severity from its price."""
    return price.graded(replace(finding, code=rule.code, rule=rule.name, safe=rule.safe and finding.change is not None), evidence.wall_ms)


def _middle(finding: Finding) -> float:
    return ((finding.gain_low_ms or 0.0) + (finding.gain_high_ms or 0.0)) / 2
