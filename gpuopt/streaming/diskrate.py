"""A packed folder -> how fast its disk gives it, read as a ring reads it; and whether that was the disk, or memory that remembers it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpuopt.streaming import packed, reading
from gpuopt.streaming.hostpages import Pages
from gpuopt.streaming.reading import NUM_THREADS, PIECE_BYTES

_RUN_BYTES = 4 * PIECE_BYTES
"""Of memory a thread reads into: enough for pages of 2 MiB, as a ring's buffers have them. Into pages of 4 KiB a direct read is cut into small requests, and a drive is slower."""
_REMEMBERED = 2.0
"""A second pass so many times faster than the first was not the disk's."""
_Piece = tuple[reading.File, int, int]
"""File, offset, length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """What reading a packed folder was measured to give."""

    bytes_per_s: float
    num_bytes: int
    seconds: float
    is_direct: bool
    """Past the page cache: the disk, not the host's memory."""
    notes: tuple[str, ...] = ()


def measure_disk(folder: Path | str, seconds: float = 2.0, *, num_threads: int = NUM_THREADS) -> DiskRate:
    """Read a packed folder as a ring does, for so long. Raises what `packed.opened` raises, and ResourceError when the disk fails.

    With O_DIRECT that the file system takes at its word, over and over, as long as a second pass is not much faster than the first: then something between here and the
    drive remembers (its server, its own memory), and the first pass alone counts. Everywhere else (O_DIRECT refused, or accepted and not heeded, as by gVisor and file
    systems in memory) the page cache is asked to forget the files, each byte is read once, and a note says how far that can be trusted.
    """
    with packed.opened(folder) as source:
        files = [source.file(unit.name) for unit in source.units]
        pieces = [
            (file, start, min(PIECE_BYTES, file.num_bytes - start)) for file in files for start in range(0, file.num_bytes, PIECE_BYTES)
        ]
        files[0].read_into(0, Pages(reading.PAGE_BYTES).bytes)  # some file systems take O_DIRECT at opening and refuse it at reading
        notes = list(source.notes)
        is_direct = all(file.is_direct for file in files) and not notes
        if is_direct and not files[0].heeds_direct():
            is_direct = False
            notes.append(f"{source.folder} accepts O_DIRECT and serves what it must refuse: whether reads go past a cache cannot be known")
        if not is_direct:
            for file in files:
                file.drop_cache()
            notes.append(_how_cold(files))
        memories = [
            Pages(_RUN_BYTES).bytes[:PIECE_BYTES].fill_(1) for _ in range(num_threads)
        ]  # touched: new pages are not the disk's time
        passes = [_pass(pieces, seconds, memories)]
        while is_direct and sum(took for _, took in passes) < seconds:
            passes.append(_pass(pieces, seconds - sum(took for _, took in passes), memories))
        (first_bytes, first_s), *again = passes
        faster = (sum(read for read, _ in again) / max(sum(took for _, took in again), 1e-9)) / (first_bytes / first_s) if again else 1.0
        if faster > _REMEMBERED and sum(took for _, took in again) > 0.1 * first_s:
            notes.append(f"a second reading was {faster:.1f} times as fast, so something before the drive remembers: the first one counts")
            passes = passes[:1]
        num_bytes, took = sum(read for read, _ in passes), sum(took for _, took in passes)
        return DiskRate(bytes_per_s=num_bytes / took, num_bytes=num_bytes, seconds=took, is_direct=is_direct, notes=tuple(notes))


def _how_cold(files: Sequence[reading.File]) -> str:
    """What the kernel says of the files' pages after it was asked to forget them."""
    known = [cached for file in files for cached in file.cached_pages()]
    if not known or any(cached is None for cached in known):
        return "the rate may be the page cache's: this system does not say what it holds, and the disk's own could not be measured"
    held = sum(1 for cached in known if cached)
    if held:
        return f"the rate may be the page cache's: it still held {held} of {len(known)} pages that were looked for"
    return f"read once through the page cache, which had forgotten the files ({len(known)} pages looked for)"


def _pass(pieces: Sequence[_Piece], seconds: float, memories: Sequence[torch.Tensor]) -> tuple[int, float]:
    """Every piece once, until the time is up, with a thread for each memory -> bytes, seconds."""
    turns = iter(pieces)
    lock = threading.Lock()
    done: list[int] = []
    errors: list[BaseException] = []
    began = time.monotonic()
    deadline = began + seconds

    def work(memory: torch.Tensor) -> None:
        try:
            while time.monotonic() < deadline and not errors:
                with lock:
                    turn = next(turns, None)
                if turn is None:
                    return
                file, start, length = turn
                file.read_into(start, memory[:length])
                done.append(length)
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
            errors.append(error)

    threads = [threading.Thread(target=work, args=(memory,), name=f"gpuopt-measure-{i}") for i, memory in enumerate(memories)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    if errors:
        raise errors[0]
    return sum(done), max(took, 1e-9)
