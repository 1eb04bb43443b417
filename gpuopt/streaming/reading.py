"""Bytes of a file at an offset -> given memory, by positional reads of several threads; never a map.

A mapped file turns a short read into zeros or a signal, and a page fault every 4 KiB is slower than one read of 8 MiB (safetensors#729: 1.2 to 11 times).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from gpuopt.core.errors import BadInput, GpuoptError, ResourceError, UsageError
from gpuopt.trust.policy import printable

PIECE_BYTES = 8 * 2**20
"""Of one read: large enough that a drive streams, small enough that eight threads share one block of a model."""
PAGE_BYTES = 4096
"""What O_DIRECT asks of offset, length and address on any drive in use."""
NUM_THREADS = 8
_LOST = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO})


class File:
    """An open regular file, read by position from any thread. What it learns about the file system stands in `notes`."""

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        """Raises UsageError when the path cannot be opened, BadInput when it is no regular file."""
        self.path = path
        self.notes: list[str] = []
        self._direct: int | None = None
        self._retired: list[int] = []
        self._fd = _opened(path, 0)
        self._lock = threading.Lock()
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):  # before any read: a FIFO would block, a device may act
                raise BadInput(f"{self.name} is no regular file", fix="name a file")
            self.num_bytes = status.st_size
            self._stamp = (status.st_size, status.st_mtime_ns)
            if direct:
                self._open_direct()
        except BaseException:  # the descriptor is ours until the constructor returns
            self.close()
            raise

    @property
    def name(self) -> str:
        """For messages."""
        return printable(self.path.name)

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._direct is not None

    def read_into(self, offset: int, target: torch.Tensor) -> None:
        """Fill a contiguous uint8 CPU tensor with the bytes from `offset` on, in this thread.

        Raises BadInput at the end of the file, ResourceError when the disk fails; both name the offset.
        """
        num_bytes = target.numel()
        done = 0
        while done < num_bytes:
            step = min(PIECE_BYTES, num_bytes - done)
            self._read_piece(offset + done, target.data_ptr() + done, step)
            done += step

    def require_unchanged(self) -> None:
        """Raises BadInput when the file was written to since it was opened: what was read may be a mixture."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise BadInput(f"{self.name} was changed while it was read", fix="run again once nothing writes to it")

    def heeds_direct(self) -> bool:
        """Whether O_DIRECT means what it says here: a file system that really goes past the cache refuses one byte in the middle of a block."""
        if self._direct is None:
            return False
        try:
            os.preadv(self._direct, [bytearray(1)], min(1, max(0, self.num_bytes - 1)))
        except OSError:
            return True
        return False

    def cached_pages(self, samples: int = 8) -> list[bool | None]:
        """Of pages spread over the file: whether each is in the page cache; None where the system does not say."""
        found: list[bool | None] = []
        for index in range(samples):
            offset = (self.num_bytes - 1) * index // max(1, samples - 1) // PAGE_BYTES * PAGE_BYTES
            try:
                os.preadv(self._fd, [bytearray(1)], offset, getattr(os, "RWF_NOWAIT", 0))
                found.append(True if hasattr(os, "RWF_NOWAIT") else None)
            except BlockingIOError:
                found.append(False)
            except (OSError, NotImplementedError):  # a kernel or a file system without it
                found.append(None)
        return found

    def drop_cache(self) -> None:
        """Ask the kernel to forget the file's pages; it may decline."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Idempotent. No thread may be reading."""
        for fd in (self._fd, self._direct, *self._retired):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._direct, self._retired = -1, None, []

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_direct(self) -> None:
        try:
            self._direct = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
        except OSError as error:
            self._give_up_direct(error)
            return
        status, direct = os.fstat(self._fd), os.fstat(self._direct)
        if (status.st_dev, status.st_ino) != (direct.st_dev, direct.st_ino):
            raise BadInput(f"{self.name} was replaced while it was opened", fix="run again once nothing writes to it")

    def _give_up_direct(self, error: OSError) -> None:
        with self._lock:
            if not self.notes:
                self.notes.append(f"{self.path.parent} is read through the page cache: its file system refuses O_DIRECT ({error.strerror})")
            fd, self._direct = self._direct, None
            if fd is not None:
                self._retired.append(
                    fd
                )  # another thread may be inside a read of it: a number that is closed could be given to another file

    def _read_piece(self, offset: int, address: int, num_bytes: int) -> None:
        fd = self._direct
        if fd is not None and num_bytes >= PAGE_BYTES:
            try:
                if offset % PAGE_BYTES == address % PAGE_BYTES == num_bytes % PAGE_BYTES == 0:
                    self._fill(fd, offset, _memory(address, num_bytes), num_bytes)
                else:
                    self._bounce(fd, offset, address, num_bytes)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self._failed(error, offset, num_bytes) from error
                self._give_up_direct(error)
        try:
            self._fill(self._fd, offset, _memory(address, num_bytes), num_bytes)
        except OSError as error:
            raise self._failed(error, offset, num_bytes) from error

    def _bounce(self, fd: int, offset: int, address: int, num_bytes: int) -> None:
        """O_DIRECT reads whole pages: those around the bytes go to memory of this thread, and the bytes from there to where they belong."""
        start = offset - offset % PAGE_BYTES
        whole = _up(offset + num_bytes) - start
        window = _bounce_window()
        self._fill(fd, start, window[:whole], offset + num_bytes - start)
        _memory(address, num_bytes)[:] = window[offset - start : offset - start + num_bytes]

    def _fill(self, fd: int, offset: int, view: memoryview, need: int) -> None:
        """Read until `need` bytes of `view` are there; a page-wise read may bring more, and at the end of the file less than `view` holds."""
        done = 0
        while done < need:
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                end = min(os.fstat(self._fd).st_size, offset + done)
                raise BadInput(
                    f"{self.name} ends at byte {end}, {offset + need - end} bytes short of what is to be read at byte {offset}",
                    fix="it was cut off: copy or download it again, whole",
                )
            done += got
            if done < need and done % PAGE_BYTES and fd == self._direct:
                fd = self._fd  # the rest no longer starts on a page

    def _failed(self, error: OSError, offset: int, num_bytes: int) -> GpuoptError:
        lost = error.errno in _LOST
        return ResourceError(
            f"{self.name}: reading {num_bytes} bytes at byte {offset} failed: {error.strerror or error}",
            fix="the disk or its connection failed: look into the kernel's log, or copy the files to another disk" if lost else "run again",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """`target.numel()` bytes of `file` from `offset` on, into `target`: contiguous uint8 on the CPU."""

    file: File
    offset: int
    target: torch.Tensor


def read(reads: Iterable[Read], *, num_threads: int = NUM_THREADS) -> None:
    """Perform all reads, in pieces, with several threads. The first error ends the others. Raises what `File.read_into` raises."""
    pieces = [piece for each in reads for piece in split(each)]
    if len(pieces) <= 1 or num_threads <= 1:
        for piece in pieces:
            piece.file.read_into(piece.offset, piece.target)
        return
    with ThreadPoolExecutor(min(num_threads, len(pieces)), thread_name_prefix="gpuopt-read") as pool:
        futures = [pool.submit(piece.file.read_into, piece.offset, piece.target) for piece in pieces]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in futures:
            if future in done:
                future.result()


def split(whole: Read) -> Iterator[Read]:
    """Pieces of PIECE_BYTES, the last one shorter."""
    num_bytes = whole.target.numel()
    for start in range(0, num_bytes, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, num_bytes)
        yield Read(file=whole.file, offset=whole.offset + start, target=whole.target[start:stop])


_local = threading.local()


def _bounce_window() -> memoryview:
    if not hasattr(_local, "window"):
        _local.window = mmap.mmap(-1, PIECE_BYTES + 2 * PAGE_BYTES)  # anonymous: page-aligned
        with contextlib.suppress(OSError, AttributeError):  # a kernel without them: slower, not wrong
            _local.window.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(_local.window)


def _memory(address: int, num_bytes: int) -> memoryview:
    """The caller keeps the tensor behind the address alive."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def _up(num_bytes: int) -> int:
    return (num_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fix = (
            "raise the limit of open files: ulimit -n 4096"
            if getattr(error, "errno", 0) == errno.EMFILE
            else "check the path and its rights"
        )
        raise UsageError(f"{printable(str(path))} cannot be opened: {why}", fix=fix) from error


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which the caller keeps alive."""
    return _memory(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@contextlib.contextmanager
def closing_on_error(files: Iterable[File]) -> Iterator[None]:
    """Close what is open when the block fails."""
    try:
        yield
    except BaseException:
        for file in files:
            file.close()
        raise
