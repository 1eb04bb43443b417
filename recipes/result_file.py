"""What the recipes that measure many cases do with their result: a file written anew after each case, and the command that made it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.errors import BadInput


def write(found: object, output: Path) -> None:
    """By one rename: a run that is killed leaves the rows so far. Raises BadInput where the file cannot be kept."""
    temporary = output.with_name(f".{output.name}.part")
    try:
        temporary.write_text(codec.to_json(found, indent=1), encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        raise BadInput(f"{output.name} cannot be written: {error.strerror}", fix="--output FILE.json in a folder of yours") from error


def command(module: str, typed: Sequence[str]) -> str:
    """As typed, but for where the file went."""
    words = [w.rpartition("/")[2] if i and typed[i - 1] == "--output" else w for i, w in enumerate(typed)]
    return " ".join([f"python -m {module}", *words])
