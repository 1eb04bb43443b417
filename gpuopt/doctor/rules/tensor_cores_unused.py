"""GPU208: a product in a 16-bit format runs on the ordinary cores."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import kernels, units
from gpuopt.core.result import Finding, OpRecord
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

ELIGIBLE = frozenset({"float16", "bfloat16", "tf32", "int8", "float8_e4m3fn", "float8_e5m2"})
MIN_SHARE = 0.02
"""Of the call's device time, all such products together."""
REACHED = 0.5
"""Of the ceiling, which a product reaches once it runs on tensor cores: between a small one and a large one."""
VECTOR = ("gemv", "gemvx", "dot_kernel", "gemmSN", "gemmk1", "epthwise", "grouped_direct")
"""Products with nothing to multiply twice, which memory bounds and tensor cores would not help."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """A finding for each module and op: priced as the time above the roofline at half of the tensor cores' rate."""
    assert evidence.device is not None
    if not evidence.on_gpu or evidence.device.ceilings.flops("float16", "measured") is None:
        return
    total_ns = sum(r.time_ns or 0.0 for r in evidence.records)
    found: list[tuple[OpRecord, str, float]] = []
    for record in evidence.records:
        name = _plain_kernel(record)
        if record.dtype not in ELIGIBLE or not record.flops or not record.time_ns or name is None:
            continue
        floor = recast.floor_ns(record, evidence.device.ceilings, record.dtype)
        if floor is not None and record.time_ns > floor / REACHED:
            found.append((record, name, record.time_ns - floor / REACHED))
    if not found or sum(r.time_ns or 0.0 for r, _, _ in found) < MIN_SHARE * total_ns:
        return
    names = {r.module: n for r, n, _ in found}
    whole_ms = sum(saved for _, _, saved in found) / 1e6
    shown = recast.shown_ms(evidence, whole_ms) / whole_ms
    places = [
        Place(module=r.module, op=r.op, count=r.count, time_ms=(r.time_ns or 0.0) / 1e6, saved_ms=saved / 1e6 * shown, bytes=r.flops or 0.0)
        for r, _, saved in found
    ]

    def say(place: Place) -> Finding:
        rate = units.format_flops_per_s(place.bytes / place.time_ms * 1e3)
        kernel = kernels.short(names[place.module]) if place.module in names else "kernels without tensor cores"
        finding = Finding(
            code="",
            severity="info",
            message=f"{place.op}{place.where} runs {kernel}, which uses no tensor cores: {words.ms(place.time_ms)} at {rate}",
            fix="make the product's dimensions multiples of 8 (16-bit) or 16 (8-bit), its tensors aligned to 16 bytes, convolutions channels_last with groups of 8 channels or more",
            module=None if place.module == "?" else place.module,
            line=modules.line(evidence.module, place.module) if evidence.module is not None and place.module not in (None, "?") else None,
            op=place.op,
            count=max(1, round(place.count)),
            time_ms=place.time_ms,
        )
        return priced(finding, place.saved_ms, low=0.6, high=1.1, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


def _plain_kernel(record: OpRecord) -> str | None:
    """The record's product kernel where every product kernel of it is known to use no tensor cores, and is none of VECTOR."""
    products = [name for name in record.kernels if kernels.kind(name) == "product"]
    if not products or any(kernels.on_tensor_cores(name) is not False or any(v in name for v in VECTOR) for name in products):
        return None
    return products[0]


RULE = Rule(
    code="GPU208",
    name="tensor-cores-unused",
    what="A product whose dtype tensor cores take runs in a kernel that does not use them.",
    why="Tensor cores multiply many times faster; odd sizes, odd alignment or too few channels make the library choose the slow kernel without a word.",
    before="nn.Linear(1023, 50257)",
    after="nn.Linear(1024, 50264)",
    safe=False,
    needs=frozenset({"records", "device"}),
    find=find,
    source="kernel names (gpuopt/core/kernels.py) and the measured ceilings",
)
