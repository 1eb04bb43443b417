"""Rules -> their pages: one for `--explain`, all of them for docs/doctor.md. `python -m gpuopt.doctor.handbook docs` writes that."""

from __future__ import annotations

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


def text(asked: str) -> str:
    """The page of one rule by code or name, or all of them. Raises UsageError with the nearest names."""
    table = rules()
    if asked == "all":
        return book()
    for rule in table.values():
        if asked.upper() == rule.code or asked.lower() == rule.name:
            return page(rule, level=1)
    names = [*table, *(rule.name for rule in table.values())]
    near = difflib.get_close_matches(asked, names, n=3) or list(table)[:3]
    raise UsageError(f"there is no rule {asked!r}", fix=f"nearest: {', '.join(near)}; --explain all shows every one")


def page(rule: Rule, *, level: int = 3) -> str:
    """One rule as markdown."""
    lines = [
        f"{'#' * level} {rule.code} {rule.name}",
        "",
        rule.what,
        "",
        f"**Why it costs.** {rule.why}",
        "",
        "Before:",
        "",
        *_code(rule.before),
        "",
        "After:",
        "",
        *_code(rule.after),
        "",
        "`--fix` makes this change itself where it can, and measures it."
        if rule.safe
        else "The change may alter results or is yours to make: `--fix` leaves it alone, unless `--unsafe-fixes` asks for what gpuopt can do.",
        "",
        f"Looks at: {', '.join(sorted(rule.needs))}." + (f" Source: {rule.source}." if rule.source else ""),
    ]
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
        "| code | rule | what |",
        "|---|---|---|",
        *(f"| {rule.code} | {rule.name} | {rule.what.replace('|', '/')} |" for rule in table.values()),
    ]
    for digit, title in GROUPS.items():
        mine = [rule for rule in table.values() if rule.code.removeprefix("GPU").startswith(digit)]
        if mine:
            lines += ["", f"## {title}", "", "\n".join(page(rule) for rule in mine).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _code(code: str) -> list[str]:
    return ["```python", *code.splitlines(), "```"]


def main() -> None:
    """Write the book into the folder named."""
    (Path(sys.argv[1]) / "doctor.md").write_text(book(), encoding="utf-8")


if __name__ == "__main__":
    main()
