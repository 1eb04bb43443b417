"""A loaded model -> what a search asks of it before anything is built: which kinds of layers it has, and which rewrites would change something."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpuopt.converters import rewrites
from gpuopt.core.errors import GpuoptError
from gpuopt.core.live import Model

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """After `traits`."""

    has_batch_norm: bool = False
    has_convolutions: bool = False
    """With four-dimensional weights: those that a memory layout concerns."""
    has_products: bool = False
    rewrites: dict[str, str] = field(default_factory=dict)
    """Rewrite, with its setting where it has some -> "" where it would change something, else why not."""


def of(model: Model) -> Traits:
    """A file that is no PyTorch module has none of them: nothing in it can be rewritten."""
    if model.form != "module":
        why = f"a model of form {model.form} stays as it was written"
        return Traits(has_products=True, rewrites=dict.fromkeys(rewrites.REWRITES, why))
    names = [type(part).__name__ for part in model.module.modules()]
    return Traits(
        has_batch_norm=any(name.endswith(_NORMS) for name in names),
        has_convolutions=any(p.dim() == 4 for p in model.module.parameters()) and any(name.endswith(_CONVOLUTIONS) for name in names),
        has_products=any(p.dim() >= 2 for p in model.module.parameters()),
        rewrites=rewrites_of(model.module),
    )


def rewrites_of(module: Any) -> dict[str, str]:
    """Rewrite, with its setting where it has some -> "" where it would change something in this module, else why not. Static."""
    found: dict[str, str] = {}
    for name in rewrites.REWRITES:
        try:
            rewrite = rewrites.loaded(name)
            why = rewrite.applies(module) or ""
        except GpuoptError as error:
            found[name] = error.message
            continue
        settings = rewrite.SETTINGS if getattr(rewrite, "NEEDS_SETTING", False) else ()
        found.update(dict.fromkeys([f"{name}:{setting}" for setting in settings] or [name], why))
    return found
