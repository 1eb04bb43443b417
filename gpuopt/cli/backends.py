"""`gpuopt backends [MODEL]`: the matrix of what can run here, and why the rest cannot."""

from __future__ import annotations

from gpuopt.cli import options as o


def backends(
    model: o.MaybeModelArg = None,
    arch: o.ArchOpt = None,
    trust: o.TrustOpt = None,
    trust_remote_code: o.RemoteCodeOpt = False,
    cast: o.CastOpt = False,
    allow_nonfinite: o.NonfiniteOpt = False,
    device: o.DeviceOpt = "auto",
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """What can run here, and why the rest cannot.

    Without a model, every backend in general; with one, what its form allows, precision by precision.

    Example: gpuopt backends model.onnx
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import jobs
    from gpuopt.pipeline.recipe import expand

    refs = r.models(
        [model] if model else [], arch=arch, trust=trust, trust_remote_code=trust_remote_code, cast=cast, allow_nonfinite=allow_nonfinite
    )
    job = Job(verb="backends", candidates=expand(models=refs, device=device), device=device, command=r.command_line())
    return run(r.checked(job), jobs.backends, json=json, quiet=quiet, force=force, ask=not no_input)
