"""recipes/search_cost/h200/*.json -> docs/search_cost.md. `python -m recipes.search_cost.table`; `--check` says whether the page is up to date.

No figure of the page is typed: all come from the records, and from the search replayed on them each time the page is made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from gpuopt.core.errors import BadInput, GpuoptError
from recipes.search_cost import record as records
from recipes.search_cost.record import Record
from recipes.search_cost.replay import GOAL_MODELS, GOAL_REACHED, GOAL_SHARE, Replayed, replay
from recipes.search_cost.space import CASES, MOST

HERE = Path(__file__).parent
RECORDS = HERE / "h200"
PAGE = HERE.parents[1] / "docs" / "search_cost.md"
INTRO = f"""# What a search costs

`gpuopt optimize` does not try everything. Here it is held against doing so: over declared spaces of up to {MOST} candidates every one was built, timed and verified once, and
recorded with what it cost. Then the search, as it is, was replayed on the record. It is to reach {GOAL_REACHED:.0%} of the optimum in at most {GOAL_SHARE:.0%} of the time that
all candidates take, on at least {GOAL_MODELS} models.

How a space is declared is in [`recipes/search_cost/space.py`](../recipes/search_cost/space.py): by a rule that looks at nothing that was measured, and without presets that autotune, whose cost
would make any search that avoids them look cheap. A candidate costs what its own process worked for it: started, loaded, built with empty caches, timed, verified. The time
it stood still while another was timed is not in it. The search pays for its trace of the input as well, which a full measurement does not need; what it asks for outside the
record is charged with what candidates of that backend took, and teaches it nothing ([`recipes/search_cost/replay.py`](../recipes/search_cost/replay.py)).
"""
NOTHING = (
    "Not measured yet on an H200: `python -m recipes.search_cost.run --output recipes/search_cost/h200` measures the spaces there, "
    "and `python -m recipes.search_cost.table` writes this page."
)


def read(folder: Path) -> dict[str, Record]:
    """Name -> record, in the order they are measured; what is not there is left out. Raises BadInput for one that is damaged, of another name or of a rehearsal."""
    found: dict[str, Record] = {}
    for name in CASES:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        one = records.read(path)
        if one.name != name:
            raise BadInput(f"{path.name} is of {one.name}", fix="give it its name back")
        if one.tiny:
            raise BadInput(f"{path.name} is a rehearsal on a tiny model", fix="no figure of it means anything: leave it out")
        found[name] = one
    return found


def render(found: Mapping[str, Record], where: str = "recipes/search_cost/h200") -> str:
    """The page. Raises BadInput for records of different devices."""
    if not found:
        return f"{INTRO}\n{NOTHING}\n"
    devices = {one.device.name for one in found.values()}
    if len(devices) > 1:
        raise BadInput(f"the records are of different devices: {', '.join(sorted(devices))}", fix="a page is about one")
    whole = {name: replay(one) for name, one in found.items() if not one.missing()}
    lines = [INTRO, *_verdict(found, whole)]
    if whole:
        lines += [
            "| model | size | candidates (failed) | all, s | to 98%, s | share | whole search, s | tried | chosen, ms | of the optimum | optimum, ms | chosen |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
            *(_row(name, found[name], one) for name, one in whole.items()),
            "",
            '"To 98%" is what the search had spent when its best candidate was first within 2% of the optimum, its trace of the input included. "Whole search" is until it ended '
            "by itself, without the finals, which a full measurement needs just as well.",
        ]
    notes = [
        f"- {name}: {one.num_outside} question{'s' if one.num_outside > 1 else ''} outside the record, charged with {one.outside_s:.0f} s"
        for name, one in whole.items()
        if one.num_outside
    ]
    if notes:
        lines += ["", "Asked for and not in the record:", "", *notes]
    for name in whole:
        lines += ["", f"## {name}", "", *_rows(found[name])]
    first = next(iter(found.values()))
    packages = first.environment.packages
    lines += [
        "",
        f"{first.device.name}, driver {first.device.driver}, torch {packages.get('torch')}, {first.jobs} candidates built at once. The records are in `{where}`; "
        f"`{first.command}` wrote the first of them.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(found: Mapping[str, Record], whole: Mapping[str, Replayed]) -> list[str]:
    models = {found[name].base.model.text for name in whole}
    passed = {found[name].base.model.text for name in whole} - {
        found[name].base.model.text for name, one in whole.items() if not one.passed
    }
    lines: list[str] = []
    if whole:
        shares = [one.until_share for one in whole.values() if one.until_share is not None]
        middle = f"; the median share is {median(shares):.0%}" if shares else ""
        verdict = "The goal is met." if len(passed) >= GOAL_MODELS and passed == models else "The goal is not met."
        lines += [
            f"**{sum(one.passed for one in whole.values())} of {len(whole)} spaces, of {len(models)} models, reach {GOAL_REACHED:.0%} of the optimum in at most {GOAL_SHARE:.0%} of the "
            f"time{middle}.** {verdict}",
            "",
        ]
    partial = [f"{name} ({len(one.rows)} of {len(one.space())} candidates)" for name, one in found.items() if name not in whole]
    absent = [name for name in CASES if name not in found]
    if partial:
        lines += [f"Cut short, and in no figure: {', '.join(partial)}.", ""]
    if absent:
        lines += [f"Not measured: {', '.join(absent)}.", ""]
    return lines


def _row(name: str, record: Record, one: Replayed) -> str:
    cells = [
        f"[{name}](#{name})",
        " ".join(f"{k}={v}" for k, v in record.base.dims.items()),
        f"{one.num_space} ({one.num_failed})",
        f"{one.whole_s:.0f}",
        f"{one.until_s:.0f}" if one.until_s is not None else "never",
        f"{one.until_share:.0%}" if one.until_share is not None else "",
        f"{one.search_s:.0f}",
        str(one.num_screened),
        f"{one.chosen_ms:.4g}",
        f"{one.reached:.1%}",
        f"{one.optimum_ms:.4g}",
        _cell(one.chosen),
    ]
    return "| " + " | ".join(cells) + " |"


def _rows(record: Record) -> list[str]:
    """Every candidate, the fastest first, those that failed last."""
    ranked = sorted(record.rows, key=lambda row: (row.status != "ok", row.ms is None, row.ms or 0.0))
    return [
        "| candidate | ms | built, s | timed, s | verified, s | ended |",
        "|---|--:|--:|--:|--:|---|",
        *(
            f"| {_cell(row.label)} | {f'{row.ms:.4g}' if row.ms is not None else ''} | {row.build_s:.1f} | {row.timing_s:.1f} | {row.verify_s:.1f} | "
            f"{row.status if row.status == 'ok' else f'{row.status}: {_cell(row.reason)}'} |"
            for row in ranked
        ),
    ]


def _cell(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= 200 else flat[:199] + "…"


def main() -> None:
    """Write docs/search_cost.md, or check it."""
    given = [Path(word) for word in sys.argv[1:] if not word.startswith("-")]
    folder = given[0] if given else RECORDS
    try:
        made = render(read(folder), where="recipes/search_cost/h200" if folder == RECORDS else folder.name)
    except GpuoptError as error:
        sys.exit(f"{error.message}: {error.fix}")
    if "--check" in sys.argv:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == made
        sys.exit(0 if same else "docs/search_cost.md is not what the records say: python -m recipes.search_cost.table")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
