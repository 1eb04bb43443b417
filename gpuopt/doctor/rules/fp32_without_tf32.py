"""GPU202: fp32 products run without tensor cores."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import Change, Precision
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

_SWITCHES = "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True, or --precision tf32"


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all fp32 matrix products and convolutions whose switch is off, on a GPU with a tf32 ceiling."""
    device = evidence.device
    assert device is not None
    if not evidence.on_gpu or not any(device.ceilings.flops("tf32", kind) for kind in ("measured", "spec")):
        return
    matrix_off, conv_off = (evidence.flags.get(name) is False for name in ("matmul_tf32", "cudnn_tf32"))
    rows = [
        r
        for r in evidence.records
        if r.dtype == "float32"
        and r.flops
        and r.time_ns
        and ((matrix_off and recast.is_matrix(r)) or (conv_off and recast.is_convolution(r)))
    ]
    if rows:
        yield _timed(evidence, rows)
    elif not evidence.records:
        yield from _static(evidence, matrix_off, conv_off)


def _timed(evidence: Evidence, rows: list[OpRecord]) -> Finding:
    taken, flops = recast.total_ms(rows), sum(r.flops or 0.0 for r in rows)
    worst = max(rows, key=lambda r: r.time_ns or 0.0)
    share = f", {words.share(taken / evidence.wall_ms)} of the call" if evidence.wall_ms else ""
    finding = Finding(
        code="",
        severity="warning",
        message=f"{words.number(sum(r.count for r in rows), 'fp32 product')} ({units.format_flops(flops)}) without TF32: {words.ms(taken)}{share}{_already(evidence, rows)}; half precision "
        "(GPU203) is the alternative, the two gains do not add up",
        fix=_SWITCHES,
        module=worst.module,
        op=worst.op,
        count=sum(r.count for r in rows),
        time_ms=taken,
        change=Change(precision=Precision.TF32),
    )
    return priced(finding, recast.saved_ms(evidence, rows, "tf32"), wall_ms=evidence.wall_ms)


def _already(evidence: Evidence, rows: list[OpRecord]) -> str:
    """What the user's own process does not lose: torch leaves TF32 on for convolutions and off for products; runs as `fp32` here have both off."""
    if evidence.precision is not None:
        return ""
    on = [r for r in rows if evidence.flags.get("own_cudnn_tf32" if recast.is_convolution(r) else "own_matmul_tf32")]
    if not on:
        return ""
    which = "all of it" if len(on) == len(rows) else f"{words.ms(recast.total_ms(on))} of it"
    return f", {which} in {'convolutions' if all(recast.is_convolution(r) for r in on) else 'products'} that your own process, with the switches as they are, runs in TF32 already"


def _static(evidence: Evidence, matrix_off: bool, conv_off: bool) -> Iterator[Finding]:
    """Before anything was timed: the layers that will run so."""
    wanted = [name for name, off in (("Linear", matrix_off), ("_ConvNd", conv_off)) if off]
    if modules.running(evidence, modules.own_dtype(evidence.module) or "") != "float32":
        return
    layers = [n for n, part in modules.parts(evidence.module).items() if modules.is_a(part, *wanted)]
    if layers:
        yield Finding(
            code="",
            severity="warning",
            message=f"{words.number(len(layers), 'fp32 layer')} without TF32: {words.listed(layers)}",
            fix=_SWITCHES,
            module=layers[0],
            count=len(layers),
            change=Change(precision=Precision.TF32),
        )


RULE = Rule(
    code="GPU202",
    name="fp32-without-tf32",
    what="fp32 matrix products and convolutions run on the plain cores because TF32 is off.",
    why="From Ampere on, tensor cores take fp32 numbers as TF32 (fp32's range, 10 bits of mantissa) at about 8 times the rate; PyTorch leaves that off for matrix products.",
    before="y = model(x)  # torch.backends.cuda.matmul.allow_tf32 is False by default",
    after="torch.set_float32_matmul_precision('high')\ntorch.backends.cudnn.allow_tf32 = True\ny = model(x)",
    safe=True,
    needs=frozenset({"device", "flags"}),
    find=find,
    source="rates are measured on this machine (gpuopt device); PyTorch notes, TensorFloat-32 on Ampere",
    has_change=True,
)
