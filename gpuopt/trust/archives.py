"""A zip or safetensors file -> its members, after the checks that keep two parsers from seeing two different files. Reads headers only; pure standard library."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt.core.errors import BadInput

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit on its JSON header."""
MAX_INFLATED_BYTES = 256 * 2**20
"""TorchScript keeps its source deflated; more text than this is a bomb."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CORRUPT = "copy or download the file again, and compare its size and sha256 with the source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A checked zip of torch's layout: every member under one folder."""

    root: str
    members: frozenset[str]
    """Names with `root/` removed."""

    def has(self, prefix: str) -> bool:
        """Whether a member is, or lies below, `prefix`."""
        return any(name == prefix or name.startswith(prefix.rstrip("/") + "/") for name in self.members)


def open_zip(path: Path, *, stored_only: bool) -> Archive:
    """Check a zip the way torch writes it. Raises BadInput naming the first member at fault.

    torch reads with miniz, which looks for the directory elsewhere than `zipfile` does when a file is prefixed, has a comment or holds two
    directories; such files could show one pickle to the check and another to the loader, so only the plain layout is admitted.
    `stored_only` refuses compressed members: torch.save never writes them, and a small one inflates to gigabytes before any size check.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            _require_plain_end(path, file)
            infos = archive.infolist()
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError, EOFError, ValueError) as error:
        raise BadInput(f"{path.name} is a truncated or damaged zip archive ({error})", fix=_CORRUPT) from error
    if not infos:
        raise BadInput(f"{path.name} is a zip archive without members", fix=_CORRUPT)
    names = [info.filename for info in infos]
    size = path.stat().st_size
    inflated = 0
    for info in infos:
        parts = info.filename.split("/")
        if info.filename.startswith("/") or "\\" in info.filename or "\0" in info.filename or ".." in parts:
            raise BadInput(f"{path.name} holds a member that leaves its folder: {info.filename!r}", fix="do not use this file")
        if info.flag_bits & 0x1:
            raise BadInput(f"{path.name} holds the encrypted member {info.filename!r}", fix="write it again with torch.save")
        if info.compress_type == zipfile.ZIP_STORED:
            if info.compress_size != info.file_size or info.header_offset + info.file_size > size:
                raise BadInput(f"{path.name}: the sizes of member {info.filename!r} do not fit the file", fix=_CORRUPT)
            continue
        if stored_only:
            raise BadInput(
                f"{path.name} holds the compressed member {info.filename!r} ({info.file_size} bytes inflated); torch.save never compresses",
                fix="write it again with torch.save",
            )
        inflated += info.file_size
    if inflated > MAX_INFLATED_BYTES:
        raise BadInput(f"{path.name} inflates to {inflated} bytes of source", fix="do not use this file")
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) != len(names) else None
    if repeated is not None:
        raise BadInput(f"{path.name} holds the member {repeated!r} twice", fix="do not use this file")
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or any("/" not in name for name in names):
        raise BadInput(
            f"{path.name} is a zip archive, but not one that torch wrote (members under {', '.join(sorted(roots)[:4])})", fix=_CORRUPT
        )
    root = roots.pop()
    return Archive(root=root, members=frozenset(name.partition("/")[2] for name in names))


def _require_plain_end(path: Path, file: Any) -> None:
    size = path.stat().st_size
    file.seek(max(0, size - _END.size))
    tail = file.read(_END.size)
    if len(tail) < _END.size or tail[:4] != b"PK\x05\x06":
        raise BadInput(f"{path.name} is a truncated zip archive, or has data after its end", fix=_CORRUPT)
    _, _, _, _, count, directory_bytes, directory_at, comment = _END.unpack(tail)
    end_at = size - _END.size
    locator_at = end_at - _END64_LOCATOR.size
    if locator_at >= 0:
        file.seek(locator_at)
        signature, _, end64_at, _ = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
        if signature == b"PK\x06\x07":
            file.seek(end64_at)
            (signature64, _, _, _, _, _, _, count, directory_bytes, directory_at) = _END64.unpack(file.read(_END64.size))
            if signature64 != b"PK\x06\x06" or end64_at + _END64.size != locator_at:
                raise BadInput(f"{path.name} is a damaged zip64 archive", fix=_CORRUPT)
            end_at = end64_at
    if comment or directory_at + directory_bytes != end_at:
        raise BadInput(f"{path.name} is a zip archive with a second directory, a comment or a prefix", fix="do not use this file")
    file.seek(directory_at)
    if count and file.read(4) != b"PK\x01\x02":
        raise BadInput(f"{path.name} is a zip archive without a directory where its end says", fix=_CORRUPT)


def read_member(path: Path, name: str, *, limit_bytes: int = 64 * 2**20) -> bytes:
    """One small member (JSON, a version). Raises BadInput when it is larger than the limit or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(name)
            if info.file_size > limit_bytes:
                raise BadInput(
                    f"{path.name}: member {name!r} has {info.file_size} bytes, at most {limit_bytes} are read", fix="do not use this file"
                )
            return archive.read(info)
    except (zipfile.BadZipFile, KeyError, EOFError, OSError) as error:
        raise BadInput(f"{path.name}: member {name!r} cannot be read: {error}", fix=_CORRUPT) from error


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a .safetensors file, after size checks. Raises BadInput.

    Offsets, gaps, overlaps and dtypes are checked by the safetensors library when the tensors are read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadInput(f"{path.name} is a truncated safetensors file: {size} bytes", fix=_CORRUPT)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise BadInput(f"{path.name} claims a safetensors header of {length} bytes; the format allows {MAX_HEADER_BYTES}", fix=_CORRUPT)
        if 8 + length > size:
            raise BadInput(f"{path.name} is a truncated safetensors file: header of {length} bytes in a file of {size}", fix=_CORRUPT)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path.name}: its safetensors header is not valid JSON ({error})", fix=_CORRUPT) from error
    if not isinstance(header, dict):
        raise BadInput(f"{path.name}: its safetensors header is not an object", fix=_CORRUPT)
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} appears twice")
        found[key] = value
    return found
