"""Text -> stdout, stderr and files, each failure with its own meaning. Light: --help and errors need nothing else."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.reports.figures import clean


def emit(text: str) -> None:
    """Text to stdout, flushed. A reader that went away is no error; a full disk is. Raises ResourceError."""
    if sys.stdout is None:
        raise ResourceError("stdout is closed", fix="--json FILE keeps the report")
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an ASCII terminal still gets its report
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon(sys.stdout)
    except OSError as error:
        abandon(sys.stdout)
        raise ResourceError(f"stdout cannot be written: {error.strerror or error}", fix="--json FILE keeps the report") from error


def abandon(stream: TextIO) -> None:
    """Point the descriptor elsewhere, or Python complains again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def tell(text: str) -> None:
    """Text to stderr; where there is none, nobody hears."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except UnicodeEncodeError:
        sys.stderr.write(text.encode("ascii", "replace").decode())
    except OSError:
        abandon(sys.stderr)


def error(message: str, fix: str, id: str) -> None:
    """What happened on one line, what to do on the next."""
    red, cyan, off = ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") if has_colour(sys.stderr) else ("", "", "")
    tell(f"{red}error{off} {id}: {clean(message, 4000)}\n")
    if fix:
        tell(f"  {cyan}→ {clean(fix, 2000)}{off}\n")


def is_terminal(stream: TextIO | None) -> bool:
    """Judged for each stream alone."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def has_colour(stream: TextIO | None) -> bool:
    """A terminal that can, and a user who does not mind: NO_COLOR, TERM=dumb."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown", "")


def confirmed(question: str) -> bool:
    """Ask on stderr, read one line; anything but yes is no."""
    tell(f"{question} [y/N] ")
    answer = sys.stdin.readline() if sys.stdin is not None else ""
    return answer.strip().lower() in ("y", "yes")


def require_writable(target: Path) -> None:
    """Before any work: the folder is there and takes a file. Raises UsageError, ResourceError."""
    shown = clean(str(target), 200)
    if target.is_dir():
        raise UsageError(f"{shown} is a folder", fix="name a file")
    if is_special(target):
        return
    folder = target.resolve().parent
    if not folder.is_dir():
        raise ResourceError(f"{shown} cannot be written: its folder does not exist", fix=f"mkdir -p {clean(str(folder), 200)}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if target.exists():
            os.close(os.open(target, os.O_WRONLY))
    except OSError as error:
        raise ResourceError(f"{shown} cannot be written: {error.strerror or error}", fix="a file somewhere else") from error


def write_whole(target: Path, text: str) -> None:
    """Old content or all of the new, never half. A device or pipe is written to directly. Raises ResourceError."""
    try:
        if is_special(target):
            with target.open("w", encoding="utf-8") as file:
                file.write(text)
            return
        real = target.resolve()  # through a link, not in place of it
        mode = stat.S_IMODE(real.stat().st_mode) if real.exists() else 0o666 & ~_umask()
        descriptor, name = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name[:40]}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, real)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except BrokenPipeError:
        return
    except OSError as error:
        raise ResourceError(
            f"{clean(str(target), 200)} cannot be written: {error.strerror or error}", fix="free some space, or name another file"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_special(target: Path) -> bool:
    """A device, a pipe, a terminal: nothing to replace."""
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
