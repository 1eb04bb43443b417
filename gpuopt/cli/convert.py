"""`gpuopt convert MODEL -o FILE`: a model -> another precision, layout or file form, verified."""

from __future__ import annotations

from gpuopt.cli import options as o


def convert(
    model: o.ModelArg,
    output: o.OutputFileOpt,
    to: o.ToOpt = None,
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
    precision: o.PrecisionOpt = None,
    channels_last: o.ChannelsLastOpt = False,
    fold_bn: o.FoldOpt = False,
    rewrite: o.RewriteOpt = None,
    keep_fp32: o.KeepOpt = None,
    device: o.DeviceOpt = "auto",
    timeout: o.TimeoutOpt = None,
    verify: o.VerifyOpt = "full",
    tolerance: o.ToleranceOpt = None,
    max_error: o.MaxErrorOpt = None,
    allow_inaccurate: o.AllowInaccurateOpt = False,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Change a model's precision, layout or file form, and verify the change.

    Writes ONNX (checked by loading and running it again), .pt2 or safetensors. Integer inputs stay integers, tied weights stay tied.
    A result that fails verification is not written.

    Example: gpuopt convert model.pt --precision fp16 --channels-last --fold-bn -o model.onnx
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.errors import UsageError
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import jobs
    from gpuopt.pipeline.recipe import expand

    if to is not None and to not in ("onnx", "pt2", "safetensors"):
        raise UsageError(f"--to {to!r} is unknown", fix="one of: onnx, pt2, safetensors")
    job = Job(
        verb="convert",
        candidates=expand(
            models=r.models(
                [model], arch=arch, trust=trust, trust_remote_code=trust_remote_code, cast=cast, allow_nonfinite=allow_nonfinite
            ),
            inputs=r.inputs(input=input, inputs=inputs, batch=batch, dim=dim, seed=seed),
            precisions=r.precisions([precision] if precision else None),
            transforms=r.transforms(channels_last=channels_last, fold_bn=fold_bn, keep_fp32=keep_fp32, rewrite=rewrite),
            device=device,
        ),
        bench=r.bench(timeout=timeout, verify=verify),
        tolerance=r.tolerance(tolerance=tolerance, max_error=max_error),
        output=output,
        to=to,
        force=force,
        allow_inaccurate=allow_inaccurate,
        command=r.command_line(),
    )
    return run(r.checked(job), jobs.convert, json=json, quiet=quiet, force=force, ask=not no_input)
