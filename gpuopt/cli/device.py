"""`gpuopt device`: what this machine is, and the ceilings measured on it."""

from __future__ import annotations

from gpuopt.cli import options as o


def device(
    device: o.DeviceOpt = "auto",
    refresh: o.RefreshOpt = False,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """What this machine is and what it can do: each ceiling measured, beside its data sheet.

    Ceilings are measured once for a device and driver, then read from a cache.

    Example: gpuopt device --device cuda:1 --refresh
    """
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import jobs

    job = Job(verb="device", device=device, refresh=refresh, command=r.command_line())
    return run(r.checked(job), jobs.device, json=json, quiet=quiet, force=force)
