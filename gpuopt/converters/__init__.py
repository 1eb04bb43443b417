"""Model -> Model in another precision or layout, or a file of another form. Nothing here imports torch until it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuopt.core.live import Inputs, Model
    from gpuopt.core.spec import Precision, Transforms


def apply(model: Model, precision: Precision | None, transforms: Transforms, inputs: Inputs | None = None, *, device: str = "cpu") -> Model:
    """A changed copy of `model`: eval mode, then batch norms folded, then rewrites in the order given, then the cast, then the memory layout. The given model is left alone; see `change.apply`."""
    from gpuopt.converters import change

    return change.apply(model, precision, transforms, inputs, device=device)
