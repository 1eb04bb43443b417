"""GPU605: the caching allocator's memory is in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

SPLIT = 0.3
"""Share of reserved memory in inactive splits: pieces of blocks in use, which can be neither freed nor joined."""
WORTH_BYTES = 2 * 2**30
"""Less lost memory than this changes nobody's batch."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: retries stall the device each time, splits only cost memory."""
    stats = evidence.memory_stats
    retries = round(stats.get("num_alloc_retries", 0))
    reserved = _first(stats, "reserved_bytes.all.current", "reserved_bytes.all.peak")
    split = _first(stats, "inactive_split_bytes.all.current", "inactive_split_bytes.all.peak")
    share = split / reserved if reserved else 0.0
    if retries <= 0 and not (share > SPLIT and split > WORTH_BYTES):
        return
    pieces = (
        f"{units.format_bytes(split)} of {units.format_bytes(reserved)} reserved lie in pieces nobody can use ({words.share(share)})"
        if reserved
        else ""
    )
    stalls = f"the allocator gave everything back and asked again {retries} time{'s' if retries > 1 else ''}" if retries > 0 else ""
    yield Finding(
        code="",
        severity="warning" if retries > 0 else "info",
        message="; ".join(part for part in (stalls, pieces) if part),
        fix="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; call the largest input first",
        count=retries or None,
        bytes=split or None,
    )


def _first(stats: Mapping[str, float], *names: str) -> float:
    return float(next((stats[name] for name in names if stats.get(name)), 0.0))


RULE = Rule(
    code="GPU605",
    name="fragmentation",
    what="GPU memory is fragmented.",
    why="An allocation that finds no piece large enough waits for the device, frees every cached block and asks the driver again: a stall, and then out of memory.",
    before="for batch in batches:  # growing lengths\n    model(batch)",
    after="# PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\nfor batch in sorted(batches, key=len, reverse=True):\n    model(batch)",
    safe=False,
    needs=frozenset({"memory_stats"}),
    find=find,
    source="torch.cuda.memory_stats(): num_alloc_retries, inactive_split_bytes",
)
