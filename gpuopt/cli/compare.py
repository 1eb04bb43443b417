"""`gpuopt compare A [B]`: two reports, or the runs of one -> a verdict for each pair, and where the difference lies."""

from __future__ import annotations

from pathlib import Path

from gpuopt.cli import options as o
from gpuopt.core.errors import UsageError


def compare(
    before: o.BeforeArg,
    after: o.AfterArg = None,
    choose: o.RunOpt = None,
    max_slowdown: o.MaxSlowdownOpt = None,
    allow_inconclusive: o.InconclusiveOpt = False,
    depth: o.DepthOpt = 3,
    top: o.TopOpt = 10,
    by: o.ByOpt = "",
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
) -> int:
    """What changed between two runs, and did anything get slower? Exit 1 when it did.

    A verdict for each run that two reports share. Where both were profiled, also where the difference lies: the parts of the waterfall side by side,
    the module tree, and the kernels that came, went or changed. Two reports of one run each are compared whatever those runs are: eager and a
    compiled backend, fp32 and fp16. With one report its first run stands against the others. --run chooses.

    Two reports were taken apart in time, so a change counts when it exceeds --max-slowdown by more than noise and drift between sessions explain.
    Where they might, or where the figures cannot be compared (another device, another clock), the verdict is inconclusive, which fails too unless
    --allow-inconclusive. Both in one gpuopt bench, interleaved, give a narrower answer.

    gpuopt report makes any other format of what --json wrote: html, markdown.

    Example: gpuopt compare main.json branch.json --max-slowdown 5%

    Example: gpuopt compare eager.json inductor.json --depth 4

    Example: gpuopt compare bench.json --run eager --run inductor
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core import codec, units
    from gpuopt.core.progress import Progress
    from gpuopt.core.result import Report
    from gpuopt.core.spec import Job
    from gpuopt.reports import pairs
    from gpuopt.reports.content.blocks import View

    names = [name for name in (before, after) if name is not None]
    if json not in (None, "-") and Path(str(json)).resolve() in [Path(name).resolve() for name in names]:
        raise UsageError("--json names one of the reports compared", fix="another file")
    threshold = None if max_slowdown is None else units.parse_fraction(max_slowdown)
    view = View(depth=depth, top=top, by=by)

    def act(job: Job, progress: Progress) -> Report:
        found = [codec.read_json(Report, Path(name)) for name in names]
        return pairs.compared(*found, runs=choose or (), threshold=threshold, allow_inconclusive=allow_inconclusive, command=job.command)

    return run(Job(verb="compare", command=r.command_line()), act, json=json, force=force, view=view)
