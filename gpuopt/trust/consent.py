"""File -> hash -> whether its code may run. The user's recorded consent, and the key that marks what gpuopt built here."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpuopt.core.errors import ResourceError, UsageError

ENV = "GPUOPT_TRUST"
"""Hashes, separated by commas or blanks. Never `1`: a blanket consent set once is forgotten and then applies to every file."""

_HASH = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One recorded consent."""

    sha256: str
    path: str
    """Where the file was when consent was given; for the reader, not checked."""
    time_s: int


def state_dir() -> Path:
    """`$XDG_STATE_HOME/gpuopt`, made 0700. Raises ResourceError when it cannot be made or belongs to someone else."""
    base = os.environ.get("XDG_STATE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    folder = root / "gpuopt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise ResourceError(f"the state folder {folder} belongs to another user", fix="set XDG_STATE_HOME to a folder of your own")
        if stat.S_IMODE(status.st_mode) & 0o077:
            folder.chmod(0o700)  # consent that others can write is no consent
    except OSError as error:
        raise ResourceError(
            f"the state folder {folder} cannot be used: {error}", fix="set XDG_STATE_HOME to a folder you can write"
        ) from error
    return folder


def sha256_of(path: Path | str) -> str:
    """Hex sha256 of a file; of a bundle, its manifest's (which holds the hash of every file); of another folder, of its names and files."""
    path = Path(path)
    if path.is_dir():
        manifest = path / "manifest.json"
        if manifest.is_file():
            return sha256_of(manifest)
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path).as_posix().encode("utf-8", "surrogateescape")
            whole.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(sha256_of(file)))
        return whole.hexdigest()
    try:
        with path.open("rb") as file_object:
            return hashlib.file_digest(file_object, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", fix="check the path and its permissions") from error


def parse_hash(text: str) -> str | None:
    """`sha256:HEX` or HEX -> lower-case hex; None when it is neither."""
    match = _HASH.fullmatch(text.strip())
    return match[1].lower() if match else None


def record(path_or_hash: Path | str) -> str:
    """Remember consent for a file, a folder or a hash; returns the hash. Harmless twice."""
    known = parse_hash(str(path_or_hash))
    if known is None and not Path(path_or_hash).exists():
        raise UsageError(f"{path_or_hash} is neither a file nor a sha256", fix="gpuopt trust FILE, or gpuopt trust sha256:…")
    sha256 = known or sha256_of(path_or_hash)
    with _locked() as folder:
        if all(entry.sha256 != sha256 for entry in _read(folder)):
            where = "" if known else str(Path(path_or_hash).absolute())
            _write(folder, (*_read(folder), Entry(sha256=sha256, path=where, time_s=int(time.time()))))
    return sha256


def forget(path_or_hash: Path | str) -> bool:
    """Take consent back; False when there was none."""
    sha256 = parse_hash(str(path_or_hash)) or sha256_of(path_or_hash)
    with _locked() as folder:
        before = _read(folder)
        after = tuple(entry for entry in before if entry.sha256 != sha256)
        if len(after) == len(before):
            return False
        _write(folder, after)
        return True


def entries() -> tuple[Entry, ...]:
    """Everything consented to, oldest first."""
    return _read(state_dir())


def is_trusted(sha256: str, extra: tuple[str, ...] = ()) -> bool:
    """Whether code with this hash may run: recorded, named in `extra` (hashes, or paths hashed now) or in $GPUOPT_TRUST (hashes alone).

    Raises UsageError for an entry that is neither.
    """
    wanted = parse_hash(sha256)
    if wanted is None:
        raise ValueError(f"not a sha256: {sha256!r}")
    for text in re.split(r"[\s,]+", os.environ.get(ENV, "").strip()):
        if not text:
            continue
        named = parse_hash(text)
        if named is None:
            raise UsageError(
                f"{ENV} holds {text[:80]!r}, which is not a sha256", fix=f"{ENV}=sha256:… of the file you mean; there is no blanket value"
            )
        if named == wanted:
            return True
    for text in extra:
        named = parse_hash(text)
        if named is None:
            if not Path(text).exists():
                raise UsageError(f"--trust {text[:200]!r} is neither a file nor a sha256", fix="--trust sha256:… or --trust FILE")
            named = sha256_of(text)
        if named == wanted:
            return True
    return any(entry.sha256 == wanted for entry in entries())


def sign(data: bytes) -> str:
    """Hex HMAC-SHA256 under this user's key, made on first use: the mark of what gpuopt built here."""
    return hmac.new(_key(), data, hashlib.sha256).hexdigest()


def is_ours(data: bytes, mac: str) -> bool:
    """Whether `mac` is `sign(data)` by this user's key. False where no key was ever made."""
    path = state_dir() / "key"
    if not path.is_file() or not re.fullmatch(r"[0-9a-f]{64}", mac):
        return False
    return hmac.compare_digest(hmac.new(_read_key(path), data, hashlib.sha256).hexdigest(), mac)


def _key() -> bytes:
    path = state_dir() / "key"
    if not path.exists():
        # Written whole under another name, then linked: of two processes that start together one wins, and nobody reads half a key.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".key-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.unlink(temporary)
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ResourceError(
            f"the key {path} can be read or written by others", fix=f"chmod 600 {path}, or delete it: bundles then want consent again"
        )
    key = path.read_bytes()
    if len(key) != 32:
        raise ResourceError(f"the key {path} is damaged", fix=f"delete {path}; bundles built here then want consent again")
    return key


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    folder = state_dir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _read(folder: Path) -> tuple[Entry, ...]:
    path = folder / "trusted.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            sha256 = parse_hash(row["sha256"])
            if sha256 is None:
                raise ValueError("no sha256")
            found.append(Entry(sha256=sha256, path=str(row["path"]), time_s=int(row["time_s"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ResourceError(f"{path} line {number} is damaged ({error})", fix=f"delete that line of {path}") from error
    return tuple(found)


def _write(folder: Path, all_entries: tuple[Entry, ...]) -> None:
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".trusted-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        for entry in all_entries:
            file.write(json.dumps({"sha256": entry.sha256, "path": entry.path, "time_s": entry.time_s}, ensure_ascii=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "trusted.jsonl")
