"""recipes/attribution/h200.json -> docs/attribution.md. `python -m recipes.attribution.table`; `--check` says whether the page is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuopt.core import codec
from recipes.attribution.rows import GOAL, GOAL_UNACCOUNTED, GOALS, Case, Shares

HERE = Path(__file__).parent
RESULT = HERE / "h200.json"
PAGE = HERE.parents[1] / "docs" / "attribution.md"
INTRO = f"""# What a profile can place

A kernel's time belongs to the module and the line that launched it. In eager code the ops around the launch say which; for compiled code the compiler's own record of what each kernel
was made from; for a replayed CUDA graph the same kernels of an ungraphed run, in their order; for ONNX Runtime its own profile and the names in the file. What none of them says stays a row
of its own, `?`, and is never spread over the others. The goals: {GOALS["eager"]:.0%} of the kernel time in eager, {GOAL:.0%} through compilers and graphs, and at most {GOAL_UNACCOUNTED:.0%} of a call unaccounted for.

`make attribution` measures the table on a GPU. Without one, `tests/profiling/test_launched.py` and `tests/backends/ort` hold the same goals to cuts of runs recorded on an H200
(`tests/profiling/data/attribution`, `tests/backends/ort/data`), and the figures of one eager run are in `recipes/profile/bert_large-h200.json` (`gpuopt report FILE --by line`).
"""
NOTHING = "The table has not been measured yet."


def render(found: Shares | None) -> str:
    """The page."""
    if found is None or found.small or found.device is None or found.environment is None:
        return f"{INTRO}\n{NOTHING}\n"
    packages = found.environment.packages
    lines = [
        INTRO,
        "| model | backend | of the time has a module | a line | goal | unaccounted |",
        "|---|---|--:|--:|--:|--:|",
        *(_row(case) for case in found.cases),
        "",
        f"{found.device.name}, driver {found.device.driver}, torch {packages.get('torch')}. `{found.command}` wrote [the file](../recipes/attribution/{RESULT.name}), which names the command of each row.",
    ]
    return "\n".join(lines) + "\n"


def _row(case: Case) -> str:
    if case.share is None:
        reason = case.reason.replace("|", "/")
        return f"| {case.model} | {case.backend} | {reason} | | {case.goal:.0%} | |"
    line = f"{case.line_share:.1%}" if case.line_share is not None else ""
    rest = case.unaccounted_ms / case.wall_ms if case.unaccounted_ms is not None and case.wall_ms else None
    left = "" if rest is None else f"{rest:.1%}" + (" (over the goal)" if rest > GOAL_UNACCOUNTED else "")
    return f"| {case.model} | {case.backend} | {case.share:.1%} | {line} | {case.goal:.0%} | {left} |"


def page() -> str:
    """From the file in the tree."""
    return render(codec.read_json(Shares, RESULT) if RESULT.exists() else None)


def main() -> None:
    """Write docs/attribution.md, or check it."""
    made = page()
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made
            else "docs/attribution.md is not what the file says: python -m recipes.attribution.table"
        )
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
