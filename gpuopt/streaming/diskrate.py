"""A packed folder -> how fast its disk gives it, read as a ring reads it."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gpuopt.streaming import packed, reading
from gpuopt.streaming.hostpages import Pages
from gpuopt.streaming.reading import NUM_THREADS, PIECE_BYTES

_RUN_BYTES = 4 * PIECE_BYTES
"""Of memory a thread reads into: enough for pages of 2 MiB, as a ring's buffers have them. Into pages of 4 KiB a direct read is cut into small requests, and a drive is slower."""


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
    """Read a packed folder as a ring does, over and over for so long. Raises what `packed.opened` raises, and ResourceError when the disk fails.

    Where O_DIRECT is refused, the page cache is dropped first, every byte is read once, and a note says that some may still have come from memory.
    """
    with packed.opened(folder) as source:
        files = [source.file(unit.name) for unit in source.units]
        pieces = [
            (file, start, min(PIECE_BYTES, file.num_bytes - start)) for file in files for start in range(0, file.num_bytes, PIECE_BYTES)
        ]
        files[0].read_into(0, Pages(reading.PAGE_BYTES).bytes)  # some file systems take O_DIRECT at opening and refuse it at reading
        is_direct = all(file.is_direct for file in files) and not source.notes
        if not is_direct:
            for file in files:
                file.drop_cache()
        turns = iter(itertools.cycle(pieces) if is_direct else pieces)
        lock = threading.Lock()
        done: list[int] = []
        errors: list[BaseException] = []
        deadline = time.monotonic() + seconds

        def work() -> None:
            memory = Pages(_RUN_BYTES).bytes[:PIECE_BYTES]
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

        threads = [threading.Thread(target=work, name=f"gpuopt-measure-{i}") for i in range(num_threads)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        if errors:
            raise errors[0]
        notes = source.notes if is_direct else (*source.notes, "the rate may be the page cache's: the disk's own could not be measured")
        return DiskRate(bytes_per_s=sum(done) / took, num_bytes=sum(done), seconds=took, is_direct=is_direct, notes=notes)
