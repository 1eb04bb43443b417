"""Safetensors files, an index or a folder -> checked entries, and their bytes in memory that is given."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from gpuopt.core.errors import BadInput, UsageError
from gpuopt.streaming import headers, reading
from gpuopt.streaming.headers import Entry
from gpuopt.trust.policy import printable

MAX_INDEX_BYTES = 100_000_000
DIRECT_FROM_BYTES = 8 * 2**30
"""Weights beyond this would push everything else out of the page cache, and are read past it."""
_INDEX_BRACKETS = re.compile(rb"\{(?:\{(?:\[\]|\{\})*+\})*+\}")
_OF = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_WHOLE = "download the folder again, whole"
_SHOWN = 5


class Shards:
    """Tensors in open, checked files. Closing twice is fine; reading after it is a bug."""

    def __init__(self, files: Sequence[reading.File], where: Mapping[str, tuple[int, Entry]], notes: Sequence[str]) -> None:
        self._files = tuple(files)
        self._where = dict(where)
        self._notes = list(notes)
        self.entries: Mapping[str, Entry] = {name: entry for name, (_, entry) in where.items()}
        """Name -> entry, in the order of files and bytes."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in order."""
        return tuple(file.path for file in self._files)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.num_bytes for _, entry in self._where.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know: reads through the page cache, tensors no index names."""
        return tuple(dict.fromkeys([*self._notes, *(note for file in self._files for note in file.notes)]))

    def read_into(self, name: str, target: torch.Tensor, *, num_threads: int = reading.NUM_THREADS) -> None:
        """Bytes of one tensor, row-major, into a contiguous uint8 CPU tensor of exactly that length."""
        self.read_all([(name, target)], num_threads=num_threads)

    def read_all(self, pairs: Iterable[tuple[str, torch.Tensor]], *, num_threads: int = reading.NUM_THREADS) -> None:
        """The same for many tensors at once. Raises BadInput when a file ends early or was changed, ResourceError when the disk fails."""
        reads = []
        touched: set[int] = set()
        for name, target in pairs:
            index, entry = self._where[name]
            require_target(target, entry.num_bytes, name)
            reads.append(reading.Read(file=self._files[index], offset=entry.offset, target=target))
            touched.add(index)
        reading.read(reads, num_threads=num_threads)
        for index in touched:
            self._files[index].require_unchanged()

    def sample(self, name: str, start: int, num_bytes: int) -> bytes:
        """A few bytes of a tensor."""
        index, entry = self._where[name]
        target = torch.empty(min(num_bytes, entry.num_bytes - start), dtype=torch.uint8)
        self._files[index].read_into(entry.offset + start, target)
        return target.numpy().tobytes()

    def known_sha256(self) -> dict[Path, str]:
        """Files whose sha256 is known: a hub's cache names large files by it."""
        return {file.path: real.name for file in self._files if re.fullmatch(r"[0-9a-f]{64}", (real := file.path.resolve()).name)}

    def verify(self, sha256: Mapping[Path, str]) -> None:
        """Read whole files and compare their sha256. Raises BadInput naming the file that differs."""
        for file in self._files:
            if file.path in sha256 and (found := _sha256_of(file)) != sha256[file.path].lower():
                raise BadInput(f"{file.name} is damaged: its sha256 is {found}, not {sha256[file.path]}", fix="download the file again")

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(paths: Path | str | Sequence[Path | str], *, direct: bool | None = None) -> Shards:
    """A folder, an index, a .safetensors file or several of them, every header checked before any tensor is read.

    direct: past the page cache; None: when there is more than DIRECT_FROM_BYTES to read.
    Raises BadInput naming file, tensor and bytes; UsageError when there is nothing to open.
    """
    named = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not named:
        raise UsageError("no safetensors file is named", fix="name a .safetensors file, an index or a folder")
    folder = named[0] if len(named) == 1 and named[0].is_dir() else None
    index = _index_of(named[0]) if len(named) == 1 else None
    listed = weight_map(index) if index else None
    if listed is not None and index is not None:
        found = [index.parent / shard for shard in sorted(set(listed.values()))]
    elif folder is not None:
        found = _files_of(folder)
    else:
        found = named  # a shard alone, named by its user, is what they want
    if index is not None or folder is not None:
        for path in found:
            _require_inside(path)
    total = sum(path.stat().st_size for path in found if path.is_file())
    files: list[reading.File] = []
    with reading.closing_on_error(files):
        per_file: list[dict[str, Entry]] = []
        for path in found:
            files.append(reading.File(path, direct=total > DIRECT_FROM_BYTES if direct is None else direct))
            per_file.append(_entries(files[-1]))
        where, notes = _joined(files, per_file) if listed is None or index is None else _listed(files, per_file, listed, index)
        return Shards(files, where, notes)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the file that an index says it is in: plain names of files that are there. Raises BadInput."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise BadInput(f"{printable(index.name)} is larger than {MAX_INDEX_BYTES} bytes", fix=_WHOLE)
    content = headers.strict_json(index.read_bytes().strip(), _INDEX_BRACKETS, where=printable(index.name))
    entries = content.get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{printable(index.name)} names no tensors", fix=_WHOLE)
    checked: set[str] = set()
    for shard in entries.values():
        if isinstance(shard, str) and shard in checked:
            continue
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise BadInput(
                f"{printable(index.name)} names the shard {printable(str(shard))!r}, outside its folder", fix="do not use this folder"
            )
        if not (index.parent / shard).is_file():
            raise BadInput(f"{printable(index.name)} names the shard {printable(shard)}, which is not there", fix=_WHOLE)
        checked.add(shard)
    return dict(entries)


def require_target(target: torch.Tensor, num_bytes: int, name: str) -> None:
    """Memory that bytes may be written to. A wrong one is a bug of the caller, which would write past its end."""
    if target.dtype is not torch.uint8 or target.device.type != "cpu" or not target.is_contiguous() or target.numel() != num_bytes:
        raise ValueError(f"{name} needs {num_bytes} contiguous bytes on the CPU, got {target.numel()} of {target.dtype} on {target.device}")


def _index_of(path: Path) -> Path | None:
    if path.name.endswith(".json"):
        if not path.is_file():
            raise UsageError(f"there is no file {printable(str(path))}", fix="check the path")
        return path
    if not path.is_dir():
        return None
    found = sorted(path.glob("*.safetensors.index.json"))
    usual = path / "model.safetensors.index.json"
    if usual in found:
        return usual
    if len(found) > 1:
        raise UsageError(f"{printable(path.name)} holds {len(found)} indices", fix=f"name one: {printable(str(found[0]))}")
    return found[0] if found else None


def _files_of(folder: Path) -> list[Path]:
    usual = folder / "model.safetensors"
    if usual.is_file():
        return [usual]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise BadInput(f"the folder {printable(folder.name)} holds no .safetensors file", fix="download the weights as safetensors")
    if all(_OF.fullmatch(path.name) for path in found):
        _require_all(found)
    elif len(found) > 1:
        names = ", ".join(printable(path.name) for path in found[:_SHOWN])
        raise UsageError(
            f"the folder {printable(folder.name)} holds {len(found)} .safetensors files and no index: {names}", fix="name one of them"
        )
    return found


def _require_all(found: Sequence[Path]) -> None:
    """Shards without their index, as `-00001-of-00003` says. Raises BadInput naming the first that is missing."""
    match = _OF.fullmatch(found[0].name)
    stem, _, total = match.groups() if match else ("", "", "0")
    have = {path.name for path in found}
    for number in range(1, int(total) + 1):
        name = f"{stem}-{number:05d}-of-{total}.safetensors"
        if name not in have:
            raise BadInput(f"the shard {printable(name)} is not there ({len(found)} of {int(total)} are)", fix=_WHOLE)


def _require_inside(path: Path) -> None:
    """A link may lead within its folder, or to the blobs of the hub's cache the folder is in; any other would read files the user did not name."""
    folder, real = path.parent.resolve(), path.resolve()
    allowed = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if real.parent not in allowed:
        raise BadInput(
            f"{printable(path.name)} is a link out of its folder, to {printable(str(real))}",
            fix="copy the file into the folder if it is the right one",
        )


def _entries(file: reading.File) -> dict[str, Entry]:
    first = torch.empty(min(8, file.num_bytes), dtype=torch.uint8)
    file.read_into(0, first)
    length = headers.header_bytes(bytes(first.tolist()), file.num_bytes, where=file.name)
    header = torch.empty(length, dtype=torch.uint8)
    file.read_into(8, header)
    return headers.entries(header.numpy().tobytes(), file.num_bytes, where=file.name)[0]


def _joined(files: Sequence[reading.File], per_file: Sequence[Mapping[str, Entry]]) -> tuple[dict[str, tuple[int, Entry]], list[str]]:
    where: dict[str, tuple[int, Entry]] = {}
    for index, entries in enumerate(per_file):
        for name, entry in entries.items():
            if name in where:
                raise BadInput(
                    f"{_shown([name])} is both in {files[where[name][0]].name} and in {files[index].name}",
                    fix="name the files of one model, or the index that says which it is",
                )
            where[name] = (index, entry)
    return where, []


def _listed(
    files: Sequence[reading.File], per_file: Sequence[Mapping[str, Entry]], listed: Mapping[str, str], index: Path
) -> tuple[dict[str, tuple[int, Entry]], list[str]]:
    """What the index names, where it says. A tensor elsewhere means that files were swapped or mixed."""
    number = {file.path.name: i for i, file in enumerate(files)}
    where: dict[str, tuple[int, Entry]] = {}
    for name, shard in listed.items():
        entries = per_file[number[shard]]
        if name not in entries:
            other = next((file.name for file, there in zip(files, per_file, strict=True) if name in there), None)
            tail = f"it is in {other}: files were swapped, or belong to two versions" if other else "no shard has it"
            raise BadInput(f"{printable(index.name)} says that {_shown([name])} is in {printable(shard)}, but {tail}", fix=_WHOLE)
        where[name] = (number[shard], entries[name])
    extra = [name for file, entries in zip(files, per_file, strict=True) for name in entries if listed.get(name) != file.path.name]
    notes = [f"{len(extra)} tensors of the shards are not where {index.name} says, and are left out: {_shown(extra)}"] if extra else []
    ordered = sorted(where.items(), key=lambda item: (item[1][0], item[1][1].offset))
    return dict(ordered), notes


def _sha256_of(file: reading.File) -> str:
    digest = hashlib.sha256()
    buffer = torch.empty(reading.PIECE_BYTES, dtype=torch.uint8)
    for start in range(0, file.num_bytes, reading.PIECE_BYTES):
        part = buffer[: min(reading.PIECE_BYTES, file.num_bytes - start)]
        file.read_into(start, part)
        digest.update(reading.memory_of(part))
    return digest.hexdigest()


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more
