"""GPU206: NaN or Inf in half precision."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.core.spec import Change, Precision
from gpuopt.doctor import modules
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

FP16_MAX = 65504
"""Largest finite fp16 number (IEEE 754)."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the first module that made it, and how much of the outputs is lost."""
    first = evidence.first_nonfinite
    asked = (
        modules.running(evidence, modules.own_dtype(evidence.module) or "float32") if evidence.module is not None else evidence.precision
    )
    lost = [(name, *_lost(t)) for name, t in modules.given(evidence.outputs) if _is_half(t, asked)]
    # Minus infinity alone is how masked scores are written on purpose.
    bad = [(name, nan, inf, total) for name, nan, inf, minus, total in lost if nan or inf or (minus and first is not None)]
    if first is None and not bad:
        return
    dtype = (
        next((modules.dtype(t) for _, t in modules.given(evidence.outputs) if modules.dtype(t) in modules.HALVES), None) or asked or "half"
    )
    is_fp16 = dtype in ("float16", "fp16")
    where = (
        f"{first or 'the root'} is the first module whose output holds NaN or Inf in {dtype} and none in fp32" if first is not None else ""
    )
    figures = "; ".join(f"{name} holds {nan} NaN and {inf} Inf of {total}" for name, nan, inf, total in bad[:3])
    can_bf16 = evidence.device is None or evidence.device.kind != "cuda" or bool(evidence.device.ceilings.flops("bfloat16", "measured"))
    keep = f"--keep-fp32 {first}" if first else "--keep-fp32 MODULE"
    yield Finding(
        code="",
        severity="error",
        message="; ".join(t for t in (where, f"of the outputs in {dtype}, {figures}" if figures else "") if t)
        + (f" (fp16 ends at {FP16_MAX}, bf16 at 3.4e38)" if is_fp16 else ""),
        fix=f"--precision bf16, or {keep}" if is_fp16 and can_bf16 else keep,
        module=first,
        line=modules.line(evidence.module, first) if first is not None else None,
        count=sum(nan + inf for _, nan, inf, _ in bad) or None,
        change=Change(precision=Precision.BF16) if is_fp16 and can_bf16 else None,
    )


def _is_half(tensor: object, asked: str | None) -> bool:
    """A half output, or a wider one of a model that computed in half."""
    own = modules.dtype(tensor)
    return own in modules.HALVES or (own in modules.FLOATS and asked in (*modules.HALVES, "fp16", "bf16"))


def _lost(tensor: object) -> tuple[int, int, int, int]:
    """(NaN, +Inf, -Inf, elements)."""
    import torch

    assert isinstance(tensor, torch.Tensor)
    if tensor.device.type == "meta":
        return 0, 0, 0, tensor.numel()
    return int(torch.isnan(tensor).sum()), int(torch.isposinf(tensor).sum()), int(torch.isneginf(tensor).sum()), tensor.numel()


RULE = Rule(
    code="GPU206",
    name="nonfinite-in-half",
    what="The model gives NaN or Inf in half precision.",
    why="fp16 ends at 65504: a large activation, a sum of squares or a mask of -1e9 overflows to Inf, and Inf minus Inf or 0 times Inf is NaN from there on.",
    before="gpuopt bench MODEL --precision fp16",
    after="gpuopt bench MODEL --precision bf16",
    safe=False,
    needs=frozenset({"model"}),
    find=find,
    source="IEEE 754 binary16",
    has_change=True,
)
