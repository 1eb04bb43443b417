"""TensorRT layers -> which dtype the FLOPs run in: of the network that was parsed, and of the engine that was built from it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
    "FP4": "float4_e2m1",
    "E8M0": "e8m0",
}
"""TensorRT's DataType -> torch's name."""

_SAID = (
    (r"bf16|bfloat16", "bfloat16"),
    (r"fp16|half", "float16"),
    (r"fp8|float8|e4m3", "float8_e4m3fn"),
    (r"fp4|e2m1", "float4_e2m1"),
    (r"int8", "int8"),
    (r"int4", "int4"),
    (r"fp32|float", "float32"),
)
"""Words of engine descriptions -> torch's name, longest first: `Half`, `Row major linear FP16 format (kLINEAR)`."""

KINDS = {"CONVOLUTION": "convolution", "DECONVOLUTION": "convolution", "ATTENTION_INPUT": "attention", "RECURRENCE": "recurrent"}

WIDTH = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "float4_e2m1": 0, "int4": 0}

_SOURCE = re.compile(r"\[ONNX Layer: (.*?)\]")

JOIN_SHARE = 0.99
"""Of the network's FLOPs that must be found again in the engine's layers before these, and not the network's, are what is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of the parsed network that multiplies matrices."""

    name: str
    """Of the ONNX node it comes from, where it says so."""
    op: str
    kind: str
    """As in core/tally.py: `product`, `convolution`, `attention`, `recurrent`."""
    dtype: str
    """What it computes in; `int8` and `float8_e4m3fn` where its operands were just dequantised."""
    flops: float | None
    """None where a size stays unknown even at fixed input shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of the built engine: usually many network layers fused."""

    name: str
    kind: str
    dtype: str | None
    """Of its operands; None where the text names none."""
    sources: tuple[str, ...]
    """ONNX nodes inside it."""


def audit_network(
    trt: Any,
    network: Any,
    shapes: Mapping[str, tuple[int, ...]],
    requested: Precision | None,
    *,
    layer_flops: Mapping[str, tuple[float | None, str]] | None = None,
) -> PrecisionAudit:
    """A parsed network -> share of FLOPs by dtype. `shapes` fixes the inputs; `layer_flops` (ONNX node -> FLOPs, dtype) fills in layers whose own sizes do not say."""
    is_tf32 = requested is Precision.TF32
    return audit_layers(
        network_layers(trt, network, shapes, is_tf32=is_tf32, layer_flops=layer_flops or {}), (), requested, is_tf32=is_tf32
    )


def network_layers(
    trt: Any, network: Any, shapes: Mapping[str, tuple[int, ...]], *, is_tf32: bool, layer_flops: Mapping[str, tuple[float | None, str]]
) -> tuple[Layer, ...]:
    """Layers that compute, sizes taken at these input shapes. The network's own (free) shapes are put back."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    declared = [tuple(tensor.shape) for tensor in inputs]
    for tensor in inputs:
        tensor.shape = shapes[tensor.name]
    try:
        found = _compute_layers(trt, network)
    finally:
        for tensor, shape in zip(inputs, declared, strict=True):
            tensor.shape = shape
    layers = [layer if layer.flops is not None else replace(layer, flops=layer_flops.get(layer.name, (None, ""))[0]) for layer in found]
    return tuple(replace(layer, dtype="tf32") if is_tf32 and layer.dtype == "float32" else layer for layer in layers)


def _compute_layers(trt: Any, network: Any) -> list[Layer]:
    all_layers = [network.get_layer(i) for i in range(network.num_layers)]
    producers = {layer.get_output(k).name: layer for layer in all_layers for k in range(layer.num_outputs)}
    found = []
    for layer in all_layers:
        flops = _flops(trt, layer)
        if flops != 0.0:
            found.append(
                Layer(
                    name=_source(layer),
                    op=layer.type.name,
                    kind=KINDS.get(layer.type.name, "product"),
                    dtype=_compute_dtype(trt, layer, producers),
                    flops=flops,
                )
            )
    return found


def _source(layer: Any) -> str:
    match = _SOURCE.search(layer.metadata or "")
    return match[1] if match else str(layer.name)


def _compute_dtype(trt: Any, layer: Any, producers: Mapping[str, Any]) -> str:
    """The operands' dtype; where every operand comes straight out of a DequantizeLinear, TensorRT computes in the quantised dtype."""
    operands = [layer.get_input(k) for k in range(layer.num_inputs)]
    operands = [tensor for tensor in operands if tensor is not None][:2]
    sources = [producers[tensor.name] for tensor in operands if tensor.name in producers]
    if sources and len(sources) == len(operands) and all(source.type == trt.LayerType.DEQUANTIZE for source in sources):
        return DTYPES.get(sources[0].get_input(0).dtype.name, "unknown")
    tensor = operands[0] if operands else layer.get_output(0)
    return DTYPES.get(tensor.dtype.name, "unknown")


def _flops(trt: Any, layer: Any) -> float | None:
    """2 a multiply-add; 0 for layers that multiply no matrices, None where a size is unknown."""
    kind = layer.type
    if kind == trt.LayerType.CONVOLUTION:
        layer.__class__ = trt.IConvolutionLayer  # get_layer hands out the common base; the fields are on the class behind it
        inside = _size(layer.get_input(0), axis=1)
        return _product(2.0, _volume(layer.get_output(0)), inside, math.prod(layer.kernel_size_nd), 1 / layer.num_groups)
    if kind == trt.LayerType.DECONVOLUTION:
        layer.__class__ = trt.IDeconvolutionLayer
        return _product(2.0, _volume(layer.get_input(0)), layer.num_output_maps, math.prod(layer.kernel_size_nd), 1 / layer.num_groups)
    if kind == trt.LayerType.MATRIX_MULTIPLY:
        layer.__class__ = trt.IMatrixMultiplyLayer
        a = tuple(layer.get_input(0).shape)
        inner = a[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else a[-1]
        return _product(2.0, _volume(layer.get_output(0)), None if inner < 0 else inner)
    if kind == trt.LayerType.EINSUM:
        layer.__class__ = trt.IEinsumLayer
        return _einsum_flops(layer)
    if kind in _attention_kinds(trt):
        q, k, v = (tuple(layer.get_input(i).shape) for i in range(3))
        return _product(2.0, math.prod(q[:-1]), k[-2], q[-1] + v[-1]) if min(*q, *k, *v) >= 0 else None
    if kind in (trt.LayerType.RECURRENCE, trt.LayerType.PLUGIN_V2, trt.LayerType.PLUGIN_V3):
        return None
    return 0.0


def _attention_kinds(trt: Any) -> tuple[Any, ...]:
    """The boundary layer in front of a fused attention has q, k and v as inputs; older versions have no such layer."""
    members = trt.LayerType.__members__
    return tuple(members[name] for name in ("ATTENTION_INPUT",) if name in members)


def _einsum_flops(layer: Any) -> float | None:
    """The product of all index sizes, twice, for two operands."""
    equation = str(layer.equation).replace(" ", "")
    sizes: dict[str, int] = {}
    for term, index in zip(equation.split("->")[0].split(","), range(layer.num_inputs), strict=False):
        for letter, size in zip(term, tuple(layer.get_input(index).shape), strict=False):
            sizes[letter] = max(size, sizes.get(letter, size))
    return (
        None
        if not sizes or "..." in equation or min(sizes.values()) < 0
        else 2.0 * math.prod(sizes.values())
        if layer.num_inputs > 1
        else 0.0
    )


def _volume(tensor: Any) -> int | None:
    shape = tuple(tensor.shape)
    return math.prod(shape) if all(size >= 0 for size in shape) else None


def _size(tensor: Any, axis: int) -> int | None:
    size = int(tuple(tensor.shape)[axis])
    return size if size >= 0 else None


def _product(*factors: float | None) -> float | None:
    return None if any(factor is None for factor in factors) else float(math.prod(f for f in factors if f is not None))


# -- the engine -----------------------------------------------------------------------------------------------------------------------

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: (?P<inputs>.*?), (?:Constants: (?P<constants>.*?), )?Outputs: .*?(?:Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[(?P<dims>[-\d,]*)\].*?(?:Datatype: (?P<dtype>\w+)|Format/Datatype: (?P<format>[^}]*))")


def engine_layers(text: str) -> tuple[EngineLayer, ...]:
    """What the builder's log, or the engine inspector's JSON, says of the engine -> its layers. Empty where the text is neither."""
    stripped = text.strip()
    if stripped.startswith("{"):
        return tuple(_from_json(entry) for entry in json.loads(stripped).get("Layers", []) if isinstance(entry, dict))
    layers = []
    for line in stripped.removeprefix("Layers:").lstrip("\n").split("\n\nI/O Tensors:")[0].split("\n"):
        match = _LINE.match(line)
        if match is None:
            continue
        tensors = [_tensor(m) for m in _TENSOR.finditer(match["inputs"])]
        constants = [_tensor(m) for m in _TENSOR.finditer(match["constants"] or "")]
        layers.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                dtype=_operand_dtype(tensors, constants),
                sources=tuple(_SOURCE.findall(match["metadata"] or "")),
            )
        )
    return tuple(layers)


def _from_json(entry: Mapping[str, Any]) -> EngineLayer:
    def tensors(key: str) -> list[tuple[tuple[int, ...], str | None]]:
        return [
            (tuple(t.get("Dimensions", ())), _said(str(t.get("Datatype") or t.get("Format/Datatype", ""))))
            for t in entry.get(key, ())
            if isinstance(t, dict)
        ]

    return EngineLayer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        dtype=_operand_dtype(tensors("Inputs"), tensors("Constants")),
        sources=tuple(_SOURCE.findall(str(entry.get("Metadata", "")))),
    )


def _tensor(match: re.Match[str]) -> tuple[tuple[int, ...], str | None]:
    return tuple(int(size) for size in match["dims"].split(",") if size), _said(match["dtype"] or match["format"] or "")


def _said(text: str) -> str | None:
    return next((dtype for pattern, dtype in _SAID if re.search(pattern, text, re.IGNORECASE)), None)


def _operand_dtype(inputs: list[tuple[tuple[int, ...], str | None]], constants: list[tuple[tuple[int, ...], str | None]]) -> str | None:
    """The largest constant of two or more dimensions is the weight, and both operands of a product have its dtype; without one, the widest input."""
    weights = [(math.prod(shape), dtype) for shape, dtype in constants if len(shape) > 1 and dtype and sum(size > 1 for size in shape) > 1]
    if weights:
        return max(weights)[1]
    named = [dtype for _, dtype in inputs if dtype]
    return max(named, key=lambda dtype: WIDTH.get(dtype, 0)) if named else None


COPYING = frozenset({"kgen", "reformat", "noop", "shape_call", "constant", "memcpy"})
"""Kinds of engine layer that move or scale elements: they may carry a node's name when the product itself is in another layer."""


def audit_layers(
    network: tuple[Layer, ...], engine: Iterable[EngineLayer], requested: Precision | None, *, is_tf32: bool
) -> PrecisionAudit:
    """FLOPs of the network's layers, in the dtypes of the engine layers they ended up in; in the network's own dtypes where the engine cannot be joined."""
    by_source: dict[str, list[EngineLayer]] = {}
    for built in engine:
        for source in built.sources:
            by_source.setdefault(source, []).append(built)
    total = sum(layer.flops or 0.0 for layer in network)
    joined = [(layer, _engine_dtype(layer, by_source.get(layer.name, ()), is_tf32)) for layer in network]
    found = sum(layer.flops or 0.0 for layer, dtype in joined if dtype)
    if total and found / total >= JOIN_SHARE:
        method = f"engine layers, {found / total:.1%} of the FLOPs joined by ONNX node"
        layers = [replace(layer, dtype=dtype or layer.dtype) for layer, dtype in joined]
    else:
        method = "network layers"
        layers = list(network)
    tally = Tally()
    for layer in layers:
        tally.add_counted(layer.kind, layer.dtype, layer.flops, f"{layer.name} ({layer.op.lower()})")
    audit = tally.audit(requested.value if requested else None, method)
    if requested is None:
        return audit
    # A layer that cannot be weighed still says what it computes in: one in another dtype may be most of the work.
    wanted = "tf32" if requested is Precision.TF32 else requested.dtype
    return replace(audit, honoured=audit.honoured and all(layer.dtype == wanted for layer in layers if layer.flops is None))


def _engine_dtype(layer: Layer, candidates: Iterable[EngineLayer], is_tf32: bool) -> str | None:
    known = [built for built in candidates if built.dtype]
    computing = [built for built in known if built.kind.lower() not in COPYING] or known
    if not computing:
        return None
    dtype = max((built.dtype or "" for built in computing), key=lambda name: WIDTH.get(name, 0))
    return "tf32" if is_tf32 and dtype == "float32" else dtype
