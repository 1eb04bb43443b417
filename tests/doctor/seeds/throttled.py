"""A fifth of the time slowed by heat, and a hundredth."""

from __future__ import annotations

from dataclasses import replace

from builders import GPU, evidence

from gpuopt.doctor.evidence import Evidence

CODE = "GPU601"
HOT = replace(GPU, temperature_c=92, clocks_mhz={"sm": 1200, "sm_max": 1980})


def bad() -> Evidence:
    return evidence(device=HOT, throttled_ms={"power": 0.0, "thermal": 2000.0, "software thermal": 2000.0}, measured_ms=10_000.0)


def clean() -> Evidence:
    return evidence(device=HOT, throttled_ms={"power": 0.0, "thermal": 100.0, "software thermal": 100.0}, measured_ms=10_000.0)
