"""An ONNX file -> Model that names it, with the signature of its graph."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from gpuopt.core.errors import BadInput
from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef, TensorSpec
from gpuopt.trust import consent, gate, packages
from gpuopt.trust.policy import printable

onnx = packages.load("onnx")

_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 14: "complex64",
    15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn", 19: "float8_e5m2",
}  # fmt: skip
"""onnx.TensorProto.DataType -> torch's name."""
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"})
_LETTERS = ("S", "T", "L", "H", "W", "D", "K", "M", "P", "Q", "R", "U", "V", "X", "Y", "Z")


def load(ref: ModelRef, path: Path) -> Model:
    """Raises what gate.check_onnx raises."""
    model = of_file(path, path.absolute().stem, trust=ref.trust)
    if ref.arch:
        model.notes.append(f"--arch {ref.arch} is not used: an ONNX file holds a whole graph")
    return model


def of_file(path: Path, name: str, *, trust: tuple[str, ...] = ()) -> Model:
    """The Model of an ONNX file; the weights stay in it."""
    from gpuopt.loaders.describe import printable_name

    graph = gate.check_onnx(path, trust).graph
    counts: Counter[str] = Counter()
    total = 0
    for tensor in graph.initializer:
        size = math.prod(tensor.dims)
        dtype = _DTYPES.get(tensor.data_type)
        if dtype in _FLOATS:  # integers of an ONNX graph are shapes and axes, not parameters
            total += size
            counts[str(dtype)] += size
    return Model(
        form="onnx",
        name=printable_name(name),
        path=path,
        signature=signature(path.name, graph),
        sha256=consent.sha256_of(path),
        dtype=counts.most_common(1)[0][0] if counts else None,
        num_parameters=total,
    )


def signature(name: str, graph: Any) -> tuple[TensorSpec, ...]:
    """One spec an input that is no initializer. A free dimension keeps the file's name where that can be typed; the batch is N.

    Raises BadInput for an input that is no tensor of known rank.
    """
    stored = {tensor.name for tensor in graph.initializer}
    names: dict[str, str] = {}
    specs = []
    for value in graph.input:
        if value.name in stored:
            continue
        if value.type.WhichOneof("value") != "tensor_type" or not value.type.tensor_type.HasField("shape"):
            raise BadInput(f"{name}: input {printable(value.name)!r} is no tensor of known rank", fix="export it again with shapes")
        kind = value.type.tensor_type
        dtype = _DTYPES.get(kind.elem_type)
        if dtype is None:
            label = (
                onnx.TensorProto.DataType.Name(kind.elem_type) if kind.elem_type in onnx.TensorProto.DataType.values() else kind.elem_type
            )
            raise BadInput(
                f"{name}: input {printable(value.name)!r} has the element type {label}, which torch has not",
                fix="export it with tensor inputs",
            )
        shape = tuple(_dimension(d, i, value.name, names) for i, d in enumerate(kind.shape.dim))
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)


def _dimension(dim: Any, index: int, owner: str, names: dict[str, str]) -> int | str:
    if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0:
        return int(dim.dim_value)
    if not dim.dim_param and index == 0:
        return "N"  # without a name a dimension is free on its own, but for the first, which is the batch of them all
    param = dim.dim_param or f"{owner}.{index}"
    if param not in names:
        if index == 0 and "N" not in names.values():
            names[param] = "N"
        elif param.isidentifier() and param.isascii() and param not in names.values():
            names[param] = param
        else:
            unused = [letter for letter in _LETTERS if letter not in names.values()]
            names[param] = unused[0] if unused else f"D{len(names)}"
    return names[param]


__all__ = ["load", "of_file", "signature"]
