"""A made-up GPU with round ceilings, so that everything above devices/ is tested exactly and without hardware."""

from __future__ import annotations

from gpuopt.core.result import Ceiling, Ceilings, Device

_MEASURED = {"fp64": 25e12, "fp32": 50e12, "tf32": 75e12, "fp16": 100e12, "bf16": 100e12, "fp8": 200e12, "int8": 200e12}
_BYTES = {
    "memory": 1e12,
    "read": 1e12,
    "copy": 0.9e12,
    "inplace": 0.95e12,
    "h2d": 50e9,
    "d2h": 50e9,
    "h2d_pageable": 10e9,
    "d2h_pageable": 10e9,
}
_SPEC_OVER_MEASURED = 1.25
_SOURCE = "made up: gpuopt/devices/null.py"

CEILINGS = Ceilings(
    rows=(
        *(Ceiling(quantity=q, value=v, unit="FLOP/s", kind="measured", source=_SOURCE) for q, v in _MEASURED.items()),
        *(Ceiling(quantity=q, value=v, unit="byte/s", kind="measured", source=_SOURCE) for q, v in _BYTES.items()),
        *(Ceiling(quantity=q, value=v * _SPEC_OVER_MEASURED, unit="FLOP/s", kind="spec", source=_SOURCE) for q, v in _MEASURED.items()),
        Ceiling(quantity="memory", value=_BYTES["memory"] * _SPEC_OVER_MEASURED, unit="byte/s", kind="spec", source=_SOURCE),
    )
)
"""100 TFLOP/s in fp16 and 1 TB/s measured, so its ridge lies at 100 FLOPs a byte; the data sheet promises a quarter more."""

DEVICE = Device(
    id="null",
    name="Null GPU",
    kind="null",
    uuid="null-0",
    capability="9.0",
    num_sms=100,
    memory_bytes=64 * 2**30,
    cache_bytes=32 * 2**20,
    driver="0.0",
    clocks_mhz={"sm": 1000, "sm_max": 1000, "memory": 1000, "memory_max": 1000},
    power_limit_w=500.0,
    temperature_c=40,
    other_processes=0,
    ceilings=CEILINGS,
)
