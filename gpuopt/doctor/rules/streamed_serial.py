"""GPU116: weights travel while nothing computes."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: of the copies that no kernel hides, what the kernels without a copy under them have room for. Where layers stay that should be spread, GPU117 says so."""
    found = streamed.streamed(evidence)
    if found is None or not streamed.is_told(found, "overlap_ms") or streamed.is_misplaced(found):
        return
    finding = Finding(
        code="",
        severity="info",
        message=f"{words.ms(found.dma_ms)} of copies of weights a call, {words.share(found.hidden_ms / found.dma_ms)} of them under kernels that take {words.ms(found.compute_ms)}: "
        f"overlapped, {words.ms(found.overlap_ms)} would be hidden",
        fix="fifth of the steps: copy the next layer on a stream of its own while this one computes, two buffers in turn; gpuopt stream run does",
        count=round(found.num_copies),
        bytes=found.bytes,
        time_ms=found.stall.dma_ms,
    )
    yield priced(finding, found.overlap_ms, low=0.7, high=1.05, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU116",
    name="streamed-weights-not-overlapped",
    what="Copies of weights and kernels take turns.",
    why="The copy engine and the multiprocessors are different parts of the GPU: one after the other takes their sum, together the longer of the two.",
    before="layer.to('cuda')\nx = layer(x)",
    after="with torch.cuda.stream(copies):\n    slots[(i + 1) % 2].copy_(slabs[i + 1], non_blocking=True)\nx = layer(x)",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="the stretches of the trace in which no kernel runs, and the rate of pinned copies measured here (gpuopt device)",
)
