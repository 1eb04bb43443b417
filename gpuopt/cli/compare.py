"""`gpuopt compare A B`: two reports -> a verdict for each run both have."""

from __future__ import annotations

from pathlib import Path

from gpuopt.cli import options as o
from gpuopt.core.errors import UsageError


def compare(
    before: o.BeforeArg,
    after: o.AfterArg,
    max_slowdown: o.MaxSlowdownOpt = None,
    allow_inconclusive: o.InconclusiveOpt = False,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
) -> int:
    """Did anything get slower? A verdict for each run that two reports share; exit 1 when one did.

    Two reports were taken apart in time, so a change counts when it exceeds --max-slowdown by more than noise and drift between sessions explain.
    Where they might, or where the figures cannot be compared (another device, another clock), the verdict is inconclusive, which fails too unless
    --allow-inconclusive. Both in one gpuopt bench, interleaved, give a narrower answer.

    Example: gpuopt compare main.json branch.json --max-slowdown 5%
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core import codec, units
    from gpuopt.core.progress import Progress
    from gpuopt.core.result import Report
    from gpuopt.core.spec import Job
    from gpuopt.reports import diff

    if json not in (None, "-") and Path(str(json)).resolve() in (Path(before).resolve(), Path(after).resolve()):
        raise UsageError("--json names one of the reports compared", fix="another file")
    threshold = diff.DEFAULT_THRESHOLD if max_slowdown is None else units.parse_fraction(max_slowdown)

    def act(job: Job, progress: Progress) -> Report:
        old, new = (codec.read_json(Report, Path(name)) for name in (before, after))
        return diff.report(old, new, threshold=threshold, allow_inconclusive=allow_inconclusive, command=job.command)

    return run(Job(verb="compare", command=r.command_line()), act, json=json, force=force)
