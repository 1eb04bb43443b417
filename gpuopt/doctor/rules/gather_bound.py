"""GPU407: embeddings and gathers take the time, far below the memory's speed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpuopt.core import kernels, units
from gpuopt.core.result import Finding, OpRecord
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

OPS = frozenset(
    {"embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only", "index_select", "gather", "take", "take_along_dim"}
)
MIN_SHARE = 0.1
"""Of the call's device time."""
MAX_RATE = 0.3
"""Of the measured bandwidth: random rows of a table larger than the cache reach about this; above it there is little to gain."""
REACHED = 0.6
"""Of the bandwidth, with indices sorted and rows of 128 bytes and more."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """A finding for each module: priced as the time above the bytes at `REACHED` of the bandwidth."""
    assert evidence.device is not None
    bandwidth = evidence.device.ceilings.bandwidth("measured")
    if not evidence.on_gpu or not bandwidth:
        return
    total_ns = math.fsum(r.time_ns or 0.0 for r in evidence.records)
    slow = [
        r
        for r in evidence.records
        if _is_gather(r)
        and r.bytes
        and r.time_ns
        and r.time_ns > recast.LAUNCH_NS * r.count
        and r.bytes / r.time_ns * 1e9 < MAX_RATE * bandwidth
    ]
    if not slow or math.fsum(r.time_ns or 0.0 for r in slow) < MIN_SHARE * total_ns:
        return
    places = []
    for record in slow:
        time_ns, moved = record.time_ns or 0.0, record.bytes or 0.0
        saved_ns = max(0.0, time_ns - max(moved / (REACHED * bandwidth) * 1e9, recast.LAUNCH_NS * record.count))
        places.append(
            Place(
                module=record.module, op=record.op, count=record.count, time_ms=time_ns / 1e6, saved_ms=recast.shown_ms(evidence, saved_ns / 1e6),
                bytes=moved,
            )
        )  # fmt: skip

    def say(place: Place) -> Finding:
        finding = Finding(
            code="",
            severity="info",
            message=f"{place.op}{place.where} moves {units.format_bytes(place.bytes)} in {words.ms(place.time_ms)}, "
            f"{words.share(place.bytes / place.time_ms * 1e3 / bandwidth)} of the bandwidth; {words.share(place.time_ms * 1e6 / total_ns)} of the device time",
            fix="sort or deduplicate the indices (torch.unique), keep the table in half precision, fuse the lookups of several tables into one",
            module=None if place.module == "?" else place.module,
            line=modules.line(evidence.module, place.module) if evidence.module is not None and place.module not in (None, "?") else None,
            op=place.op,
            count=max(1, round(place.count)),
            bytes=place.bytes,
            time_ms=place.time_ms,
        )
        return priced(finding, place.saved_ms, low=0.5, high=1.0, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


def _is_gather(record: OpRecord) -> bool:
    return recast.short_name(record) in OPS or (bool(record.kernels) and all(kernels.kind(name) == "gather" for name in record.kernels))


RULE = Rule(
    code="GPU407",
    name="gather-bound",
    what="Rows are gathered from a table at a small part of the memory's speed.",
    why="Random rows shorter than a memory transaction waste most of each, and nothing of the table stays in the cache.",
    before="y = [table(i) for table, i in zip(tables, indices)]",
    after="y = fused_table(torch.cat(indices) + offsets)",
    safe=False,
    needs=frozenset({"records", "device"}),
    find=find,
    source="bytes of the rows read, against the measured bandwidth",
)
