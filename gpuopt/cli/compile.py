"""`gpuopt compile MODEL --backend B -o DIR`: one candidate -> a verified bundle."""

from __future__ import annotations

from gpuopt.cli import options as o


def compile(
    model: o.ModelArg,
    backend: o.RequiredBackendOpt,
    output: o.OutputFolderOpt,
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
    preset: o.PresetOpt = None,
    option: o.OptionOpt = None,
    precision: o.PrecisionOpt = None,
    channels_last: o.ChannelsLastOpt = False,
    fold_bn: o.FoldOpt = False,
    rewrite: o.RewriteOpt = None,
    keep_fp32: o.KeepOpt = None,
    device: o.DeviceOpt = "auto",
    build_only: o.BuildOnlyOpt = False,
    min_time: o.MinTimeOpt = None,
    max_time: o.MaxTimeOpt = None,
    timeout: o.TimeoutOpt = None,
    verify: o.VerifyOpt = "full",
    tolerance: o.ToleranceOpt = None,
    max_error: o.MaxErrorOpt = None,
    eval_data: o.EvalDataOpt = None,
    metric: o.MetricOpt = None,
    min_metric_ratio: o.MinMetricRatioOpt = None,
    metric_lower_is_better: o.LowerIsBetterOpt = False,
    calib: o.CalibOpt = None,
    allow_inaccurate: o.AllowInaccurateOpt = False,
    min_tflops: o.MinTflopsOpt = None,
    max_latency: o.MaxLatencyOpt = None,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Build one backend, verify it, time it against the model as it is, and write a bundle.

    A bundle is a folder with the artifact, its hashes, what it was built for, and the evidence that it is right and how fast it is.
    A build that fails verification never becomes one, unless --allow-inaccurate. bench and the library load it again.

    Example: gpuopt compile model.pt -b inductor:freezing -p fp16 --batch 64 -o fast/
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import jobs
    from gpuopt.pipeline.recipe import expand

    job = Job(
        verb="compile",
        candidates=expand(
            models=r.models(
                [model], arch=arch, trust=trust, trust_remote_code=trust_remote_code, cast=cast, allow_nonfinite=allow_nonfinite
            ),
            inputs=r.inputs(input=input, inputs=inputs, batch=batch, dim=dim, seed=seed),
            backends=r.backends([backend], preset=preset, option=option),
            precisions=r.precisions([precision] if precision else None),
            transforms=r.transforms(channels_last=channels_last, fold_bn=fold_bn, keep_fp32=keep_fp32, rewrite=rewrite),
            device=device,
            evaluation=r.evaluation(
                eval_data=eval_data,
                metric=metric,
                min_metric_ratio=min_metric_ratio,
                metric_lower_is_better=metric_lower_is_better,
                calib=calib,
            ),
        ),
        bench=r.bench(min_time=min_time, max_time=max_time, timeout=timeout, verify=verify),
        tolerance=r.tolerance(tolerance=tolerance, max_error=max_error),
        gates=r.gates(min_tflops=min_tflops, max_latency=max_latency, max_error=max_error),
        output=output,
        force=force,
        allow_inaccurate=allow_inaccurate,
        build_only=build_only,
        command=r.command_line(),
    )
    return run(r.checked(job), jobs.compile, json=json, quiet=quiet, force=force, ask=not no_input)
