"""Write beside the target, then rename: a path holds the old file or the complete new one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuopt.core.errors import ResourceError


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder beside the target; what lies in that folder at the end is moved next to the target, the named file last.

    Nothing is left where the body raises. Raises ResourceError where the folder cannot be written or the disk is full.
    """
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}."))
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            file.chmod(
                0o666 & ~_umask()
            )  # safetensors makes its files private, whatever the umask: who serves the model may be another user
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(file, path.parent / file.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"no room for {path.name} on its disk", fix="free some space, or name another folder") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise ResourceError(f"{path} cannot be written: {error.strerror}", fix="name another path") from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
