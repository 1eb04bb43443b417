"""Files of a folder <-> the rows of `manifest.json`; which names a bundle may hold, and which bundles hold code."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.result import SCHEMA_VERSION, Count, Manifest, ManifestFile

MANIFEST = "manifest.json"
MAC = "manifest.mac"
"""Hex HMAC of manifest.json under this user's key: says the bundle was built here."""
OWN_FILES = (MANIFEST, MAC)
MAX_MANIFEST_BYTES = 64 << 20
"""A manifest with 10,000 raw samples is under 1 MB; anything near this is no manifest."""
RESERVED = ".gpuopt-"
"""In the names of locks and temporary folders, so that no target's folders can be taken for another's leftovers."""
MAX_NAME_BYTES = 200
"""File systems take 255; the temporary folder and the lock beside the target carry a longer name than the target."""
SCHEMA = SCHEMA_VERSION

NATIVE_BACKENDS = frozenset({"aoti", "trt", "torch-trt"})
"""Their artifacts are machine code for one device and one set of libraries. Any other backend builds again from a portable file."""
DATA_BACKENDS = frozenset({"ort"})
"""Their runtimes only read data out of a bundle's files. Others rebuild a program from theirs: .pt2 runs code when it is opened."""
DATA_SUFFIXES = frozenset({".onnx", ".data", ".safetensors", ".npz", ".json", ".txt"})


def safe_name(text: str) -> str:
    """Any model's name -> a file name: letters, digits, `.`, `_` and `-`, at most 100 characters, never hidden, never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    return re.sub(r"[-.]*(?:--|\.\.|-\.|\.-)[-.]*", "-", kept).strip("-.")[:100].rstrip("-.") or "model"


def require_output_name(name: str) -> None:
    """Refuse what would be trouble as a folder's name. Raises UsageError with a name that would do."""
    odd = [c for c in name if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    why = ""
    if name in ("", ".", ".."):
        why = "names no folder of its own"
    elif odd:
        why = "has control characters"
    elif len(os.fsencode(name)) > MAX_NAME_BYTES:
        why = f"is longer than {MAX_NAME_BYTES} bytes"
    elif RESERVED in name:
        why = f"holds {RESERVED!r}, which marks temporary folders"
    if why:
        raise UsageError(f"the output name {name[:60]!r} {why}", fix=f"-o {safe_name(name.replace(RESERVED, '-'))}")


def require_member_name(name: str) -> None:
    """Refuse a file name that could lead out of the bundle or shadow its own files. Raises BadInput."""
    path = PurePosixPath(name)
    bad = (
        not name
        or name != str(path)
        or path.is_absolute()
        or "\\" in name
        or ".." in path.parts
        or path.parts[0] in OWN_FILES
        or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
        or any(len(os.fsencode(part)) > 255 for part in path.parts)
    )
    if bad:
        raise BadInput(
            f"the manifest names the file {name[:80]!r}, which is not a plain name inside the bundle", fix="build the bundle again"
        )


def describe_file(folder: Path, name: str, role: str) -> ManifestFile:
    """Hash and size of one file of `folder`. Raises BadInput for a symlink or anything not a regular file."""
    path = folder / name
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{name} in the bundle is not a regular file", fix="a bundle holds plain files alone, no links")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ManifestFile(name=name, sha256=sha256, bytes=status.st_size, role=role)


def members(folder: Path) -> list[str]:
    """Names of everything below `folder` but folders, relative, sorted, links not followed; the manifest and its signature left out."""
    names = []
    for where, folders, files in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(where, name))]
        names += [Path(where, name).relative_to(folder).as_posix() for name in files + linked]
    return sorted(name for name in names if name not in OWN_FILES)


def describe_folder(folder: Path, roles: Mapping[str, str]) -> tuple[ManifestFile, ...]:
    """Every file below `folder`. `roles` maps a role to a file name, as Runner.save returns it; a file without one gets `extra`."""
    role_of = {name: role for role, name in roles.items()}
    found = members(folder)
    missing = sorted(set(role_of) - set(found))
    if missing:
        raise ValueError(f"the backend said it wrote {missing[0]!r} and did not")
    for name in found:
        require_member_name(name)
    return tuple(describe_file(folder, name, role_of.get(name, "extra")) for name in found)


def file_of(manifest: Manifest, role: str) -> str | None:
    """Name of the file with this role, relative to the bundle; None when there is none."""
    return next((file.name for file in manifest.files if file.role == role), None)


def stored_count(manifest: Manifest) -> Count | None:
    """FLOPs of one call as counted when the bundle was built, at its own dimensions; None when they were not."""
    if manifest.flops is None or manifest.flop_coverage is None:
        return None
    return Count(
        records=(),
        flops=manifest.flops,
        flops_by_dtype=dict(manifest.flops_by_dtype),
        bytes=(manifest.run.bytes if manifest.run else None) or 0.0,
        coverage=manifest.flop_coverage,
        method="bundle manifest",
    )


def needs_consent(manifest: Manifest) -> bool:
    """Whether loading the bundle can run what somebody else wrote, so that only this user's signature or consent will do.

    All bundles do but those of a runtime that reads data: options may name libraries, a recipe may name a factory, .pt2 and engines are code.
    """
    if manifest.backend.name not in DATA_BACKENDS:
        return True
    if any(not isinstance(value, bool | int | float) for value in manifest.backend.options.values()):
        return True  # a path to a custom-op library or a provider's plug-in is text
    return any(PurePosixPath(file.name).suffix not in DATA_SUFFIXES for file in manifest.files)
