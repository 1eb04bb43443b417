"""GPU113: weights that travel in every call leave from pageable memory."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all pageable copies of weights: their time, the host's part included, less the same bytes at the pinned rate measured here."""
    found = streamed.streamed(evidence)
    if found is None or not streamed.is_told(found, "pin_ms"):
        return
    copies = [c for c in found.copies if c.memory == "pageable"]
    num_bytes = found.bytes * sum(c.bytes for c in copies) / sum(c.bytes for c in found.copies)
    finding = Finding(
        code="",
        severity="info",
        message=f"{units.format_bytes(num_bytes)} of weights a call leave from pageable memory, and the GPU waits for them ({found.stall}): "
        f"pinned, the same bytes would take {words.ms(num_bytes / (found.link or 1) * 1e3)}",
        fix="second of the steps: pin the weights once, not a tensor a call; torch rounds a pinned block up to a power of two, so register one exact buffer a layer, as gpuopt stream does",
        op="Memcpy HtoD (Pageable -> Device)",
        count=round(found.num_copies),
        bytes=num_bytes,
        time_ms=found.stall.memcpy_ms + found.stall.dma_ms,
    )
    yield priced(finding, found.pin_ms, low=0.75, high=1.1, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU113",
    name="streamed-weights-pageable",
    what="Weights that travel to the GPU in every call lie in pageable host memory.",
    why="The driver copies them into a buffer of its own first, with the processor, at a sixth of the link's speed; non_blocking=True changes nothing, and nothing can overlap.",
    before="weights = {n: t for n, t in load_file(path).items()}\nlayer.to('cuda')",
    after="slab = torch.empty(layer_bytes, dtype=torch.uint8)\ntorch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 0)  # once\nslot.copy_(slab, non_blocking=True)",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="the stretches of the trace in which no kernel runs, and the rate of pinned copies measured here (gpuopt device)",
)
