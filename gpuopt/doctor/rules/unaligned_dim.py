"""GPU401: dimensions of a product that tensor cores cannot take evenly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

ALIGN_BYTES = 16
"""Rows whose length is a multiple of this are read in full vectors: 8 numbers of 16 bits, 16 of 8."""
WORTH = 0.01
"""Share of the device time below which a layer (a classifier's last one) is not mentioned."""
AS_GOOD = 0.9
"""At this share of what the aligned products reach, alignment is not what holds it back."""
MOST = 5


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a layer, the longest first, where it stays behind the aligned products of the same dtype."""
    device = evidence.device
    assert device is not None
    if not evidence.on_gpu:
        return
    parts = modules.parts(evidence.module)
    odd = {name: dims for name, part in parts.items() if (dims := _dims(part))}
    busy = recast.total_ms(evidence.records)
    reached: dict[str, list[float]] = {}
    rows: list[tuple[OpRecord, list[int], int, float]] = []
    for record in evidence.records:
        width = DTYPE_BYTES.get(record.dtype or "", 8)
        floor = recast.floor_ns(record, device.ceilings, record.dtype)
        if width > 2 or not record.time_ns or not floor or not (recast.is_matrix(record) or recast.is_convolution(record)):
            continue
        to = ALIGN_BYTES // width
        bad = [n for n in odd.get(record.module, []) if n % to]
        if not bad:
            reached.setdefault(record.dtype or "", []).append(floor / record.time_ns)
        elif record.time_ns >= WORTH * busy * 1e6:
            rows.append((record, odd[record.module], to, floor / record.time_ns))
    for record, dims, to, share in sorted(rows, key=lambda row: -(row[0].time_ns or 0.0))[:MOST]:
        usual = median(reached[record.dtype or ""]) if reached.get(record.dtype or "") else None
        if usual is not None and share >= AS_GOOD * usual:
            continue
        yield _finding(evidence, record, dims, to, share, usual)


def _finding(evidence: Evidence, record: OpRecord, dims: list[int], to: int, share: float, usual: float | None) -> Finding:
    assert evidence.device is not None
    taken = (record.time_ns or 0.0) / 1e6
    changes = ", ".join(f"{n} -> {-(-n // to) * to}" for n in dims if n % to)
    than = f", where aligned products reach {words.share(usual)}" if usual is not None else ""
    finding = Finding(
        code="",
        severity="info",
        message=f"{record.module} multiplies {record.dtype} with dimensions {' x '.join(map(str, dims))}, not multiples of {to}: {words.ms(taken)} at {words.share(share)} of its ceiling{than}",
        fix=f"pad {changes} with zeros and cut the result",
        module=record.module,
        line=modules.line(evidence.module, record.module),
        op=record.op,
        count=record.count,
        time_ms=taken,
    )
    if usual is None:
        return finding
    grown = 1.0
    for n in dims:
        grown *= -(-n // to) * to / n
    padded = replace(record, flops=(record.flops or 0.0) * grown, bytes=(record.bytes or 0.0) * grown)
    floor = recast.floor_ns(padded, evidence.device.ceilings, record.dtype) or 0.0
    return priced(finding, recast.shown_ms(evidence, taken - floor / usual / 1e6), wall_ms=evidence.wall_ms)


def _dims(part: Any) -> list[int]:
    """Sizes a product runs over. A stem's 1 to 4 channels are padded by cuDNN itself; grouped convolutions are no plain products."""
    if modules.is_a(part, "Linear"):
        return [part.in_features, part.out_features]
    if modules.is_a(part, "_ConvNd") and part.groups == 1 and part.in_channels > 4:
        return [part.in_channels, part.out_channels]
    return []


RULE = Rule(
    code="GPU401",
    name="unaligned-dim",
    what="A 16-bit or 8-bit product has a dimension that is no multiple of 16 bytes.",
    why="Rows that do not start at 16-byte borders cannot be loaded in full vectors: the library takes a kernel for small alignment, or none that uses tensor cores.",
    before="nn.Linear(1024, 30522)  # 30522 % 8 == 2",
    after="nn.Linear(1024, 30528)  # and logits[..., :30522]",
    safe=False,
    needs=frozenset({"module", "device", "records"}),
    find=find,
    source="NVIDIA, Matrix Multiplication Background User's Guide: tensor core requirements; the gain from the products measured here",
)
