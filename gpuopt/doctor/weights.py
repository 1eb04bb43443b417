"""Records -> how much of the products' traffic is weights: what tells a small batch, and decoding, from everything else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuopt.core.result import OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.doctor import modules, recast, transfers
from gpuopt.doctor.evidence import Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """The products of one call, summed. Attention is left out: it reads no weights."""

    time_ms: float
    share: float
    """Of the time of all records, 0..1."""
    flops: float
    bytes: float
    weight_bytes: float
    """Of all parameters as they run, at most `bytes`; an embedding's table counts only where its rows were read."""
    dtype: str
    """Of most FLOPs."""
    ridge: float
    """FLOPs a byte from which this device is bound by compute in that dtype."""
    bandwidth: float
    """Measured, bytes a second."""

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """Bytes a second while they run."""
        return self.bytes / self.time_ms * 1e3


def products(evidence: Evidence) -> Products | None:
    """None where there are no products with times, bytes and ceilings, or the parameters are unknown."""
    device = evidence.device
    if device is None:
        return None
    rows = [r for r in evidence.records if r.flops and r.bytes and r.time_ns and (recast.is_matrix(r) or recast.is_convolution(r))]
    total_ns = math.fsum(r.time_ns or 0.0 for r in evidence.records)
    bandwidth = device.ceilings.bandwidth("measured")
    whole = transfers.parameter_bytes(evidence)
    if not rows or not total_ns or not bandwidth or not whole:
        return None
    by_dtype: dict[str, float] = {}
    for row in rows:
        by_dtype[row.dtype or ""] = by_dtype.get(row.dtype or "", 0.0) + (row.flops or 0.0)
    dtype = max(by_dtype, key=lambda d: by_dtype[d])
    peak = device.ceilings.flops(dtype, "measured")
    if not peak:
        return None
    moved = _sum(rows, "bytes")
    return Products(
        time_ms=_sum(rows, "time_ns") / 1e6,
        share=_sum(rows, "time_ns") / total_ns,
        flops=_sum(rows, "flops"),
        bytes=moved,
        weight_bytes=min(max(0.0, whole - _tables(evidence)), moved),
        dtype=dtype,
        ridge=peak / bandwidth,
        bandwidth=bandwidth,
    )


def _sum(rows: list[OpRecord], field: str) -> float:
    return math.fsum(getattr(r, field) or 0.0 for r in rows)


def _tables(evidence: Evidence) -> float:
    """Bytes of embedding tables that are no product's weight too: read by row, never whole."""
    if evidence.module is None:
        return 0.0
    tables = {
        id(part.weight): part.weight
        for part in modules.parts(evidence.module).values()
        if modules.is_a(part, "Embedding", "EmbeddingBag") and modules.is_tensor(getattr(part, "weight", None))
    }
    tied = {
        id(part.weight)
        for part in modules.parts(evidence.module).values()
        if modules.is_a(part, "Linear") and modules.is_tensor(getattr(part, "weight", None))
    }
    return float(
        sum(t.numel() * DTYPE_BYTES.get(modules.running(evidence, modules.dtype(t)), 0) for key, t in tables.items() if key not in tied)
    )
