"""`gpuopt bench MODEL…`: candidates -> verified times beside their ceilings, and gates."""

from __future__ import annotations

from gpuopt.cli import options as o


def bench(
    models: o.ModelsArg,
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
    backend: o.BackendsOpt = None,
    preset: o.PresetOpt = None,
    option: o.OptionOpt = None,
    precision: o.PrecisionsOpt = None,
    channels_last: o.ChannelsLastOpt = False,
    fold_bn: o.FoldOpt = False,
    rewrite: o.RewriteOpt = None,
    keep_fp32: o.KeepOpt = None,
    device: o.DevicesOpt = "auto",
    input_mode: o.InputModeOpt = "device",
    generate: o.GenerateOpt = None,
    min_time: o.MinTimeOpt = None,
    max_time: o.MaxTimeOpt = None,
    pairs: o.PairsOpt = None,
    sustained: o.SustainedOpt = "auto",
    build_jobs: o.BuildJobsOpt = None,
    timeout: o.TimeoutOpt = None,
    verify: o.VerifyOpt = "full",
    tolerance: o.ToleranceOpt = None,
    max_error: o.MaxErrorOpt = None,
    eval_data: o.EvalDataOpt = None,
    metric: o.MetricOpt = None,
    min_metric_ratio: o.MinMetricRatioOpt = None,
    metric_lower_is_better: o.LowerIsBetterOpt = False,
    calib: o.CalibOpt = None,
    min_tflops: o.MinTflopsOpt = None,
    max_latency: o.MaxLatencyOpt = None,
    baseline: o.BaselineOpt = None,
    max_slowdown: o.MaxSlowdownOpt = None,
    allow_inconclusive: o.InconclusiveOpt = False,
    strict: o.StrictOpt = False,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Time models and bundles, verified, beside the ceilings of this machine.

    Every model, backend, precision, batch and input mode given is combined with every other. Each candidate lives in a process of its own;
    those of the same shape are timed in interleaved blocks, so that a slow moment of the machine hits all of them. A crash or a lack of memory
    is a result with a reason, and the rest goes on.

    Several devices are compared over batch: curves of both, the batch from which on the one wins, what the other waits for, and the largest batch that
    memory allows. Without --batch they double from 1 as far as time and memory go. No two devices are ever timed at the same time.

    Example: gpuopt bench model.pt -b eager -b inductor -p fp32 -p fp16 --batch 1,64 --max-latency 15ms

    With --generate N, a call is a whole greedy generation: generate() as shipped against a static cache with compiled steps in CUDA graphs,
    tokens compared, tokens a second beside what reading the weights allows. Of backends, eager, cudagraphs and inductor generate.

    Example: gpuopt bench model.pt --device cpu,cuda

    Example: gpuopt bench gpuopt.models:llama_8b --generate 128 --dim S=128
    """
    typed = dict(locals())
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.generation import GenerateSpec
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import jobs

    candidates = r.candidates(models, typed)
    job = Job(
        verb="bench",
        candidates=candidates,
        bench=r.bench(
            min_time=min_time, max_time=max_time, pairs=pairs, timeout=timeout, verify=verify, sustained=sustained, build_jobs=build_jobs
        ),
        tolerance=r.tolerance(tolerance=tolerance, max_error=max_error),
        gates=r.gates(
            min_tflops=min_tflops,
            max_latency=max_latency,
            max_error=max_error,
            baseline=baseline,
            max_slowdown=max_slowdown,
            allow_inconclusive=allow_inconclusive,
        ),
        strict=strict,
        generate=None if generate is None else GenerateSpec(new_tokens=generate, backends_named=bool(backend)),
        command=r.command_line(),
    )
    return run(r.checked(job), jobs.bench, json=json, quiet=quiet, force=force, ask=not no_input)
