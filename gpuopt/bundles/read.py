"""A folder -> its Manifest, once every file is what it says, this machine is what it was built for, and its code may run."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from gpuopt.bundles.fingerprint import current, mismatches
from gpuopt.bundles.manifest import MAC, MANIFEST, MAX_MANIFEST_BYTES, SCHEMA, describe_file, members, needs_consent, require_member_name
from gpuopt.bundles.manifest import file_of as file_of
from gpuopt.core import codec
from gpuopt.core.errors import BadInput, Unavailable, Untrusted, UsageError
from gpuopt.core.result import Device, Manifest
from gpuopt.trust import consent

REBUILD = "build it again here: gpuopt compile MODEL"


def open_bundle(path: Path, trust: tuple[str, ...] = (), *, device: Device | None = None) -> Manifest:
    """Verify a bundle and return its manifest. Opens no artifact.

    `trust` holds hashes (or paths) consented to on the command line, of the manifest. `device` is what it is to run on; None checks no fit, and the
    caller must `require_match` before anything is loaded. Raises BadInput (not a bundle, a file changed, missing, unlisted or linked),
    Unavailable (built for something else, the field named), Untrusted (not built here and not consented to).
    """
    data = _read_own(path, MANIFEST)
    manifest = _parse(path, data)
    _check_files(path, manifest)
    if device is not None:
        require_match(manifest, current(manifest.backend.name, device))
    if needs_consent(manifest):
        _require_consent(path, data, trust)
    return manifest


def require_match(manifest: Manifest, here: Mapping[str, str]) -> None:
    """Refuse a bundle built for something else than `here` (fingerprint.current). Raises Unavailable naming the first field and both sides."""
    wrong = mismatches(manifest, here)
    if wrong:
        field, built, found = wrong[0]
        more = f" (and {len(wrong) - 1} more: {', '.join(name for name, _, _ in wrong[1:])})" if len(wrong) > 1 else ""
        raise Unavailable(f"this {manifest.backend.name} bundle was built for {field} {built}, here it is {found}{more}", fix=REBUILD)


def is_built_here(path: Path) -> bool:
    """Whether this user's key signed the manifest as it stands."""
    try:
        return _is_ours(path, _read_own(path, MANIFEST))
    except BadInput:
        return False


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path / MANIFEST} is not JSON: {error}", fix="the bundle is damaged: copy or build it again") from error
    written = plain.get("schema_version") if isinstance(plain, dict) else None
    if not isinstance(written, int) or isinstance(written, bool):
        raise BadInput(
            f"{path / MANIFEST} is not a bundle's manifest: it has no schema_version", fix="name a folder that gpuopt compile wrote"
        )
    if written != SCHEMA:
        raise Unavailable(
            f"this bundle has schema_version {written}, this gpuopt reads {SCHEMA}", fix="use the gpuopt that wrote it, or " + REBUILD
        )
    try:
        manifest = codec.from_json(Manifest, data, what=str(path / MANIFEST))
    except UsageError as error:
        raise BadInput(error.message, fix="the bundle is damaged or was written by another version: copy or build it again") from error
    names = [file.name for file in manifest.files]
    for name in names:
        require_member_name(name)
    if len({name.casefold() for name in names}) != len(names):
        raise BadInput(f"{path / MANIFEST} lists a file twice", fix="build the bundle again")
    return manifest


def _check_files(path: Path, manifest: Manifest) -> None:
    present = members(path)
    listed = {file.name for file in manifest.files}
    for name in present:
        if (path / name).is_symlink():
            raise BadInput(f"{name} in {path} is a link", fix="a bundle holds plain files alone; copy it with its links resolved")
        if name not in listed:
            raise BadInput(
                f"{path} holds {name!r}, which its manifest does not list", fix="remove that file: a bundle holds what it was built with"
            )
    for file in manifest.files:
        if file.name not in present:
            raise BadInput(f"{path} lacks {file.name!r}, which its manifest lists", fix="the copy is incomplete: copy or build it again")
        size = (path / file.name).lstat().st_size
        if size != file.bytes:  # before hashing: a file grown to a terabyte is refused at once
            raise BadInput(
                f"{file.name} in {path} has {size} bytes, its manifest says {file.bytes}",
                fix="the file was changed: copy or build it again",
            )
        found = describe_file(path, file.name, file.role)
        if found.sha256 != file.sha256:
            raise BadInput(
                f"{file.name} in {path} is not the file that was built: its sha256 is {found.sha256[:12]}…, the manifest says {file.sha256[:12]}…",
                fix="the file was changed or damaged: copy or build it again",
            )


def _require_consent(path: Path, data: bytes, trust: tuple[str, ...]) -> None:
    if _is_ours(path, data):
        return
    sha256 = consent.sha256_of(path / MANIFEST)
    if consent.is_trusted(sha256, trust):
        return
    raise Untrusted(
        f"{path} was not built here, or its manifest was changed since, and loading it runs its code",
        fix=f"gpuopt trust {path}, or --trust sha256:{sha256}",
    )


def _is_ours(path: Path, data: bytes) -> bool:
    try:
        mac = _read_own(path, MAC)
    except BadInput:
        return False
    return consent.is_ours(data, mac.decode("ascii", "replace").strip())


def _read_own(path: Path, name: str) -> bytes:
    """A small regular file of the bundle; links, folders, devices and pipes are refused without waiting on them."""
    fix = "name a folder that gpuopt compile wrote"
    try:
        handle = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadInput(f"{path} is not a bundle: {name}: {getattr(error, 'strerror', error)}", fix=fix) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise BadInput(f"{path} is not a bundle: {name} is not a regular file of at most {MAX_MANIFEST_BYTES >> 20} MiB", fix=fix)
        with open(handle, "rb", closefd=False) as file:
            return file.read(MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BadInput(f"{path / name} cannot be read: {error.strerror}", fix=fix) from error
    finally:
        os.close(handle)
