"""A bundle folder -> Model that names it; the session opens it by its manifest."""

from __future__ import annotations

from pathlib import Path

from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef
from gpuopt.loaders import describe
from gpuopt.trust import consent


def load(ref: ModelRef, path: Path) -> Model:
    """Nothing is read but the manifest's hash: what the bundle holds and whether it may run is decided where its artifact is loaded."""
    notes = [f"--arch {ref.arch} is not used: a bundle holds its model"] if ref.arch else []
    return Model(
        form="bundle", name=describe.printable_name(describe.name_of(path)), path=path, sha256=consent.sha256_of(path), notes=notes
    )
