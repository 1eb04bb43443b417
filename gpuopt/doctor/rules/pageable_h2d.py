"""GPU101: inputs travel to the GPU through pageable memory."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import timeline, transfers, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all pageable host-to-device copies of a call but those of weights, which are GPU108's: priced as the same bytes at the pinned rate measured here."""
    trace = evidence.trace
    assert trace is not None and evidence.device is not None
    steps = timeline.num_steps(trace)
    found = transfers.sent(evidence)
    copies = [c for c in (*found.inputs, *found.others) if c.memory == "pageable"]
    if not copies:
        return
    wanted = {c.correlation for c in copies}
    # Such a copy holds the host: what it costs is the call, not the transfer inside it.
    held_ns = sum(r.dur_ns for r in trace.runtime if r.correlation in wanted and r.step is not None)
    taken_ms = max(held_ns, sum(c.dur_ns for c in copies)) / steps / 1e6
    num_bytes = sum(c.bytes for c in copies) / steps
    pinned = evidence.device.ceilings.bandwidth("measured", "h2d")
    floor_ms = num_bytes / pinned * 1e3 if pinned else 0.0
    finding = Finding(
        code="",
        severity="info",
        message=f"{units.format_bytes(num_bytes)} a call reach the GPU through pageable memory: {words.ms(taken_ms)} in {words.number(len(copies) / steps, 'copy', 'copies')}",
        fix="tensor.pin_memory() once, then .to(device, non_blocking=True); DataLoader(pin_memory=True)",
        op="Memcpy HtoD (Pageable -> Device)",
        count=round(len(copies) / steps),
        bytes=num_bytes,
        time_ms=taken_ms,
    )
    yield priced(finding, taken_ms - floor_ms, wall_ms=evidence.wall_ms) if pinned else finding


RULE = Rule(
    code="GPU101",
    name="pageable-h2d",
    what="Tensors are copied to the GPU from pageable host memory.",
    why="The driver copies pageable memory into a buffer of its own first, at a fraction of the link's speed, and the host waits for it: nothing overlaps.",
    before="x = batch.to('cuda')",
    after="batch = batch.pin_memory()\nx = batch.to('cuda', non_blocking=True)",
    safe=True,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="pageable and pinned rates are measured on this machine (gpuopt device)",
)
