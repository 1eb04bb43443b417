"""GPU601: the GPU slowed down because of heat or its power supply while it was measured."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

HEAT = ("thermal", "hardware thermal", "software thermal")
BRAKE = ("power brake",)
SHARE = 0.05
"""Of the measured time: less moves no median."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding with the worst counter of each kind: NVML counts the same slowdown under several names, so they are not summed."""
    assert evidence.measured_ms is not None
    lost = {
        kind: max(evidence.throttled_ms.get(name, 0.0) for name in names) for kind, names in (("heat", HEAT), ("the power brake", BRAKE))
    }
    worst = max(lost, key=lambda kind: lost[kind])
    share = min(1.0, lost[worst] / evidence.measured_ms) if evidence.measured_ms > 0 else 0.0
    if share <= SHARE:
        return
    yield Finding(
        code="",
        severity="warning",
        message=f"the GPU was slowed by {worst} for {words.share(share)} of the {evidence.measured_ms / 1e3:.3g} s measured{_state(evidence)}: these figures are too slow",
        fix="check fans and air flow (nvidia-smi -q -d TEMPERATURE,PERFORMANCE), let it cool, and measure again"
        if worst == "heat"
        else "the server asks the GPU to slow down: check its power supply and the system's power cap, and measure again",
        time_ms=None,
    )


def _state(evidence: Evidence) -> str:
    device = evidence.device
    if device is None:
        return ""
    parts = [f"{device.temperature_c} °C" if device.temperature_c is not None else ""]
    now, top = device.clocks_mhz.get("sm"), device.clocks_mhz.get("sm_max")
    parts.append(f"{now} of {top} MHz" if now and top else "")
    text = ", ".join(part for part in parts if part)
    return f" ({text})" if text else ""


RULE = Rule(
    code="GPU601",
    name="throttled",
    what="The GPU lowered its clocks because of heat or its power supply.",
    why="Every kernel takes longer by as much as the clock fell, differently from minute to minute: nothing measured meanwhile compares with anything.",
    before="$ nvidia-smi -q -d PERFORMANCE  # SW Thermal Slowdown: Active",
    after="$ nvidia-smi -q -d PERFORMANCE  # SW Thermal Slowdown: Not Active",
    safe=False,
    needs=frozenset({"throttled_ms", "measured_ms"}),
    find=find,
    source="NVML's counters of throttled time, read before and after the measurement",
)
