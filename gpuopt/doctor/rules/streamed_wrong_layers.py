"""GPU117: the layers that stay on the GPU are the wrong ones, or too few."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """At most two findings: layers that stay lie together where spread they would hide copies; and memory that nothing uses would hold more of them."""
    found = streamed.streamed(evidence)
    if found is None:
        return
    if streamed.is_misplaced(found) and streamed.is_told(found, "overlap_ms"):
        side = "first" if streamed.number(found.resident[0]) < streamed.number(found.moved[0]) else "last"
        finding = Finding(
            code="",
            severity="info",
            message=f"the {side} {words.number(len(found.resident), 'layer')} stay on the GPU and the other {len(found.moved)} travel in a row: the link is idle under the ones, "
            f"and the GPU waits {words.ms(found.stall.dma_ms)} a call under the others",
            fix="sixth of the steps: keep layers evenly spread, so that each that stays covers the copy of one that travels; gpuopt stream plan places them",
            count=len(found.moved),
            bytes=found.bytes,
            time_ms=found.stall.dma_ms,
        )
        yield priced(finding, found.overlap_ms, low=0.7, high=1.05, wall_ms=evidence.wall_ms)
    if found.room_bytes and streamed.is_told(found, "resident_ms"):
        more = min(found.room_bytes, found.bytes)
        finding = Finding(
            code="",
            severity="info",
            message=f"{units.format_bytes(found.room_bytes)} of the GPU's memory are free at the peak, and {units.format_bytes(found.bytes)} of weights travel in every call: "
            f"{units.format_bytes(more)} of them could stay",
            fix=f"last of the steps: keep more layers on the GPU; gpuopt stream run MODEL --budget {units.format_bytes((evidence.peak_bytes or 0) + found.room_bytes).replace(' ', '')}",
            bytes=more,
            time_ms=found.stall.dma_ms,
        )
        yield priced(finding, found.resident_ms, low=0.7, high=1.05, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU117",
    name="streamed-wrong-layers",
    what="The layers that stay on the GPU are the wrong ones, or fewer than it has room for.",
    why="Layers run in a circle, so the least recently used is always the next one needed: only a fixed set helps, spread evenly, as large as memory allows.",
    before="device_map = {'layers.0': 0, 'layers.1': 0, …, 'layers.16': 'cpu', …}",
    after="resident = layers[::2]  # every other one covers the copy of the next",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="the stretches of the trace in which no kernel runs, and the rate of pinned copies measured here (gpuopt device)",
)
