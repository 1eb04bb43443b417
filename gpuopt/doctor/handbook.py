"""Rules -> their pages: one for `--explain`, all of them for docs/doctor.md. `python -m gpuopt.doctor.handbook docs` writes that."""

from __future__ import annotations

import ast
import difflib
import sys
from pathlib import Path

from gpuopt.core.errors import UsageError
from gpuopt.doctor.rule import Rule, rules

GROUPS = {
    "1": "Where data lies and how it moves",
    "2": "Number formats",
    "3": "How the model is written",
    "4": "Kernels and shapes",
    "5": "Compilers and backends",
    "6": "The machine",
    "7": "Broken models and scripts",
}
"""First digit of the code -> heading."""
LOOKS_AT = {
    "audit": "what the built artifact computes in",
    "compiled": "torch.compile's counters and logs",
    "device": "the device and its measured ceilings",
    "environment": "versions and drivers",
    "failure": "the exception of a call that failed",
    "flags": "torch's global switches",
    "inputs": "the inputs",
    "measured_ms": "how long was measured",
    "memory_stats": "the allocator's statistics",
    "model": "whatever is known of the model",
    "module": "the model's modules and tensors",
    "outputs": "the outputs",
    "packages": "installed packages",
    "peak_bytes": "the peak of memory",
    "records": "times, FLOPs and bytes of each op",
    "script": "a program's calls, loads and waits by source line",
    "throttled_ms": "how long clocks were lowered",
    "trace": "a trace of a few calls",
    "waterfall": "where the time of a call goes",
}
"""Field of the evidence -> in words."""


def text(asked: str) -> str:
    """The page of one rule by code or name, or all of them. Raises UsageError, with the names near it."""
    table = rules()
    if asked == "all":
        return book()
    for rule in table.values():
        if asked.upper() == rule.code or asked.lower() == rule.name:
            return page(rule, level=1)
    names = [*table, *(rule.name for rule in table.values())]
    near = difflib.get_close_matches(asked, names, n=3)
    told = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"there is no rule {asked!r}", fix=f"{told}--explain all shows every one")


def page(rule: Rule, *, level: int = 3) -> str:
    """One rule as markdown."""
    lines = [
        f"{'#' * level} {rule.code} {rule.name}",
        "",
        rule.what,
        "",
        f"**Why it matters.** {rule.why}",
        "",
        "Before:",
        "",
        *_code(rule.before),
        "",
        "After:",
        "",
        *_code(rule.after),
        "",
        _remedy(rule),
        "",
        f"Looks at {', '.join(LOOKS_AT[name] for name in sorted(rule.needs))}." + (f" Source: {rule.source}." if rule.source else ""),
    ]
    if rule.explains:
        lines += ["", f"Findings of {', '.join(sorted(rule.explains))} about the same place are left out beside it: they are its symptoms."]
    return "\n".join(lines) + "\n"


def book() -> str:
    """docs/doctor.md."""
    table = rules()
    lines = [
        "# The doctor's rules",
        "",
        "Made from the rules by `python -m gpuopt.doctor.handbook docs`. `gpuopt doctor --explain CODE` shows one of them; "
        '`--ignore CODE`, or `ignore = ["CODE"]` in gpuopt.toml, leaves one out.',
        "",
        "A finding is an error (wrong or broken), a warning (worth a twentieth of the call or more, or something to change before measuring) or for information. "
        "Its price is a range: what the change should give back a call, by the ceilings measured on this machine and never more than it takes now; "
        "`--fix` puts the measured gain beside it.",
        "",
        "| code | rule | what |",
        "|---|---|---|",
        *(f"| {rule.code} | {rule.name} | {rule.what.replace('|', '/')} |" for rule in table.values()),
    ]
    for digit, title in GROUPS.items():
        mine = [rule for rule in table.values() if rule.code.removeprefix("GPU").startswith(digit)]
        if mine:
            lines += ["", f"## {title}", "", "\n".join(page(rule) for rule in mine).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _remedy(rule: Rule) -> str:
    """Who makes the change."""
    if not rule.has_change:
        return "The change is yours to make."
    if rule.safe:
        return "`gpuopt doctor MODEL --fix` makes this change and measures what it gives back."
    return "It may alter results: `--fix` makes this change only with `--unsafe-fixes`, and measures what it gives back."


def _code(code: str) -> list[str]:
    try:
        ast.parse(code)
        language = "python"
    except SyntaxError:
        language = "text"
    return [f"```{language}", *code.splitlines(), "```"]


def main() -> None:
    """Write the book into the folder named."""
    (Path(sys.argv[1]) / "doctor.md").write_text(book(), encoding="utf-8")


if __name__ == "__main__":
    main()
