"""Two copies in the middle of an ONNX graph, and none."""

from __future__ import annotations

from builders import MS, evidence

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU506"
COPY_NS = 0.4 * MS


def graph(*, copies: bool) -> Evidence:
    rows = [OpRecord(op="MatMul", module="node_MatMul_1", dtype="float16", time_ns=8.0 * MS, flops=5e12, bytes=2e8)]
    if copies:
        rows += [OpRecord(op=f"Memcpy{way}Host", module=f"Memcpy_{way}", count=2, time_ns=2 * COPY_NS, bytes=2e7) for way in ("To", "From")]
    return evidence(backend="ort", preset="cuda", precision="fp16", records=tuple(rows), wall_ms=8.0 + (1.8 if copies else 0.0), batch=64)


def bad() -> Evidence:
    return graph(copies=True)


def clean() -> Evidence:
    return graph(copies=False)


GAIN_MS = 1.5
