"""Half of the time under the power cap, and hardly any."""

from __future__ import annotations

from dataclasses import replace

from builders import GPU, evidence

from gpuopt.core.result import Ceiling, Ceilings
from gpuopt.doctor.evidence import Evidence

CODE = "GPU602"
WARM = replace(
    GPU,
    ceilings=Ceilings(rows=(*GPU.ceilings.rows, Ceiling(quantity="bf16", value=640e12, unit="FLOP/s", kind="sustained", source="made up"))),
)


def bad() -> Evidence:
    return evidence(device=WARM, precision="bf16", throttled_ms={"power": 5000.0, "thermal": 0.0}, measured_ms=10_000.0)


def clean() -> Evidence:
    return evidence(device=WARM, precision="bf16", throttled_ms={"power": 200.0, "thermal": 0.0}, measured_ms=10_000.0)
