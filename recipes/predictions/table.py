"""recipes/predictions/h200.json + explanations.toml -> docs/predictions.md. `python -m recipes.predictions.table`; `--check` says whether the page is up to date."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.errors import UsageError
from recipes.predictions.rows import GOAL_MISS, GOAL_SHARE, MEASURED, Predictions, Row, score

HERE = Path(__file__).parent
RESULT = HERE / "h200.json"
PAGE = HERE.parents[1] / "docs" / "predictions.md"
NOTHING = "The pairs have not been measured yet: `make predictions` on an H200 measures them and writes this page."
MANY = "The pairs have been measured on tiny models alone, as a rehearsal: none of its figures means anything, and none is shown."
INTRO = """# Predicted and measured

The doctor says what each change gives back, as a range. Here it is held to that: pairs of a real-sized model with one defect and the same model without it
(`recipes/predictions/defects.py`). The doctor sees the bad side alone and predicts; then both are timed in interleaved blocks. `make predictions` measures all of them
again.
"""


def render(found: Predictions | None, explanations: Mapping[str, str] | None = None) -> str:
    """The page. Raises UsageError for an explanation of a pair or rule that is not there."""
    if found is None or found.small:
        return f"{INTRO}\n{NOTHING if found is None else MANY}\n"
    why = dict(explanations or {})
    for key in why:
        if not any(key in (row.name, row.code) for row in found.rows):
            raise UsageError(
                f"explanations.toml explains {key!r}, which no row is called", fix="use the name of a pair or the code of its rule"
            )
    verdict = "Both goals are met." if score(found.rows).passed else "The goals are not met yet."
    held_out = [row for row in found.rows if row.held_out]
    lines = [
        INTRO,
        f"**{_told(found.rows)}** {verdict} A rule that was silent, or named no price, counts as out of range and as a miss without limit.",
        "",
    ]
    if held_out:
        lines += [
            "Misses of earlier runs led to better prices, so most pairs have been seen by whoever wrote the rules. Those of the second table were held out: other models, measured "
            f"for the first time in this run; one whose miss leads to a better price is not held out in the next. {_told(held_out)}",
            "",
        ]
    lines += _table([row for row in found.rows if not row.held_out], why)
    if held_out:
        lines += ["", "## Held out", "", *_table(held_out, why)]
    others = [row for row in found.rows if row.status != MEASURED]
    if others:
        lines += [
            "",
            "Not measured:",
            "",
            *(f"- {row.code} {row.what}: {row.status}: {_cell(row.reason) or 'no reason given'}" for row in others),
        ]
    alarms = [row for row in found.rows if row.fired_on_fixed]
    if alarms:
        lines += ["", "Rules that still speak on the fixed side:", "", *(f"- {row.code} {row.what}" for row in alarms)]
    packages = found.environment.packages
    lines += [
        "",
        f"{found.device.name}, driver {found.device.driver}, torch {packages.get('torch')}, transformers {packages.get('transformers')}. Times are medians of wall time; "
        f"a gain is the median over pairs of blocks, its 95% interval in brackets. `{found.command}` wrote [the file](../recipes/predictions/{RESULT.name}) in {found.seconds:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def _told(rows: Sequence[Row]) -> str:
    total = score(rows)
    share = f"{total.share:.0%}" if total.share is not None else "none"
    miss = f"{total.median_miss:.1%}" if total.median_miss is not None else "without limit, for half of them have no prediction"
    return (
        f"{total.num_in_range} of {total.num_measured} measured gains lie in the predicted range ({share}; the goal is {GOAL_SHARE:.0%}). "
        f"The median miss from the middle of the range is {miss} (the goal is under {GOAL_MISS:.0%})."
    )


def _table(rows: Sequence[Row], why: Mapping[str, str]) -> list[str]:
    return [
        "| rule | defect | change | before, ms | after, ms | predicted gain, ms | measured gain, ms | in range | miss | why it missed |",
        "|---|---|---|--:|--:|--:|--:|---|--:|---|",
        *(_row(row, why) for row in rows if row.status == MEASURED),
    ]


def _row(row: Row, why: Mapping[str, str]) -> str:
    predicted = "priced nothing" if row.fired else "silent"
    if row.predicted_low_ms is not None and row.predicted_high_ms is not None:
        predicted = f"{row.predicted_low_ms:.3g} to {row.predicted_high_ms:.3g}"
    interval = f" [{row.gain_low_ms:.3g}, {row.gain_high_ms:.3g}]" if row.gain_low_ms is not None and row.gain_high_ms is not None else ""
    reason = "" if row.in_range else why.get(row.name, why.get(row.code, ""))
    cells = [
        row.code,
        _cell(row.what),
        _cell(row.change),
        f"{row.bad_ms:.4g}" if row.bad_ms is not None else "",
        f"{row.fixed_ms:.4g}" if row.fixed_ms is not None else "",
        predicted,
        f"{row.gain_ms:.3g}{interval}" if row.gain_ms is not None else "",
        "yes" if row.in_range else "no",
        f"{row.miss:.0%}" if row.miss is not None else "",
        _cell(reason),
    ]
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def page() -> str:
    """From the files in the tree."""
    explanations = tomllib.loads((HERE / "explanations.toml").read_text(encoding="utf-8"))
    return render(codec.read_json(Predictions, RESULT) if RESULT.exists() else None, explanations if RESULT.exists() else {})


def main() -> None:
    """Write docs/predictions.md, or check it."""
    made = page()
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made
            else "docs/predictions.md is not what the files say: python -m recipes.predictions.table"
        )
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
