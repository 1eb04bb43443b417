"""A name of RIVALS -> the context in which a module runs that library's way, with as many bytes of weights on the device, and is its own again afterwards."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.registry import resolve
from gpuopt.core.streamed import RIVALS
from gpuopt.core.streaming import Anatomy

_CONTEXTS = {
    "accelerate": "gpuopt.pipeline.streamed.rivals.dispatched:shipped",
    "accelerate-pinned": "gpuopt.pipeline.streamed.rivals.dispatched:pinned",
    "diffusers": "gpuopt.pipeline.streamed.rivals.groups:grouped",
    "mmgp": "gpuopt.pipeline.streamed.rivals.shuttle:shuttled",
}


def require(name: str) -> None:
    """Raises UsageError for a name there is none of, Unavailable where a package of it is missing."""
    require_known((name,))
    rival = RIVALS[name]
    missing = [pip for package, pip in rival.packages.items() if not _is_there(package)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise Unavailable(f"{' and '.join(missing)} {verb} not installed", fix=f"pip install {' '.join(missing)}")


def require_known(names: tuple[str, ...]) -> None:
    """Raises UsageError for a name there is none of."""
    for name in names:
        if name not in RIVALS:
            raise UsageError(f"there is no rival {name[:40]!r}", fix="one of: " + ", ".join(RIVALS))


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


@contextmanager
def running(name: str, module: Any, device: str, weight_bytes: int, anatomy: Anatomy) -> Iterator[str]:
    """Enters as a sentence that says how it was set up. Raises what `require` raises, and Unsupported where the library cannot run this module.

    weight_bytes: that may be on the device at once, always resident ones and whatever is being used among them.
    """
    require(name)
    context = resolve(_CONTEXTS, name, kind="rival")
    try:
        with context(module, device, weight_bytes, anatomy) as setting:
            yield setting
    finally:
        importlib.import_module("gpuopt.pipeline.streamed.rivals.putback").let_go(device)
