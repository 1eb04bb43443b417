"""Where a model's weights come from -> checks of the files themselves: are their bytes those that were published, or packed. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.core import units
from gpuopt.core.errors import BadInput
from gpuopt.core.streamed import StreamCheck
from gpuopt.streaming import meta, packed


def checks(weights: Any, disk: str | None) -> Iterator[StreamCheck]:
    """Every byte is read. None for a factory, which has no files. Raises what opening a packed folder raises."""
    if isinstance(weights, meta.Empty):
        yield _of_shards(weights)
    if disk is not None:
        yield _of_packed(disk)


def _of_shards(weights: meta.Empty) -> StreamCheck:
    shards = weights.shards
    known = shards.known_sha256()
    if not known:
        told = f"headers and sizes of {len(shards.paths)} fit; the sha256 of a file is known in the hub's cache alone (hf:ID@REVISION)"
        return StreamCheck(name="files", passed=None, detail=told)
    try:
        shards.verify(known)
    except BadInput as error:
        return StreamCheck(name="files", passed=False, detail=f"{error.message}; {error.fix}")
    return StreamCheck(name="files", passed=True, detail=f"sha256 of {len(known)} of {len(shards.paths)} files as the hub names them")


def _of_packed(folder: str) -> StreamCheck:
    with packed.opened(folder) as found:
        try:
            found.verify()
        except BadInput as error:
            return StreamCheck(name="packed files", passed=False, detail=f"{error.message}; {error.fix}")
        told = f"sha256 of {len(found.units)} units, {units.format_bytes(found.num_bytes)}, as they were packed"
        return StreamCheck(name="packed files", passed=True, detail=told)
