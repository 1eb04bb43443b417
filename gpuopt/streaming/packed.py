"""A model's units -> a folder with one file a unit, each at a multiple of 4 KiB long; and that folder, checked, back.

    packed.json        layout, checksums, what it was packed from
    unit-00000.bin     the slab of the first unit, as it is copied to the device

The folder appears whole or not at all: it is written beside its place, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from gpuopt.core import codec
from gpuopt.core.errors import BadInput, GpuoptError, ResourceError, UsageError
from gpuopt.core.streaming import Anatomy, Unit
from gpuopt.streaming import reading
from gpuopt.streaming.reading import PAGE_BYTES, PIECE_BYTES
from gpuopt.streaming.shards import require_target
from gpuopt.trust.policy import printable

MANIFEST = "packed.json"
"""Not manifest.json: a folder with that is a bundle."""
FORMAT = 2
"""2: checksums are of words of 64 bits."""
MAX_MANIFEST_BYTES = 64 * 2**20
_SLACK_BYTES = 16 * 2**20
"""For the manifest and the file system's own books."""
_FILE = re.compile(r"unit-\d{5}\.bin")
_PACK_AGAIN = "pack the model again: gpuopt stream pack MODEL --disk FOLDER"


class Filler(Protocol):
    """Where a unit's bytes come from."""

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        """Write the unit's slab into uint8 CPU memory of `unit.num_bytes`, zeros between its tensors."""

    def fingerprint(self) -> str:
        """Differs when the weights do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedUnit:
    """One file of the folder."""

    unit: Unit
    file: str
    checksum: int
    """Sum of the slab as int64, wrapped: fast enough to check while reading."""
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedManifest:
    """What packed.json says."""

    format: int
    weights: str
    """The fingerprint of what was packed."""
    dtypes: tuple[str, ...]
    units: tuple[PackedUnit, ...]


def checksum(memory: torch.Tensor) -> int:
    """`slabs.checksum` of uint8 CPU memory, in this thread alone: torch would start threads of its own for each thread that reads."""
    raw = memory.numpy()
    whole = raw.size // 8 * 8
    return wrapped(int(raw[:whole].view(np.int64).sum(dtype=np.int64)) + int(raw[whole:].sum(dtype=np.int64)))


def wrapped(total: int) -> int:
    """As int64 holds it."""
    return (total + 2**63) % 2**64 - 2**63


def file_bytes(unit: Unit) -> int:
    """Of a unit's file: whole pages, so that each can be read past the page cache."""
    return (unit.num_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


# --- writing -----------------------------------------------------------------------------------------------------------------------------------


def pack(source: Filler, anatomy: Anatomy, folder: Path | str, *, on_unit: Callable[[str, int, int], None] | None = None) -> Packed:
    """Write every unit of the anatomy; a folder that holds this very model already is opened instead.

    on_unit(name, bytes written so far, bytes in all) is called after each file. A run that is killed leaves a hidden folder, which the next one removes.
    Raises UsageError when another folder is in the way, ResourceError when the disk is full, and what the source raises.
    """
    folder = Path(folder).absolute()
    if not anatomy.units:
        raise UsageError("the model has no units to pack", fix="it fits: run it without --disk")
    weights = source.fingerprint()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _already(folder, anatomy, weights)
    total = sum(file_bytes(unit) for unit in anatomy.units)
    with _full_disk(folder, total):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        _require_room(folder.parent, total)
        with _workshop(folder) as workshop:
            packed_units = []
            done = 0
            for index, unit in enumerate(anatomy.units):
                packed_units.append(_write_unit(source, unit, workshop / f"unit-{index:05d}.bin"))
                done += file_bytes(unit)
                if on_unit is not None:
                    on_unit(unit.name, done, total)
            dtypes = sorted({place.dtype for unit in anatomy.units for place in unit.places})
            manifest = PackedManifest(format=FORMAT, weights=weights, dtypes=tuple(dtypes), units=tuple(packed_units))
            _write_flushed(workshop / MANIFEST, codec.to_json(manifest, indent=1).encode())
            _flush_folder(workshop)
            _publish(workshop, folder)
    return opened(folder, anatomy=anatomy, weights=weights)


def _already(folder: Path, anatomy: Anatomy, weights: str) -> Packed:
    try:
        return opened(folder, anatomy=anatomy, weights=weights)
    except GpuoptError as error:
        raise UsageError(
            f"{printable(str(folder))} is there already, and is not this model packed: {error.message}",
            fix="remove it, or name another folder",
        ) from error


def _write_unit(source: Filler, unit: Unit, path: Path) -> PackedUnit:
    memory = torch.zeros(file_bytes(unit), dtype=torch.uint8)
    source.fill_unit(unit, memory[: unit.num_bytes])
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _reserve(fd, memory.numel())
        view = reading.memory_of(memory)

        def write(start: int) -> None:
            stop = min(start + PIECE_BYTES, len(view))
            while start < stop:
                start += os.pwrite(fd, view[start:stop], start)

        with ThreadPoolExecutor(4, thread_name_prefix="gpuopt-write") as pool:
            digest = pool.submit(lambda: hashlib.sha256(view).hexdigest())
            for _ in pool.map(write, range(0, len(view), PIECE_BYTES)):
                pass
            sha256 = digest.result()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it through the page cache
    finally:
        os.close(fd)
    return PackedUnit(unit=unit, file=path.name, checksum=checksum(memory[: unit.num_bytes]), sha256=sha256)


def _reserve(fd: int, num_bytes: int) -> None:
    """A full disk says so before the gigabytes, not after. File systems that cannot reserve say so while writing."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(workshop: Path, folder: Path) -> None:
    try:
        workshop.rename(folder)  # refuses a folder with anything in it
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(
                f"{printable(str(folder))} appeared while it was being packed", fix="another run packs to it: name another folder"
            ) from error
        raise
    _flush_folder(folder.parent)


@contextlib.contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """A hidden folder beside the target, locked while this process lives, and gone afterwards unless it became the target."""
    while True:
        path = folder.with_name(f".{folder.name}.packing-{secrets.token_hex(6)}")
        path.mkdir()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if path.exists():  # another run's sweep may have come between the making and the locking
            break
        os.close(fd)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # after the rename there is nothing under this name
        os.close(fd)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left: those whose lock nobody holds."""
    for path in folder.parent.glob(f".{_literal(folder.name)}.packing-*"):
        with contextlib.suppress(OSError):  # somebody else's, or just removed by another run
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _require_room(folder: Path, num_bytes: int) -> None:
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if num_bytes + _SLACK_BYTES > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _full_disk(folder: Path, total: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = os.statvfs(folder.parent)
            raise ResourceError(
                f"{printable(str(folder.parent))} has room for {room.f_bavail * room.f_frsize} bytes, and the packed model has {total} "
                f"({error.strerror}); nothing was left behind",
                fix="name a folder on a larger disk, or free some space",
            ) from error
        raise ResourceError(
            f"{printable(str(folder))} cannot be written: {error.strerror or error}", fix="name a folder that can be written"
        ) from error


# --- reading -----------------------------------------------------------------------------------------------------------------------------------


class Packed:
    """An opened, checked folder."""

    def __init__(self, folder: Path, manifest: PackedManifest, files: Sequence[reading.File]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._units = {packed.unit.name: packed for packed in manifest.units}
        self._files = {packed.unit.name: file for packed, file in zip(manifest.units, files, strict=True)}

    @property
    def units(self) -> tuple[Unit, ...]:
        """In the order of a forward."""
        return tuple(packed.unit for packed in self.manifest.units)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file_bytes(unit) for unit in self.units)

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether its file system could not be read past the page cache."""
        return tuple(dict.fromkeys(note for file in self._files.values() for note in file.notes))

    def file(self, name: str) -> reading.File:
        """The open file of a unit."""
        return self._files[name]

    def checksum(self, name: str) -> int:
        """What the manifest says."""
        return self._units[name].checksum

    def read_into(self, name: str, target: torch.Tensor, *, num_threads: int = reading.NUM_THREADS) -> None:
        """A unit's slab into memory of `unit.num_bytes`, checked. Raises BadInput naming the file when a bit differs."""
        packed = self._units[name]
        require_target(target, packed.unit.num_bytes, name)
        reading.read([reading.Read(file=self._files[name], offset=0, target=target)], num_threads=num_threads)
        if checksum(target) != packed.checksum:
            raise damaged(self._files[name])

    def verify(self) -> None:
        """Read everything and compare sha256. Raises BadInput naming the file that differs."""
        buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        for packed in self.manifest.units:
            file = self._files[packed.unit.name]
            digest = hashlib.sha256()
            for start in range(0, file.num_bytes, PIECE_BYTES):
                part = buffer[: min(PIECE_BYTES, file.num_bytes - start)]
                file.read_into(start, part)
                digest.update(reading.memory_of(part))
            if digest.hexdigest() != packed.sha256:
                raise damaged(file)

    def close(self) -> None:
        """Idempotent."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Packed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(folder: Path | str, *, anatomy: Anatomy | None = None, weights: str | None = None, direct: bool = True) -> Packed:
    """A packed folder, its manifest and every file's size checked, and that it is of this anatomy and these weights where they are given.

    Raises UsageError when there is none, BadInput naming the file or the field that differs.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if anatomy is not None:
        _require_same_layout(folder, manifest, anatomy)
    if weights is not None and weights != manifest.weights:
        raise BadInput(f"{printable(folder.name)} was packed from other weights of the same shapes (field weights)", fix=_PACK_AGAIN)
    files: list[reading.File] = []
    with reading.closing_on_error(files):
        for packed in manifest.units:
            path = folder / packed.file
            if path.is_symlink():
                raise BadInput(f"{printable(folder.name)}/{packed.file} is a link", fix=_PACK_AGAIN)
            try:
                files.append(reading.File(path, direct=direct))
            except UsageError as error:
                raise BadInput(error.message, fix=_PACK_AGAIN) from error
            need = file_bytes(packed.unit)
            if files[-1].num_bytes != need:
                raise BadInput(f"{printable(folder.name)}/{packed.file} has {files[-1].num_bytes} bytes, not {need}", fix=_PACK_AGAIN)
        return Packed(folder, manifest, files)


def damaged(file: reading.File) -> BadInput:
    """What is said of a file whose bytes are not those that were packed."""
    return BadInput(f"{file.name} in {printable(str(file.path.parent))} is damaged: its checksum differs", fix=_PACK_AGAIN)


def _manifest(folder: Path) -> PackedManifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{printable(str(folder))} is no packed model: it holds no {MANIFEST}", fix="gpuopt stream pack MODEL --disk FOLDER"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BadInput(f"{printable(folder.name)}/{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes", fix=_PACK_AGAIN)
    try:
        manifest = codec.from_json(PackedManifest, path.read_bytes(), what=f"{printable(folder.name)}/{MANIFEST}")
    except UsageError as error:
        raise BadInput(error.message, fix=_PACK_AGAIN) from error
    if manifest.format != FORMAT:
        raise BadInput(f"{printable(folder.name)} has format {manifest.format}, and this gpuopt reads {FORMAT}", fix=_PACK_AGAIN)
    names: set[str] = set()
    for index, packed in enumerate(manifest.units):
        unit = packed.unit
        if not _FILE.fullmatch(packed.file) or packed.file != f"unit-{index:05d}.bin":
            raise BadInput(f"{printable(folder.name)}/{MANIFEST} names the file {printable(packed.file)!r}", fix="do not use this folder")
        end = 0
        for place in sorted(unit.places, key=lambda p: p.offset):
            if place.offset < end or place.num_bytes < 0 or place.offset + place.num_bytes > unit.num_bytes:
                raise BadInput(
                    f"{printable(folder.name)}/{MANIFEST}: {printable(place.name)} lies outside its unit or overlaps", fix=_PACK_AGAIN
                )
            end = place.offset + place.num_bytes
        if unit.name in names or unit.num_bytes <= 0:
            raise BadInput(f"{printable(folder.name)}/{MANIFEST}: the unit {printable(unit.name)} is there twice or empty", fix=_PACK_AGAIN)
        names.add(unit.name)
    return manifest


def _require_same_layout(folder: Path, manifest: PackedManifest, anatomy: Anatomy) -> None:
    ours = {unit.name: unit for unit in anatomy.units}
    theirs = {packed.unit.name: packed.unit for packed in manifest.units}
    for here, there, whose in ((ours, theirs, "the folder has not"), (theirs, ours, "the model has not")):
        lacking = [name for name in here if name not in there]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise BadInput(f"{printable(folder.name)} is of another model: {whose} the unit {printable(lacking[0])}{more}", fix=_PACK_AGAIN)
    for name, unit in ours.items():
        difference = _difference(unit, theirs[name])
        if difference:
            raise BadInput(f"{printable(folder.name)} is of another model: unit {printable(name)}, {difference}", fix=_PACK_AGAIN)


def _difference(ours: Unit, theirs: Unit) -> str:
    """The first field that differs, in words."""
    packed_places = {place.name: place for place in theirs.places}
    for place in ours.places:
        other = packed_places.get(place.name)
        if other is None:
            return f"{printable(place.name)} is not in the folder"
        for field in ("dtype", "shape", "stride", "offset", "num_bytes"):
            if getattr(place, field) != getattr(other, field):
                return f"{printable(place.name)}: {field} is {getattr(other, field)} in the folder, {getattr(place, field)} in the model"
    if len(ours.places) != len(theirs.places):
        extra = next(name for name in packed_places if name not in {place.name for place in ours.places})
        return f"{printable(extra)} is not in the model"
    for field in ("num_bytes", "ring", "order"):
        if getattr(ours, field) != getattr(theirs, field):
            return f"{field} is {getattr(theirs, field)} in the folder, {getattr(ours, field)} in the model"
    return ""
