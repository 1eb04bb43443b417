"""gpuopt: profile, convert, compile and bench models against the roofline, with proof.

The verbs of the command line are functions here: `gpuopt.profile(model, inputs)`, `gpuopt.bench(model, inputs)`,
`gpuopt.convert(model, ...)`, `gpuopt.compile(model, inputs, ...)`, `gpuopt.load("bundle/")`, `gpuopt.optimize(model, inputs)`, `gpuopt.stream(model, budget="8GiB")`.
`with gpuopt.record() as seen:` observes a program; `for batch in gpuopt.feed(loader):` copies the next batch to the GPU while one is computed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuopt._version import __version__

if TYPE_CHECKING:
    from gpuopt.api import bench, compile, convert, load, optimize, profile, stream
    from gpuopt.programs.feeding import feed
    from gpuopt.script.recorder import record

__all__ = ["__version__", "bench", "compile", "convert", "feed", "load", "optimize", "profile", "record", "stream"]


def __getattr__(name: str) -> Any:
    """Import the verbs on first use: `import gpuopt` must not import torch."""
    if name == "record":
        from gpuopt.script import recorder

        return recorder.record
    if name == "feed":
        from gpuopt.programs import feeding

        return feeding.feed
    if name in __all__:
        from gpuopt import api

        return getattr(api, name)
    raise AttributeError(f"module 'gpuopt' has no attribute {name!r}")
