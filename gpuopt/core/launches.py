"""What a compiled artifact launches in one call, in order, each tied to the source modules and lines it stems from. Made by backends, aligned with a trace by profiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LaunchKind = Literal["triton", "extern", "node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One thing the artifact launches; what is not known of it stays empty."""

    name: str
    """The generated kernel's name (triton), the op called (extern: `aten.addmm`, `extern_kernels.convolution`) or a node's name (node)."""
    kind: LaunchKind
    """`triton`: one kernel of exactly this name. `extern`: a library's op, which may run several kernels of names of its own. `node`: one node of another runtime's graph."""
    modules: tuple[str, ...] = ()
    """Qualified names of the modules it stems from, in order of execution; "" is the root. Several where ops were fused."""
    lines: tuple[str, ...] = ()
    """`modeling_bert.py:123` of the model's own code, in order of execution, those of other modules than its home first: the last is where its output is made."""
    ops: tuple[str, ...] = ()
    """The ops fused in it: `aten.addmm`, `LayerNormalization`."""
    kernels: tuple[str, ...] = ()
    """Exact names of the device's kernels it runs, where they are known."""
    home: str | None = None
    """The one module its time goes to, where its maker knows better than `module_of`."""
    flops: float | None = None
    """Of its products in one run, where its maker knows them from what it ran on; 0 is known, None: ask the count."""
    bytes: float | None = None
    """Compulsory traffic of one run, known with `flops`."""
    dtype: str | None = None
    """It computes in, torch's name; known with `flops`."""


def module_of(launch: Launch) -> str | None:
    """The one module a launch's time goes to: its home, else the lowest module that holds all it stems from. None where nothing is known of it."""
    if launch.home is not None:
        return launch.home
    return common(launch.modules) if launch.modules else None


def common(modules: tuple[str, ...]) -> str:
    """The lowest module around all of these: `a.b`, `a.c.d` -> `a`."""
    paths = [m.split(".") if m else [] for m in modules]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
