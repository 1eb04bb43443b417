"""`gpuopt profile MODEL`: one candidate, a program, or a trace from elsewhere -> where its time goes."""

from __future__ import annotations

from gpuopt.cli import options as o


def profile(
    model: o.MaybeModelArg = None,
    program: o.ProgramArg = None,
    trace: o.TraceOpt = None,
    trace_limit: o.TraceLimitOpt = None,
    trace_events: o.TraceEventsOpt = None,
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
    rewrite: o.RewriteOpt = None,
    keep_fp32: o.KeepOpt = None,
    device: o.DeviceOpt = "auto",
    input_mode: o.InputModeOpt = "device",
    min_time: o.MinTimeOpt = None,
    max_time: o.MaxTimeOpt = None,
    timeout: o.TimeoutOpt = None,
    verify: o.VerifyOpt = "full",
    ignore: o.IgnoreOpt = None,
    save_inputs: o.SaveInputsOpt = None,
    no_trace: o.NoTraceOpt = False,
    depth: o.DepthOpt = 3,
    top: o.TopOpt = 10,
    by: o.ByOpt = "",
    sort: o.SortOpt = "time",
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Where the time goes, and how far that is from what the machine can do.

    Shows the time a call with its share of the measured ceiling, a waterfall of the wall time, the module tree, each op against the roofline, and
    what to change. Needs nothing but the model: inputs come from its file or configuration, or are guessed from its first layer, and the guess is told.

    A program of yours is run once as it stands, and its models, weight loads, waits and copies are found by source line. A trace made elsewhere is
    explained without its model.

    Example: gpuopt profile model.pt --batch 64 --precision fp16

    Example: gpuopt profile -- python infer.py --images photos/

    Example: gpuopt profile --trace production.json.gz
    """
    typed = dict(locals())
    from gpuopt.cli import configuration
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.errors import UsageError
    from gpuopt.core.spec import Job
    from gpuopt.reports.content.blocks import View

    view = View(depth=depth, top=top, by=by, sort=sort)
    ignored = configuration.ignored(ignore)
    words = [model, *(program or [])] if model is not None else []
    is_program = len(words) > 1 or (model is not None and model.endswith(".py"))
    if sum((trace is not None, bool(words))) != 1:
        raise UsageError(
            "profile takes one of a model, a program and a trace",
            fix="gpuopt profile MODEL, gpuopt profile -- python SCRIPT, or --trace FILE",
        )
    if trace is not None or is_program:
        from gpuopt.cli import observed

        job = Job(verb="profile", device=device, ignore=ignored, command=r.command_line())
        act = (
            observed.trace(trace, limit=trace_limit, max_events=trace_events)
            if trace is not None
            else observed.program(words, timeout=timeout, save_inputs=save_inputs, traced=not no_trace)
        )
        return run(r.checked(job), act, json=json, quiet=quiet, force=force, ask=False, view=view)
    assert model is not None
    from gpuopt.pipeline import jobs  # torch comes with it: what is told above needs none

    candidates = r.candidates([model], typed)
    job = Job(
        verb="profile",
        candidates=candidates,
        bench=r.bench(min_time=min_time, max_time=max_time, timeout=timeout, verify=verify),
        depth=depth,
        ignore=ignored,
        command=r.command_line(),
    )
    return run(r.checked(job), jobs.profile, json=json, quiet=quiet, force=force, ask=not no_input, view=view)
