"""`gpuopt stream plan|run|bench|verify|pack MODEL --budget …`: a model larger than a budget of GPU memory, at the speed of the link."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpuopt.cli import options as o
from gpuopt.cli import stream_options as so

if TYPE_CHECKING:
    from gpuopt.core.streaming import StreamSpec


def stream(
    action: so.ActionArg,
    model: so.StreamModelArg,
    budget: so.BudgetOpt = None,
    pin_limit: so.PinLimitOpt = None,
    disk: so.DiskOpt = None,
    slots: so.SlotsOpt = None,
    granularity: so.GranularityOpt = "block",
    embed: so.EmbedOpt = "device",
    graphs: so.GraphsOpt = False,
    compile: so.CompileOpt = False,
    once: so.OnceOpt = False,
    elastic: so.ElasticOpt = False,
    arch: o.ArchOpt = None,
    trust: o.TrustOpt = None,
    trust_remote_code: o.RemoteCodeOpt = False,
    cast: o.CastOpt = False,
    allow_nonfinite: o.NonfiniteOpt = False,
    input: o.InputOpt = None,
    inputs: o.InputsOpt = None,
    batch: o.BatchOpt = None,
    dim: o.DimOpt = None,
    generate: so.StreamGenerateOpt = None,
    seed: o.SeedOpt = 0,
    device: so.StreamDeviceOpt = "auto",
    calls: so.CallsOpt = 20,
    forwards: so.ForwardsOpt = 20,
    rival: so.RivalOpt = None,
    alone: so.AloneOpt = False,
    timeout: o.TimeoutOpt = None,
    max_latency: o.MaxLatencyOpt = None,
    output: so.PackOutputOpt = None,
    json: o.JsonOpt = None,
    force: o.ForceOpt = False,
    quiet: o.QuietOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Run a model whose weights do not fit: blocks stay on the GPU as far as the budget goes, the others are copied in time.

    A forward takes at least max(compute, streamed bytes / link). plan says what that is for this model, this budget and this machine, what the schedule is
    predicted to take, where each byte goes, and when streaming is the wrong tool. Nothing is run with streamed weights.

    run streams the model on its inputs, or generates, and says what a forward took against the bound and the prediction.

    bench times it in turns with everything resident (where that fits) and, on a GPU, with other libraries at the same bytes (--rival); several budgets are a
    frontier: milliseconds over bytes on the device.

    verify compares with everything resident bit for bit: checksums on the device, outputs, tokens, slots full of NaN, copies at random moments, blocks in other
    orders. Anything unequal exits 1.

    pack writes one file a block for --disk, read past the page cache where host memory is smaller than the weights.

    Example: gpuopt stream plan gpuopt.models:bert_large --budget 25% --budget 50% --batch 8 --dim S=512 --device simulated

    Example: gpuopt stream bench gpuopt.models:llama_8b --budget 50% --generate 16 --dim S=128 --rival accelerate --rival mmgp
    """
    typed = dict(locals())
    from gpuopt.cli import request as r
    from gpuopt.cli.show import run
    from gpuopt.core.errors import UsageError
    from gpuopt.core.spec import Job
    from gpuopt.core.streamed import ACTIONS, StreamRequest
    from gpuopt.pipeline.streamed import command

    if action not in ACTIONS:
        raise UsageError(
            f"stream cannot {action[:60]!r} a model", fix="gpuopt stream plan MODEL --budget 50%; one of: " + ", ".join(ACTIONS)
        )
    command.require_known(device)
    # A device's text may hold commas, which are several devices elsewhere.
    plain = {"device": "auto", "precision": None, "channels_last": False, "fold_bn": False, "keep_fp32": None, "rewrite": None}
    job = Job(
        verb="stream",
        candidates=tuple(command.on(one, device) for one in r.candidates([model], {**typed, **plain})),
        bench=r.bench(timeout=timeout),
        gates=r.gates(max_latency=max_latency),
        output=(output or disk) if action == "pack" else output,
        force=force,
        stream=StreamRequest(
            action=action,
            specs=_specs(budget, typed),
            generate=generate,
            calls=calls,
            forwards=forwards,
            rivals=command.rivals_of(rival or None),
            alone=alone,
        ),
        command=r.command_line(),
    )
    return run(r.checked(job), command.stream, json=json, quiet=quiet, force=force, ask=not no_input)


def _specs(budgets: Sequence[str] | None, typed: dict[str, Any]) -> tuple[StreamSpec, ...]:
    """One a budget. Raises UsageError for one that is none."""
    from gpuopt.core import units
    from gpuopt.pipeline.streamed import command

    return tuple(
        command.spec_of(
            text,
            pin_limit_bytes=None if typed["pin_limit"] is None else units.parse_bytes(typed["pin_limit"]),
            disk=typed["disk"],
            num_slots=typed["slots"],
            granularity=typed["granularity"],
            embed=typed["embed"],
            graphs=typed["graphs"],
            compile=typed["compile"],
            once=typed["once"],
            elastic=typed["elastic"],
        )
        for text in budgets or ()
    )
