"""`gpuopt optimize MODEL -o DIR`: a verified search -> the fastest bundle it found, never one slower than the input."""

from __future__ import annotations

from collections.abc import Sequence

from gpuopt.cli import options as o
from gpuopt.cli import search_options as so


def optimize(
    model: o.ModelArg,
    goal: so.GoalOpt = "latency",
    latency_budget: so.LatencyBudgetOpt = None,
    max_memory: so.MaxMemoryOpt = None,
    output: so.SearchOutputOpt = None,
    time_budget: so.TimeBudgetOpt = None,
    dry_run: so.DryRunOpt = False,
    resume: so.ResumeOpt = False,
    max_trials: so.TrialsOpt = None,
    finalists: so.FinalistsOpt = None,
    backend: so.SearchBackendOpt = None,
    precision: so.SearchPrecisionOpt = None,
    rewrite: so.SearchRewriteOpt = None,
    arch: o.ArchOpt = None,
    trust: o.TrustOpt = None,
    trust_remote_code: o.RemoteCodeOpt = False,
    cast: o.CastOpt = False,
    allow_nonfinite: o.NonfiniteOpt = False,
    input: o.InputOpt = None,
    inputs: o.InputsOpt = None,
    batch: o.BatchOpt = None,
    dim: o.DimOpt = None,
    seed: o.SeedOpt = 0,
    device: o.DeviceOpt = "auto",
    min_time: o.MinTimeOpt = None,
    max_time: o.MaxTimeOpt = None,
    pairs: o.PairsOpt = None,
    build_jobs: o.BuildJobsOpt = None,
    timeout: o.TimeoutOpt = None,
    verify: o.VerifyOpt = "full",
    eval_data: o.EvalDataOpt = None,
    metric: o.MetricOpt = None,
    min_metric_ratio: o.MinMetricRatioOpt = None,
    metric_lower_is_better: o.LowerIsBetterOpt = False,
    calib: o.CalibOpt = None,
    tolerance: o.ToleranceOpt = None,
    max_error: o.MaxErrorOpt = None,
    min_tflops: o.MinTflopsOpt = None,
    max_latency: o.MaxLatencyOpt = None,
    strict: o.StrictOpt = False,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Search for the fastest way to run a model: verified, measured against the model as it is, and never slower.

    Backends, precisions, rewrites and batches are tried in the order of what they can be expected to give, each in a process of its own. What fails the
    accuracy gate, crashes or is slower is kept as a result with its reason. The finalists are timed against the input in interleaved pairs; where none beats it
    by more than the noise, the answer is "keep what you have".

    Every answer goes into a journal beside the output, so --resume does only what is missing. Ctrl-C leaves the best so far as a bundle.

    Example: gpuopt optimize model.pt --goal throughput --latency-budget 10ms --time-budget 10m -o fast/

    Example: gpuopt optimize model.pt --dry-run
    """
    typed = dict(locals())
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core import units
    from gpuopt.core.errors import UsageError
    from gpuopt.core.search import SearchSpec
    from gpuopt.core.spec import Job
    from gpuopt.pipeline.search import optimize as searching

    batches = r.batches(batch)
    if len(batches) > 1 and goal == "latency":
        raise UsageError("a latency is one of a batch, and there are several", fix="--goal throughput, or one --batch")
    plain = {"backend": None, "precision": None, "channels_last": False, "fold_bn": False, "keep_fp32": None, "rewrite": None}
    first = {"batch": str(batches[0]) if batches else None}
    default = SearchSpec()
    job = Job(
        verb="optimize",
        candidates=r.candidates([model], {**typed, **plain, **first}),
        bench=r.bench(min_time=min_time, max_time=max_time, pairs=pairs, timeout=timeout, verify=verify, build_jobs=build_jobs),
        tolerance=r.tolerance(tolerance=tolerance, max_error=max_error),
        gates=r.gates(min_tflops=min_tflops, max_latency=max_latency, max_error=max_error),
        output=output,
        force=force,
        strict=strict,
        search=SearchSpec(
            goal=goal,
            latency_budget_ms=None if latency_budget is None else units.parse_seconds(latency_budget, default="ms") * 1e3,
            max_memory_bytes=None if max_memory is None else units.parse_bytes(max_memory),
            time_budget_s=None if time_budget is None else units.parse_seconds(time_budget),
            backends=_backends(backend),
            precisions=tuple(p.value for p in r.precisions(precision)),
            rewrites=_rewrites(rewrite),
            batches=batches if len(batches) > 1 else (),
            max_trials=max_trials or default.max_trials,
            finalists=finalists or default.finalists,
            dry_run=dry_run,
            resume=resume,
        ),
        command=r.command_line(),
    )
    return run(r.checked(job), searching.optimize, json=json, quiet=quiet, force=force, ask=not no_input)


def _rewrites(texts: Sequence[str] | None) -> tuple[str, ...] | None:
    """None where nothing was said; `none` alone is no rewrite at all."""
    from gpuopt.converters import rewrites

    if texts is None:
        return None
    return () if list(texts) == ["none"] else rewrites.checked(texts)


def _backends(texts: Sequence[str] | None) -> tuple[str, ...]:
    """As typed, each of which names a backend: a search would otherwise try a name that there is none of, and call it a failure."""
    from gpuopt.backends import BACKENDS, listed
    from gpuopt.cli import request as r
    from gpuopt.core.errors import UsageError

    for spec in r.backends(texts, preset=None, option=None):
        if spec.name not in BACKENDS:
            raise UsageError(f"no backend is called {spec.name[:60]!r}", fix=f"one of: {', '.join(listed())}")
    return tuple(texts or ())
