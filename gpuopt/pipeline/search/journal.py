"""What a search was answered -> a JSONL file, line by line as it goes, and back: `--resume` asks again only what has no line.

The first line says what is searched for. Every later one is an answer under the key of its question, whole or not there: a line that a crash cut short is
dropped when the file is read, and each carries a checksum, since a figure with one digit changed is valid JSON too. The file is locked while a search runs, so
two of them never write one output.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuopt.core import codec
from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.result import Run
from gpuopt.core.search import Screened
from gpuopt.pipeline.search.questions import Answer, Explained, Finalists, Mended

VERSION = 1
HEAD = b'{"fingerprint": '
"""How the first line of every journal begins."""
KINDS: Mapping[str, type[Any]] = {"screen": Screened, "explain": Explained, "mend": Mended, "finals": Finalists}
"""First word of a question's key -> the type of its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """First line: answers belong to this search and to no other."""

    version: int = VERSION
    search: str
    """Digest of what is searched: model, inputs, settings, goals; and of the model file's bytes where there is one."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    """What times depend on: device, driver, versions. An answer of another machine is no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One answer, and the runs that a report shows of it."""

    key: str
    answer: Any
    runs: dict[str, Run] = field(default_factory=dict)


@dataclass(slots=True)
class Journal:
    """An open, locked journal; without a file it remembers nothing."""

    answers: dict[str, Line] = field(default_factory=dict)
    _file: io.FileIO | None = None
    dropped: int = 0
    """Bytes of a last line that was cut short."""

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> Line | None:
        """What was answered to this question before, if it was."""
        return self.answers.get(key)

    def add(self, key: str, answer: Answer, runs: Mapping[str, Run]) -> None:
        """One more answer, on the disk when this returns. Raises ResourceError on a full one; what was written before stays whole."""
        line = Line(key=key, answer=answer, runs=dict(runs))
        self.answers[key] = line
        if self._file is None:
            return
        plain = {"key": key, "answer": codec.dump(answer), "runs": {k: codec.dump(r) for k, r in runs.items()}}
        _append(self._file, {**plain, "crc": _checksum(plain)})

    def close(self) -> None:
        """Give up the lock. Harmless twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def path_of(output: Path) -> Path:
    """Beside the bundle it leads to."""
    return output.with_name(f"{output.name}.search.jsonl")


def opened(path: Path | None, header: Header, *, resume: bool) -> Journal:
    """The journal of this search, locked. `resume`: with the answers of before.

    Raises ResourceError where another search holds it or it cannot be written, UsageError where there is nothing to resume or it is of another search, model,
    machine or version.
    """
    if path is None:
        if resume:
            raise UsageError("--resume needs the output whose search it goes on with", fix="-o FOLDER --resume")
        return Journal()
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path.name} is no regular file", fix="another -o")
    if resume and not path.exists():
        raise UsageError(f"there is no search to resume: {path.name} does not exist", fix="leave --resume away")
    try:
        file = open(path, "a+b", buffering=0)  # a buffer that could not be written would be tried again by close()
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}", fix="another -o") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResourceError(f"another search is writing {path.name}", fix="wait for it, or another -o") from error
        return _read(file, header, path) if resume else _begun(file, header, path)
    except BaseException:
        file.close()
        raise


def _begun(file: io.FileIO, header: Header, path: Path) -> Journal:
    """A new search. A journal with answers in it, which took somebody's hours, is kept beside it under `.old`."""
    if os.fstat(file.fileno()).st_size:
        file.seek(0)
        data = file.read()
        first, newline, answers = data.partition(b"\n")
        if not _is_header(first) and not (not newline and _is_torn(first)):
            raise UsageError(f"{path.name} is there and is no journal of a search", fix="another -o")
        if answers:
            _set_aside(data, path.with_name(f"{path.name}.old"))
    file.truncate(0)
    _append(file, codec.dump(header))
    return Journal(_file=file)


def _set_aside(data: bytes, path: Path) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ResourceError(f"{path.name}, where the journal of the search before is kept, cannot be written: {error.strerror}", fix="--resume goes on with that search; or another -o") from error  # fmt: skip


def _read(file: io.FileIO, header: Header, path: Path) -> Journal:
    file.seek(0)
    data = file.read()
    if b"\n" not in data and _is_torn(data):
        return _begun(file, header, path)  # it was ended before it had asked anything
    whole, _, rest = data.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    if not lines or not _is_header(lines[0]):
        raise UsageError(f"{path.name} is no journal of a search", fix="leave --resume away to begin anew")
    found = codec.from_plain(Header, json.loads(lines[0]), what=path.name)
    if found.version != header.version:
        raise UsageError(f"{path.name} was written by another version of gpuopt", fix="leave --resume away to begin anew")
    if found.search != header.search:
        raise UsageError(
            f"{path.name} is of another search: the model, its inputs or the settings differ", fix="leave --resume away to begin anew"
        )
    differing = sorted(k for k in {*found.fingerprint, *header.fingerprint} if found.fingerprint.get(k) != header.fingerprint.get(k))
    if differing:
        name = differing[0]
        raise UsageError(
            f"{path.name} was measured with another {name}: {found.fingerprint.get(name)}, here {header.fingerprint.get(name)}",
            fix="leave --resume away to begin anew",
        )
    journal = Journal(_file=file, dropped=len(rest))
    for number, text in enumerate(lines[1:], 2):
        try:
            plain = json.loads(text)
            if plain.pop("crc") != _checksum(plain):
                raise ValueError("the checksum differs")
            key = plain["key"]
            answer = codec.from_plain(KINDS[key.partition(" ")[0]], plain["answer"], what=path.name)
            runs = {k: codec.from_plain(Run, r, what=path.name) for k, r in plain["runs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise BadInput(f"{path.name}: line {number} is damaged", fix="leave --resume away to begin anew") from error
        journal.answers[key] = Line(key=key, answer=answer, runs=runs)
    if rest:
        file.truncate(len(whole) + 1)  # what a crash cut short would spoil the next line
    return journal


def _is_torn(line: bytes) -> bool:
    """A header that a crash cut short, to nothing even."""
    return line.startswith(HEAD) or HEAD.startswith(line)


def _is_header(line: bytes) -> bool:
    try:
        plain = json.loads(line)
    except ValueError:
        return False
    return isinstance(plain, dict) and {"version", "search"} <= set(plain)


def _checksum(plain: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def _append(file: io.FileIO, plain: Mapping[str, Any]) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        line = memoryview(json.dumps(plain, sort_keys=True).encode() + b"\n")
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError as error:
        try:
            os.ftruncate(file.fileno(), size)
        except OSError:
            pass  # the line is cut short then, and dropped when it is read
        raise ResourceError(f"the journal cannot be written: {error.strerror}", fix="free some disk space; --resume goes on") from error
