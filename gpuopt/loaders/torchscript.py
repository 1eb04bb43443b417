"""A TorchScript archive -> Model, with consent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef, TensorSpec
from gpuopt.loaders import describe
from gpuopt.trust import consent, gate

_SCALARS = {
    "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Long": "int64", "Int": "int32", "Short": "int16",
    "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip


def load(ref: ModelRef, path: Path) -> Model:
    """Raises Untrusted without consent, BadInput when it is damaged."""
    module = gate.load_torchscript(path, ref.trust)
    notes = [f"--arch {ref.arch} is not used: the file holds a whole program"] if ref.arch else []
    if getattr(module, "training", False):
        module.eval()
        notes.append("the model was in training mode: switched to eval")
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(module.named_parameters(), path.name)
    return describe.of_module(
        module,
        name=describe.name_of(path),
        form="torchscript",
        signature=_signature(module),
        sha256=consent.sha256_of(path),
        notes=notes,
    )


def _signature(module: Any) -> tuple[TensorSpec, ...]:
    """From the types a trace recorded; torch usually drops the sizes when it saves, and then there is none. The first dimension is the batch."""
    specs = []
    for value in list(module.graph.inputs())[1:]:
        kind = value.type()
        sizes = kind.sizes() if kind.kind() == "TensorType" else None
        dtype = _SCALARS.get(kind.scalarType() or "") if sizes is not None else None
        if dtype is None:
            return ()
        specs.append(TensorSpec(name=value.debugName().partition(".")[0], dtype=dtype, shape=("N", *sizes[1:]) if sizes else ()))
    return tuple(specs)
