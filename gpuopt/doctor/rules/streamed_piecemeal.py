"""GPU114: weights that travel in every call go as one copy a tensor."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for small pinned copies of weights, several between two kernels: their time less the same bytes at the link's rate."""
    found = streamed.streamed(evidence)
    if found is None or not streamed.is_told(found, "large_ms"):
        return
    finding = Finding(
        code="",
        severity="info",
        message=f"{units.format_bytes(found.bytes)} of weights go in {words.number(found.num_copies, 'copy', 'copies')} a call, {units.format_bytes(found.bytes / found.num_copies)} each, "
        f"where {words.number(found.num_runs, 'would do', 'would do')}: a copy has its own launch, and below {units.format_bytes(streamed.SMALL_BYTES)} it does not reach the link's rate",
        fix="third of the steps: lay all tensors of a layer into one buffer (each at a multiple of 512 bytes) and copy that; parameters are views of it",
        op="Memcpy HtoD",
        count=round(found.num_copies),
        bytes=found.bytes,
        time_ms=found.stall.memcpy_ms + found.stall.dma_ms,
    )
    yield priced(finding, found.large_ms, low=0.7, high=1.1, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU114",
    name="streamed-weights-piecemeal",
    what="Weights that travel to the GPU in every call are copied tensor by tensor.",
    why="A copy costs microseconds to launch and starts slowly: a layer of nine tensors is nine copies, most of them too small for the link.",
    before="for parameter in layer.parameters():\n    parameter.data = parameter.data.to('cuda')",
    after="slot.copy_(slab[layer], non_blocking=True)  # all of its tensors are views of the slot",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="the stretches of the trace in which no kernel runs, and the rate of pinned copies measured here (gpuopt device)",
)
