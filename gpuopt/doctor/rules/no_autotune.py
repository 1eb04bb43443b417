"""GPU504: big products below their ceiling, compiled without autotuning."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Ceilings, Finding, OpRecord
from gpuopt.core.spec import BackendSpec, Change
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

PRESETS = {
    "default": "max-autotune-no-cudagraphs",
    "reduce-overhead": "max-autotune",
    "freezing": "max-autotune-freezing-no-cudagraphs",
    "freezing-reduce-overhead": "max-autotune-freezing",
    "graphed": "max-autotune-graphed",
    "freezing-graphed": "max-autotune-freezing-graphed",
}
"""What has no autotuning -> the same with it."""
BELOW = 0.7
"""A product under this share of the ceiling measured here has room: tuned GEMMs of these sizes reach 85 to 95%."""
TUNED = 0.85
"""Share of the ceiling that autotuning is expected to reach, at the lower end of what is seen."""
BIG_FLOPS = 2e9
"""FLOPs of one product: smaller ones are bound by launches and waves, which no tile changes."""
WORTH_MS = 0.02
"""Less than this a call is noise."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "_convolution", "conv2d", "conv1d", "conv3d")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all big products under 70% of their ceiling that a kernel of a library computes."""
    preset = evidence.preset or "default"
    if evidence.backend != "inductor" or preset not in PRESETS or not evidence.on_gpu or evidence.device is None:
        return
    slow = [(record, floor) for record in evidence.records if (floor := _room(record, evidence.device.ceilings)) is not None]
    time_ms = math.fsum(record.time_ns or 0.0 for record, _ in slow) / 1e6
    saved_ms = time_ms - math.fsum(floor for _, floor in slow) / TUNED / 1e6
    if not slow or saved_ms < WORTH_MS:
        return
    worst = max(slow, key=lambda item: (item[0].time_ns or 0.0) - item[1])[0]
    share = math.fsum(floor for _, floor in slow) / 1e6 / time_ms
    finding = Finding(
        code="",
        severity="info",
        message=f"{sum(r.count for r, _ in slow)} big products take {words.ms(time_ms)} at {words.share(share)} of the ceiling measured here, with the preset {preset}: "
        f"the slowest is {worst.op} {worst.shapes} at {units.format_flops_per_s((worst.flops or 0.0) / (worst.time_ns or 1.0) * 1e9)}",
        fix=f"--backend inductor:{PRESETS[preset]}: torch.compile(mode='max-autotune') tries tiles for each product",
        module=worst.module if worst.module != "?" else None,
        line=worst.line,
        op=worst.op,
        count=sum(r.count for r, _ in slow),
        time_ms=time_ms,
        change=Change(backend=BackendSpec(name="inductor", preset=PRESETS[preset])),
    )
    yield priced(finding, saved_ms, low=0.5, high=1.0, wall_ms=evidence.wall_ms)


def _room(record: OpRecord, ceilings: Ceilings) -> float | None:
    """The floor in ns of a big product that is bound by compute and under its ceiling; None for every other record."""
    name = record.op.rpartition("::")[2].removeprefix("aten.").partition(".")[0]
    peak, bandwidth = ceilings.flops(record.dtype, "measured"), ceilings.bandwidth("measured")
    if name not in _PRODUCTS or not record.time_ns or not record.flops or not peak or record.flops / max(1, record.count) < BIG_FLOPS:
        return None
    if any("triton_tem" in kernel or "triton_mm" in kernel for kernel in record.kernels):
        return None  # tuned already
    floor_ns = record.flops / peak * 1e9
    if bandwidth and (record.bytes or 0.0) / bandwidth * 1e9 > floor_ns:
        return None
    return floor_ns if floor_ns < BELOW * record.time_ns else None


RULE = Rule(
    code="GPU504",
    name="no-autotune",
    what="Big matrix products run well below what this GPU reaches, and no other kernel was tried.",
    why="Inductor takes the library's first choice for every product; with autotuning it times its own tiles against it and keeps the faster one.",
    before="model = torch.compile(model)",
    after="model = torch.compile(model, mode='max-autotune')",
    safe=True,
    needs=frozenset({"records", "device"}),
    find=find,
    source="ceilings measured on this machine; 85% of them as what a tuned product reaches",
    has_change=True,
)
