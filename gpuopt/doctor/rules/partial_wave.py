"""GPU402: a kernel's blocks do not fill the GPU's multiprocessors, or its last wave does not."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpuopt.core import kernels
from gpuopt.core.result import Finding
from gpuopt.core.trace import Kernel
from gpuopt.doctor import timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.recast import shown_ms
from gpuopt.doctor.rule import Rule

MIN_SHARE = 0.03
"""Of the call, one kernel name and grid."""
MIN_LOSS = 0.2
"""Of the kernel's time: a fifth wave of five that is half full costs less."""
MIN_NS = 5_000
"""A kernel shorter than this waits for its launch, not for a multiprocessor."""
LIMITS = {
    "7.0": (2048, 96, 32), "7.5": (1024, 64, 16), "8.0": (2048, 164, 32), "8.6": (1536, 100, 16), "8.7": (1536, 164, 16), "8.9": (1536, 100, 24),
    "9.0": (2048, 228, 32), "10.0": (2048, 228, 32), "10.3": (2048, 228, 32), "12.0": (1536, 100, 24),
}  # fmt: skip
"""Compute capability -> (threads, KiB of shared memory, blocks) a multiprocessor holds at most: CUDA C++ Programming Guide, technical specifications."""
REGISTERS = 65536
"""Of a multiprocessor, on all of them."""


def resident(kernel: Kernel, capability: str | None) -> int:
    """Blocks of this kernel that one multiprocessor holds at once, at least 1; 1 where its block or the device is unknown, which only overlooks partial waves."""
    limits = LIMITS.get(capability or "")
    if limits is None or kernel.block is None:
        return 1
    threads = max(1, math.prod(kernel.block))
    most = [limits[0] // threads, limits[2]]
    if kernel.registers:
        most.append(REGISTERS // (kernel.registers * 32 * math.ceil(threads / 32)))
    if kernel.shared_bytes:
        most.append(limits[1] * 1024 // kernel.shared_bytes)
    return max(1, min(most))


def fill(blocks: int, num_sms: int, blocks_a_sm: int) -> float:
    """Share of the multiprocessors' time that has work, 0..1; with fewer blocks than multiprocessors, their quotient.

    Between one block each and one whole wave all have work, some more than others: no loss is claimed. Beyond that, the better of two models: blocks that share a
    multiprocessor take as long as they would alone (waves over whole waves), or share its speed (blocks a multiprocessor over the most that one has).
    """
    if blocks <= num_sms:
        return blocks / num_sms
    waves, each = blocks / (num_sms * blocks_a_sm), blocks / num_sms
    if waves <= 1:
        return 1.0
    return max(waves / math.ceil(waves), each / math.ceil(each))


def find(evidence: Evidence) -> Iterator[Finding]:
    """A finding for each kernel and grid: priced as the part of its time in which multiprocessors have no block."""
    trace = evidence.trace
    assert trace is not None and evidence.device is not None
    num_sms = evidence.device.num_sms
    if not num_sms:
        return
    steps = timeline.num_steps(trace)
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    groups: dict[tuple[str, tuple[int, int, int]], list[Kernel]] = {}
    for kernel in trace.kernels:
        if kernel.step is not None and kernel.grid is not None and not kernel.is_memset:
            groups.setdefault((kernel.name, kernel.grid), []).append(kernel)
    places, said = [], {}
    for (name, grid), same in groups.items():
        time_ns = sum(k.dur_ns for k in same)
        blocks = math.prod(grid)
        fit = resident(same[0], evidence.device.capability)
        loss = 1 - fill(blocks, num_sms, fit)
        if time_ns / steps / 1e6 < MIN_SHARE * span_ms or loss < MIN_LOSS or time_ns / len(same) < MIN_NS:
            continue
        module = timeline.module_of(trace, same[0].op) if len({k.op for k in same}) == steps else None
        place = Place(
            module=module, op=f"{kernels.short(name)} {'x'.join(str(n) for n in grid)}", count=len(same) / steps, time_ms=time_ns / steps / 1e6,
            saved_ms=shown_ms(evidence, time_ns * loss / steps / 1e6),
        )  # fmt: skip
        places.append(place)
        said[place.op] = f"{words.number(blocks, 'block')} for {num_sms} multiprocessors that hold {fit} each: {words.share(1 - loss)} busy"

    def say(place: Place) -> Finding:
        finding = Finding(
            code="",
            severity="info",
            message=f"{place.op if place.num_places == 1 else 'further kernels'}{place.where}: {said[place.op] if place.num_places == 1 else 'grids that do not fill the GPU'}, {words.ms(place.time_ms)} in {words.number(place.count, 'launch', 'launches')}",
            fix="a larger batch, or smaller tiles and split-K: torch.compile(mode='max-autotune') tries them",
            module=place.module,
            op=place.op,
            count=max(1, round(place.count)),
            time_ms=place.time_ms,
        )
        # Blocks share a multiprocessor's bandwidth: filling the rest rarely gives all of it.
        return priced(finding, place.saved_ms, low=0.5, high=1.0, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


RULE = Rule(
    code="GPU402",
    name="partial-wave",
    what="A kernel launches fewer blocks than the GPU has room for, or a few more than a whole number of waves.",
    why="Blocks run in waves over all multiprocessors: a last wave of a few blocks takes as long as a full one.",
    before="y = model(x[:1])  # 24 blocks on 132 multiprocessors",
    after="y = model(x[:8])",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="NVIDIA, Matrix Multiplication Background: wave quantization",
)
