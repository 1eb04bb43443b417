"""GPU602: the GPU ran at its power limit."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.rules.throttled import BRAKE, HEAT

SHARE = 0.05


def find(evidence: Evidence) -> Iterator[Finding]:
    """For information: big products reach the limit on every large GPU. Silent where heat or the brake explain it."""
    assert evidence.measured_ms is not None and evidence.device is not None
    if evidence.measured_ms <= 0:
        return
    share = min(1.0, evidence.throttled_ms.get("power", 0.0) / evidence.measured_ms)
    others = max(evidence.throttled_ms.get(name, 0.0) for name in (*HEAT, *BRAKE)) / evidence.measured_ms
    if share <= SHARE or others > SHARE:
        return
    device = evidence.device
    limit = f" of {device.power_limit_w:.0f} W" if device.power_limit_w else ""
    best = next((d for d in (evidence.precision, "bf16", "fp16") if d and device.ceilings.flops(d, "sustained")), None)
    sustained = device.ceilings.flops(best, "sustained")
    short = device.ceilings.flops(best, "measured")
    ceiling = f": sustained {best} products reach {units.format_flops_per_s(sustained)}" if sustained else ""
    ceiling += f", {words.share(sustained / short)} of the short-run ceiling" if sustained and short else ""
    yield Finding(
        code="",
        severity="info",
        message=f"the GPU ran at its power limit{limit} for {words.share(share)} of the time{ceiling}",
        fix="judge it by the sustained ceiling; nvidia-smi -q -d POWER shows whether a higher limit is allowed (nvidia-smi -pl W, as root)",
    )


RULE = Rule(
    code="GPU602",
    name="power-capped",
    what="The GPU ran into its power limit.",
    why="Big products draw more than the limit, so the clock falls: normal under load, and the reason why a long run stays below the short-run ceiling.",
    before="compared with the measured ceiling: 78%",
    after="compared with the sustained ceiling: 97%",
    safe=False,
    needs=frozenset({"throttled_ms", "measured_ms", "device"}),
    find=find,
    source="NVML's counter of time under the power cap; products timed between the blocks of the bench",
)
