"""`gpuopt doctor [MODEL]`: findings, the worst first; without a model, about the machine; --explain for a rule's page."""

from __future__ import annotations

import shutil
import sys
import textwrap

from gpuopt.cli import options as o


def doctor(
    model: o.MaybeModelArg = None,
    explain: o.ExplainOpt = None,
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
    fix: o.FixOpt = False,
    unsafe_fixes: o.UnsafeFixesOpt = False,
    fail_on: o.FailOnOpt = None,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """What breaks or slows a model, what each change would give back, and with --fix what it did give back.

    A model that does not run is diagnosed too: which module, which tensor, and the change that mends it. Without a model the machine is looked at:
    versions that do not go together, a driver too old, a GPU that others use.

    Example: gpuopt doctor model.pt --batch 64 --fix
    """
    typed = dict(locals())
    from gpuopt.cli import configuration, streams
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.errors import UsageError
    from gpuopt.core.spec import Job
    from gpuopt.pipeline import doctor as verb

    if explain is not None:
        from gpuopt.doctor import handbook

        streams.emit(_readable(handbook.text(explain)))
        return 0
    if fail_on is not None and fail_on not in verb.SEVERITIES:
        raise UsageError(f"--fail-on {fail_on!r} is unknown", fix="one of: " + ", ".join(verb.SEVERITIES))
    if unsafe_fixes and not fix:
        raise UsageError("--unsafe-fixes says which changes --fix may make", fix="--fix --unsafe-fixes")
    if fix and model is None:
        raise UsageError("--fix changes a model, and none is named", fix="gpuopt doctor MODEL --fix")
    candidates = r.candidates([model], typed) if model is not None else ()
    job = Job(
        verb="doctor",
        candidates=candidates,
        bench=r.bench(min_time=min_time, max_time=max_time, timeout=timeout, verify=verify),
        ignore=configuration.ignored(ignore),
        fix=fix,
        unsafe_fixes=unsafe_fixes,
        fail_on=fail_on,
        device=device,
        command=r.command_line(),
    )
    return run(r.checked(job), verb.doctor, json=json, quiet=quiet, force=force, ask=not no_input)


def _readable(page: str) -> str:
    """Markdown with its prose broken between words for a terminal; code, tables and what is piped stay as they are."""
    from gpuopt.cli import streams

    if not streams.is_terminal(sys.stdout):
        return page
    width = shutil.get_terminal_size().columns
    lines, is_code = [], False
    for line in page.splitlines():
        is_code ^= line.startswith("```")
        keep = is_code or not line or line.startswith(("|", "```"))
        lines += [line] if keep else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"
