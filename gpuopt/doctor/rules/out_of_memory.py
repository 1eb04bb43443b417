"""GPU704: a call ran out of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.core.spec import Change
from gpuopt.doctor import failure, footprint, frames
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

USABLE = 0.9
"""Of the device's memory: CUDA's context, workspaces and the allocator's rounding take the rest."""
_SIZE = r"(?P<{0}>[\d.]+) ?(?P<{0}_unit>bytes|[KMGT]iB|[KMGT]B|B)"
_ASKED = re.compile(r"[Tt]ried to allocate " + _SIZE.format("asked"))
_FREE = re.compile(r"of which " + _SIZE.format("free") + r" is free")
_CAPACITY = re.compile(r"total capacity of " + _SIZE.format("total"))


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: where, how much was asked, what the call needs by its shapes, and the largest batch that fits by them."""
    error = evidence.failure
    if error is None or failure.kind(error) != "memory":
        return
    failed = failure.locate(evidence.module, evidence.inputs, error)
    asked, free = _bytes(_ASKED, "asked", str(error)), _bytes(_FREE, "free", str(error))
    total = evidence.device.memory_bytes if evidence.device is not None else None
    total = total or (None if (parsed := _bytes(_CAPACITY, "total", str(error))) is None else round(parsed))
    where = f" in {failed.where}" if failed is not None else ""
    said = f"out of memory{where}"
    said += f": {units.format_bytes(asked)} more were asked for" if asked is not None else ""
    said += f", {units.format_bytes(free)} were free" if free is not None else ""
    said += f" of {units.format_bytes(total)}" if total else ""
    grad = bool(evidence.flags.get("grad_enabled", False))
    needs = (
        footprint.measure(evidence.module, evidence.inputs, grad=grad) if frames.is_module(evidence.module) and evidence.inputs else None
    )
    change, fix = None, ""
    if needs is not None and total:
        batch = evidence.batch if evidence.batch > 1 else evidence.inputs.batch if evidence.inputs is not None else 1
        fits = needs.largest_batch(batch, USABLE * total)
        said += (
            f"; by its shapes a call needs {units.format_bytes(needs.weight_bytes)} of weights"
            f" and {units.format_bytes(needs.activation_bytes)} for {batch} sample{'s' if batch > 1 else ''}"
        )
        if fits >= batch:
            fix = "by its shapes it should fit: see what else holds memory (nvidia-smi), and set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        elif fits >= 1:
            fits -= fits % 8 if fits >= 16 else 0  # batches that are no multiple of 8 cost tensor cores their shape
            change = Change(dims={"N": fits})
            fix = f"--dim N={fits}, the largest batch that should fit"
        elif needs.weight_bytes > USABLE * total:
            fix = "the weights alone do not fit: a smaller format (--precision bf16), or stream them from the host"
    fix = fix or ("a smaller batch" if evidence.batch > 1 else "shorter inputs or a smaller format (--precision bf16)")
    if grad:
        fix = f"torch.inference_mode() around the call: without it every activation is kept for a backward pass; then {fix}"
    yield Finding(
        code="",
        severity="error",
        message=said,
        fix=fix,
        module=failed.module_name if failed is not None else None,
        line=failed.line if failed is not None else None,
        op=failed.code or None if failed is not None else None,
        bytes=asked,
        change=change,
    )


def _bytes(pattern: re.Pattern[str], name: str, text: str) -> float | None:
    match = pattern.search(text)
    if match is None:
        return None
    unit = match[f"{name}_unit"]
    return float(units.parse_bytes(match[name] + ("B" if unit == "bytes" else unit)))


RULE = Rule(
    code="GPU704",
    name="out-of-memory",
    what="A call needs more memory than there is.",
    why="Weights, the largest activations that live at one time, and the workspaces of the libraries must fit together.",
    before="model(batch)  # 256 samples",
    after="for part in batch.split(96):\n    model(part)",
    safe=False,
    needs=frozenset({"failure"}),
    find=find,
    source="the exception; a call on fake tensors, whose live bytes are counted; all but the weights taken to grow with the batch",
    has_change=True,
)
