"""An engine built for fp16 that runs a third of its FLOPs in fp32, and one that honours it."""

from __future__ import annotations

from builders import MS, evidence

from gpuopt.core.result import OpRecord, PrecisionAudit
from gpuopt.doctor.evidence import Evidence

CODE = "GPU507"
FLOPS = 1e12


def engine(*, honoured: bool) -> Evidence:
    dtype = "float16" if honoured else "float32"
    rate = 0.9 * (750e12 if honoured else 50e12)
    last_ns = FLOPS / rate * 1e9
    records = (
        OpRecord(op="MatMul", module="layers.0", dtype="float16", time_ns=2 * FLOPS / 675e12 * 1e9, flops=2 * FLOPS, bytes=1e8),
        OpRecord(op="MatMul", module="head", dtype=dtype, time_ns=last_ns, flops=FLOPS, bytes=1e8),
    )
    audit = PrecisionAudit(
        shares={"float16": 1.0} if honoured else {"float16": 2 / 3, "float32": 1 / 3},
        method="engine inspector",
        honoured=honoured,
        requested="fp16",
        exceptions=() if honoured else ("head: float32, 33.3%",),
    )
    wall_ms = sum(r.time_ns or 0.0 for r in records) / MS
    return evidence(backend="trt", precision="fp16", records=records, audit=audit, wall_ms=wall_ms, batch=64)


def bad() -> Evidence:
    return engine(honoured=False)


def clean() -> Evidence:
    return engine(honoured=True)


GAIN_MS = FLOPS / 0.9 * (1 / 50e12 - 1 / 750e12) * 1e3
