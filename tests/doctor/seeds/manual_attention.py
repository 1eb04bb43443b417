"""BERT's attention written out in fp16, 16 heads of 64 over 512 tokens, and the same fused. Records are those of gpuopt's own count with times by bytes."""

from __future__ import annotations

from builders import MS, evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU305"
BATCH, HEADS, S, D = 64, 16, 512, 64
_MATRIX = BATCH * HEADS * S * S * 2.0
_FLOPS = 2.0 * BATCH * HEADS * S * S * D
_SIDE = f"{BATCH}x{HEADS}x{S}x{S}"
_ROWS = BATCH * HEADS


def row(op: str, shapes: str, num_bytes: float, flops: float = 0.0) -> OpRecord:
    """At 90% of the memory's or the products' ceiling, whichever is slower."""
    time_ns = max(num_bytes / 4e12, flops / 750e12) / 0.9 * 1e9
    return OpRecord(op=op, module="attention", dtype="float16", time_ns=time_ns, flops=flops, bytes=num_bytes, shapes=shapes)


def bad() -> Evidence:
    rows = (
        row("aten.bmm", f"{_ROWS}x{S}x{D}, {_ROWS}x{D}x{S}", _MATRIX, _FLOPS),
        row("aten.div", _SIDE, 2 * _MATRIX),
        row("aten.add", f"{_SIDE}, {BATCH}x1x1x{S}", 2 * _MATRIX),
        row("aten._softmax", _SIDE, 2 * _MATRIX),
        row("aten.bmm", f"{_ROWS}x{S}x{S}, {_ROWS}x{S}x{D}", _MATRIX, _FLOPS),
    )
    return evidence(records=rows, wall_ms=sum(r.time_ns or 0.0 for r in rows) / MS + 0.1)


def clean() -> Evidence:
    """Fused; and a softmax over classes, which no product reads."""
    shape = f"{BATCH}x{HEADS}x{S}x{D}"
    rows = (
        row("aten._scaled_dot_product_flash_attention", ", ".join([shape] * 3), 4 * BATCH * HEADS * S * D * 2.0, 2 * _FLOPS),
        row("aten._softmax", f"{BATCH}x{S}x1024", BATCH * S * 1024 * 4.0),
    )
    return evidence(records=rows, wall_ms=sum(r.time_ns or 0.0 for r in rows) / MS + 0.05)


GAIN_MS = (8 * _MATRIX / 4e12 / 0.9 - 2 * _FLOPS / (0.45 * 750e12)) * 1e3
"""8 passes over the matrix in all, for two products at 45% of the ceiling."""
