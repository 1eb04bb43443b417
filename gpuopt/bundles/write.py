"""A build into an empty folder -> a bundle at the target, or nothing at all.

The target holds the old bundle or the complete new one at every instant: files go into a folder beside it, are hashed and flushed, the manifest comes last,
and one rename publishes. Runs on the same target queue on a lock beside it. Folders left by a killed run are swept by whoever holds that lock next, since
nobody else can be writing them; age says nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from gpuopt.bundles.manifest import MAC, MANIFEST, OWN_FILES, RESERVED, describe_folder, members, require_output_name
from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, ResourceError, UsageError
from gpuopt.core.result import Manifest
from gpuopt.trust import consent

LOCK_TIMEOUT_S = 30.0
"""Long enough for another run's last write, short enough to be told that one is running."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FULL_TEXT = ("no space left", "disk quota exceeded", "file too large")
_MANIFEST_ROOM = 1 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

Build = Callable[[Path], Mapping[str, str] | None]
"""Writes an artifact into an existing empty folder and returns role -> file name: Runner.save is one. None where the manifest has the roles."""


def check_target(path: Path, *, force: bool = False, source: Path | None = None) -> None:
    """Whether a bundle may be written to `path`, before any work. `source` is the model's own file or folder, which must not be touched.

    Raises UsageError (a file, a link, foreign content, inside the source, an impossible name) or ResourceError (the folder cannot be written to).
    """
    path = _absolute(path)
    require_output_name(path.name)
    if path.is_symlink():
        raise UsageError(f"the output {path} is a link", fix="name the folder itself, or another one")
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output {path} is a file", fix="name a folder that does not exist yet")
    if source is not None and source.exists():
        ours, theirs = path.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or (theirs.is_dir() and theirs in ours.parents):
            raise UsageError(f"the output {path} and the input {source} lie inside each other", fix="name an output elsewhere")
    if path.is_dir():
        _require_replaceable(path, force)
    _require_writable(path.parent)


@contextlib.contextmanager
def staging(target: Path, *, force: bool = False, source: Path | None = None, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[Path]:
    """Lock the target and yield an empty folder beside it, to be written to and then handed to `publish`.

    Whatever happens inside, nothing but a published bundle stays. Raises what check_target raises, and ResourceError when another run holds the target
    for longer than `lock_timeout_s` or the disk is full.
    """
    target = _absolute(target)
    check_target(target, force=force, source=source)
    made = _make_parents(target.parent)
    try:
        with _locked(target, lock_timeout_s):
            _sweep(target)
            with _disk_errors(target.parent):
                folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
                folder.chmod(0o777 & ~_umask())
            try:
                yield folder
            finally:
                _removed(folder)  # after an exchange it holds the replaced bundle
    finally:
        for parent in made:  # innermost first; one that holds the published bundle is not empty and stays
            with contextlib.suppress(OSError):
                parent.rmdir()


def _removed(folder: Path) -> None:
    """All of it, also where Ctrl-C comes in the middle: that is told afterwards."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(build: Build | Path, target: Path, manifest: Manifest, *, force: bool = False, source: Path | None = None) -> Manifest:
    """Write a bundle and put it in the target's place; returns the manifest as written, with `files` filled in.

    `build` writes into a fresh folder, or is a folder from `staging` that something else has written to. Roles are those `build` returned and those
    in `manifest.files`; every file found is listed. Raises what `staging` raises.
    """
    if isinstance(build, Path):
        return _seal(build, _absolute(target), manifest, {}, force)
    with staging(target, force=force, source=source) as folder:
        with _disk_errors(folder):
            roles = build(folder) or {}
        return _seal(folder, _absolute(target), manifest, roles, force)


def _seal(folder: Path, target: Path, manifest: Manifest, roles: Mapping[str, str], force: bool) -> Manifest:
    if folder.parent != target.parent or not folder.name.startswith(_prefix(target)):
        raise ValueError(f"{folder} is not a staging folder of {target}")
    roles = {**{file.role: file.name for file in manifest.files}, **roles}
    with _disk_errors(folder):
        for path in folder.rglob("*"):
            if path.is_file():  # some writers make files that only their owner may read
                path.chmod(0o666 & ~_umask())
        _sync_tree(folder)
        sealed = replace(manifest, files=describe_folder(folder, roles))
        data = codec.to_json(sealed, indent=1).encode()
        _write(folder / MAC, consent.sign(data).encode() + b"\n")
        _write(folder / MANIFEST, data)
        _sync(folder)
        check_target(target, force=force)  # again: much can happen while a model compiles
        _swap(folder, target)
        _sync(target.parent)
    return sealed


def _require_replaceable(path: Path, force: bool) -> None:
    found = os.listdir(path)
    if not found:
        return
    try:
        with (path / MANIFEST).open("rb") as file:
            plain = json.loads(file.read())
        listed = {row["name"] for row in plain["files"]}
        is_bundle = isinstance(plain["gpuopt"], str) and isinstance(plain["schema_version"], int)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_bundle, listed = False, set()
    if not is_bundle:
        raise UsageError(
            f"the output {path} holds files that are no gpuopt bundle",
            fix="name a folder that does not exist yet; --force replaces bundles alone",
        )
    foreign = sorted(set(members(path)) - listed)
    if foreign:
        raise UsageError(f"the output {path} holds {foreign[0]!r}, which gpuopt did not write", fix="move it away, or name another folder")
    if not force:
        raise UsageError(f"the output {path} is a bundle already", fix="--force replaces it")


def _require_writable(folder: Path) -> None:
    """By writing: permission bits say nothing to root, nor about a read-only mount."""
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"the output's parent {folder} is not a folder", fix="name an output in a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResourceError(f"cannot write to {folder}: {error.strerror}", fix="name an output in a folder you can write to") from error


def _make_parents(folder: Path) -> list[Path]:
    """Make missing parents; returns those made, innermost first, so that a failed run takes them away again."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    with _disk_errors(folder):
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
    return missing


@contextlib.contextmanager
def _locked(target: Path, timeout_s: float) -> Iterator[None]:
    path = target.parent / f".{target.name}{RESERVED}lock"
    deadline = time.monotonic() + timeout_s
    while True:
        with _disk_errors(target.parent):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between our open and our lock: a lock on a file with no name locks nobody out.
            if _is_same_file(handle, path):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise ResourceError(f"another gpuopt run is writing {target}", fix="wait for it to end, or name another output") from None
            time.sleep(0.05)
        except OSError as error:
            os.close(handle)
            raise ResourceError(f"cannot lock {path}: {error.strerror}", fix="name an output on a file system with locks") from error
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while still held
        os.close(handle)


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _prefix(target: Path) -> str:
    return f".{target.name}{RESERVED}tmp-"


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}{RESERVED}old"


def _sweep(target: Path) -> None:
    """Clean up after a killed run. Called with the lock held, so whatever carries our names belongs to nobody alive."""
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        os.rename(aside, target)  # it died between the two renames
    shutil.rmtree(aside, ignore_errors=True)
    for entry in os.scandir(target.parent):
        if entry.name.startswith(_prefix(target)) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)


def _swap(folder: Path, target: Path) -> None:
    """Put `folder` in the target's place. What was there ends up in `folder`, or is gone."""
    if not target.exists() or not os.listdir(target):
        os.rename(folder, target)
        return
    if _exchange(folder, target):
        return
    # Without an atomic exchange there is an instant with no target; _sweep puts the old one back after a kill right there.
    aside = _aside(target)
    os.rename(target, aside)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the C library or the file system has none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(two))


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full or unwritable disk, in whatever words a library has for it -> ResourceError."""
    try:
        yield
    except GpuoptError:
        raise
    except Exception as error:
        # Broad, as libraries have their own types and words for it: safetensors' error quotes the errno, torch.save says "unexpected pos".
        code = error.errno if isinstance(error, OSError) else None
        if code in FULL or any(text in str(error).lower() for text in _FULL_TEXT) or _is_full(folder):
            raise ResourceError(
                f"no space left in {folder.parent}: nothing was written", fix="free some space, or name an output on another disk"
            ) from error
        if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise ResourceError(
                f"cannot write to {folder.parent}: {os.strerror(code or 0)}", fix="name an output in a folder you can write to"
            ) from error
        raise


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _MANIFEST_ROOM
    except OSError:
        return False


def _sync_tree(folder: Path) -> None:
    for where, folders, files in os.walk(folder):
        for name in files:
            if name in OWN_FILES and Path(where) == folder:
                raise ValueError(f"the backend wrote {name}, which is the bundle's own")
            _sync(Path(where, name))
        for name in folders:
            _sync(Path(where, name))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _absolute(path: Path) -> Path:
    """Absolute without resolving the last part, which may be a link that must be seen as one."""
    return Path(os.path.abspath(path))
