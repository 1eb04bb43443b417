"""Options of `optimize` alone, each declared once."""

from __future__ import annotations

from typing import Annotated

from gpuopt.cli.options import _option
from gpuopt.converters.rewrites import REWRITES

GOAL = "What to look for"
LIMITS = "How far to go"
SPACE = "What to try (all that can run here, unless named)"

SearchOutputOpt = Annotated[
    str | None, _option("--output", "-o", metavar="FOLDER", help="The bundle of the winner; its journal lies beside it.", panel=LIMITS)
]
GoalOpt = Annotated[
    str,
    _option(
        "--goal",
        metavar="latency|throughput",
        help="The least time of a call at the batch given, or most samples a second over batches.",
        panel=GOAL,
        show_default=True,
    ),
]
LatencyBudgetOpt = Annotated[
    str | None, _option("--latency-budget", metavar="TIME", help="No call slower than this: 10ms. The median counts.", panel=GOAL)
]
MaxMemoryOpt = Annotated[str | None, _option("--max-memory", metavar="SIZE", help="Peak device memory of a candidate: 8GiB.", panel=GOAL)]
TimeBudgetOpt = Annotated[
    str | None,
    _option(
        "--time-budget", metavar="TIME", help="For the search: 10m. The finalists are timed all the same; 0 plans alone.", panel=LIMITS
    ),
]
DryRunOpt = Annotated[
    bool, _option("--dry-run", help="Time and trace the model as it is, print the plan with predicted times, and stop.", panel=LIMITS)
]
ResumeOpt = Annotated[
    bool, _option("--resume", help="Go on with the journal beside the output: only what is missing is done.", panel=LIMITS)
]
TrialsOpt = Annotated[int | None, _option("--max-trials", metavar="N", help="Try at most this many candidates; 64.", panel=LIMITS, min=1)]
FinalistsOpt = Annotated[
    int | None,
    _option("--finalists", metavar="N", help="Timed against each other at the end, the input among them; 4.", panel=LIMITS, min=2),
]
SearchBackendOpt = Annotated[
    list[str] | None, _option("--backend", "-b", metavar="NAME[:PRESET]", help="Try only these. Repeatable.", panel=SPACE)
]
SearchPrecisionOpt = Annotated[
    list[str] | None, _option("--precision", "-p", metavar="P,P", help="Try only these. Repeatable.", panel=SPACE)
]
SearchRewriteOpt = Annotated[
    list[str] | None,
    _option(
        "--rewrite",
        metavar="NAME[:SETTING]",
        help=f"Try only these; none for none: {', '.join(REWRITES)}. Repeatable.",
        panel=SPACE,
    ),
]
