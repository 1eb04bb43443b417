"""`gpuopt profile MODEL`: one candidate -> where its time goes."""

from __future__ import annotations

from gpuopt.cli import options as o


def profile(
    model: o.ModelArg,
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
    backend: o.BackendOpt = None,
    preset: o.PresetOpt = None,
    option: o.OptionOpt = None,
    precision: o.PrecisionOpt = None,
    channels_last: o.ChannelsLastOpt = False,
    fold_bn: o.FoldOpt = False,
    keep_fp32: o.KeepOpt = None,
    device: o.DeviceOpt = "auto",
    input_mode: o.InputModeOpt = "device",
    min_time: o.MinTimeOpt = None,
    max_time: o.MaxTimeOpt = None,
    timeout: o.TimeoutOpt = None,
    verify: o.VerifyOpt = "full",
    depth: o.DepthOpt = 3,
    top: o.TopOpt = 10,
    by: o.ByOpt = "time",
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Where the time goes, and how far that is from what the machine can do.

    Shows the time a call with its share of the measured ceiling, a waterfall of the wall time, the module tree, and each op against the roofline.
    Needs nothing but the model: inputs come from its file or configuration, or are guessed from its first layer, and the guess is told.

    Example: gpuopt profile model.pt --batch 64 --precision fp16
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import jobs
    from gpuopt.pipeline.recipe import expand
    from gpuopt.reports.content.blocks import View

    view = View(depth=depth, top=top, by=by)
    candidates = expand(
        models=r.models([model], arch=arch, trust=trust, trust_remote_code=trust_remote_code, cast=cast, allow_nonfinite=allow_nonfinite),
        inputs=r.inputs(input=input, inputs=inputs, batch=batch, dim=dim, seed=seed),
        backends=r.backends([backend] if backend else None, preset=preset, option=option),
        precisions=r.precisions([precision] if precision else None),
        transforms=r.transforms(channels_last=channels_last, fold_bn=fold_bn, keep_fp32=keep_fp32),
        input_modes=r.input_modes(input_mode),
        device=device,
    )
    job = Job(
        verb="profile",
        candidates=candidates,
        bench=r.bench(min_time=min_time, max_time=max_time, timeout=timeout, verify=verify),
        depth=depth,
        command=r.command_line(),
    )
    return run(r.checked(job), jobs.profile, json=json, quiet=quiet, force=force, ask=not no_input, view=view)
