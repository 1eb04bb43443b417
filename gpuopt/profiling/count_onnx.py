"""An ONNX file + shapes -> Count, from its graph: shapes inferred with the free dimensions bound, FLOPs by node, nothing run.

Same convention as `count`: 2 a multiply-add, products alone, everything else known to be 0. A node between DequantizeLinear and QuantizeLinear computes in the integers it
dequantises: that is what engines fuse it into, and what the precision audits ask. A loop's trip count is data, so its body is unknown; of a branch the dearer side counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, shape_inference

from gpuopt.core.errors import BadInput
from gpuopt.core.result import Count, OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.profiling.count import CONVENTION, summarize
from gpuopt.programs import node_source

Shape = tuple[int, ...]
Shapes = Mapping[str, "int | Sequence[int]"]
"""Free dimension -> size (`{"N": 8}`), or input -> whole shape (`{"x": (8, 3, 224, 224)}`), mixed as you like."""

_DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.FLOAT8E5M2: "float8_e5m2",
}


def from_onnx(path: Path, shapes: Shapes, *, tf32: bool = False) -> Count:
    """Count one run of the model in `path`.

    `shapes` binds the free dimensions; one left unbound makes the nodes that depend on it unknown, never wrong. `tf32`: float32 products run through tensor cores.
    Rows carry the module of the source model as `module` where the exporter wrote modules into the file (what has none belongs to the root), else the node's name. Raises BadInput when the file is no ONNX model or its shapes contradict themselves.
    """
    graph, notes = _read(path, shapes)
    records = []
    rows = _nodes(graph)
    sources = [node_source.of_node(node) for _, node, *_ in rows]
    has_modules = any(source.module for source in sources)
    for (name, node, flops, dtype, moved), source in zip(rows, sources, strict=True):
        if tf32 and dtype == "float32" and flops:
            dtype = "tf32"
        text = ", ".join("x".join(map(str, s)) for i in node.input if (s := graph.shape(i)))
        records.append(
            OpRecord(
                op=_op_name(node),
                module=(source.module or "") if has_modules else name,
                dtype=dtype,
                flops=flops,
                bytes=moved,
                module_class=source.module_class if has_modules else node.op_type,
                shapes=text,
                line=source.line or None,
            )
        )
    return summarize(tuple(records), method="onnx graph", notes=(CONVENTION, *notes), num_parameters=graph.num_parameters)


def layer_flops(path: Path, shapes: Shapes) -> dict[str, tuple[float, str]]:
    """Node name -> (FLOPs, dtype it computes in) of every node with products; for audits that read layers back from an engine by name.

    A node without a name goes by `node_of_<its first output>`, as TensorRT's parser calls it.
    """
    graph, _ = _read(path, shapes)
    return {name: (flops, dtype or "?") for name, _, flops, dtype, _ in _nodes(graph) if flops}


@dataclass(slots=True)
class _Graph:
    """A graph with what is known of its tensors. `outer` is the graph around a subgraph."""

    nodes: Sequence[Any]
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    producers: dict[str, Any] = field(default_factory=dict)
    outer: _Graph | None = None
    num_parameters: int = 0

    def shape(self, name: str) -> Shape | None:
        if name in self.shapes:
            return self.shapes[name]
        return self.outer.shape(name) if self.outer is not None else None

    def dtype(self, name: str) -> str | None:
        if name in self.dtypes:
            return self.dtypes[name]
        return self.outer.dtype(name) if self.outer is not None else None

    def producer(self, name: str) -> Any:
        if name in self.producers:
            return self.producers[name]
        return self.outer.producer(name) if self.outer is not None else None


def _read(path: Path, shapes: Shapes) -> tuple[_Graph, list[str]]:
    try:
        model = onnx.load(str(path), load_external_data=False)  # weights are not needed, their shapes are in the graph
        _load_small_externals(model, path.parent)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf, the OS and onnx share no base class
        raise BadInput(
            f"{path.name}: not a readable ONNX model: {_first_line(error)}", fix="export the model again, or check the file"
        ) from error
    _drop_weights(model)
    notes = _bind(model.graph, shapes)
    known = _infer(model)
    graph = _Graph(
        nodes=list(known.nodes), shapes=known.shapes, dtypes=known.dtypes, producers=known.producers, num_parameters=known.num_parameters
    )
    return graph, notes


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _load_small_externals(model: Any, folder: Path) -> None:
    """Shape constants (a Reshape's target) may live outside the file too; inference needs their values. Large weights stay where they are."""
    for tensor in model.graph.initializer:
        if (
            tensor.data_location != TensorProto.EXTERNAL
            or tensor.data_type not in (TensorProto.INT64, TensorProto.INT32)
            or math.prod(tensor.dims) > 1024
        ):
            continue
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _drop_weights(model: Any) -> None:
    """Inference copies the model and protobuf stops at 2 GB: of large weights only the shapes stay."""
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > 1024:
            for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(name)


def _bind(graph: Any, shapes: Shapes) -> list[str]:
    """Write sizes into the inputs' free dimensions. An unnamed or unbound first dimension takes `N`, the batch."""
    initializers = {t.name for t in graph.initializer}
    unbound: list[str] = []
    for value in graph.input:
        if value.name in initializers or not value.type.HasField("tensor_type"):
            continue
        whole = shapes.get(value.name)
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if whole is not None and not isinstance(whole, int):
                if axis < len(whole):
                    dim.dim_value = int(whole[axis])
            elif not dim.HasField("dim_value"):
                size = shapes.get(dim.dim_param) if dim.dim_param else None
                if size is None and axis == 0:
                    size = shapes.get("N")
                if isinstance(size, int):
                    dim.dim_value = size
                else:
                    unbound.append(f"{value.name}[{axis}]" + (f" ({dim.dim_param})" if dim.dim_param else ""))
    # What the file says of values in between holds for the symbols, and would now contradict the sizes.
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            for dim in value.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.Clear()
    return [f"free dimensions without a size: {', '.join(unbound)}"] if unbound else []


def _infer(model: Any) -> _Graph:
    """Shape inference to a fixed point: onnx's own for standard ops, a few rules of ours for the fused ones it does not know."""
    known = _facts(model.graph, None)
    for _ in range(1 + sum(n.domain not in ("", "ai.onnx") for n in model.graph.node)):
        try:
            inferred = shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
        except Exception as error:  # onnx raises InferenceError, RuntimeError and ValueError for one and the same thing
            raise BadInput(f"shapes do not fit the ONNX model: {_first_line(error)}", fix="check --dim and --input") from error
        known = _facts(inferred.graph, None)
        added = _fused_shapes(known)
        if not added:
            break
        model.graph.value_info.extend(added)
    return known


def _facts(graph: Any, outer: _Graph | None) -> _Graph:
    known = _Graph(nodes=graph.node, outer=outer)
    for tensor in graph.initializer:
        known.shapes[tensor.name] = tuple(tensor.dims)
        known.dtypes[tensor.name] = _dtype(tensor.data_type)
        if _dtype(tensor.data_type).startswith(("float", "bfloat", "int8", "uint8")):
            known.num_parameters += math.prod(tensor.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            continue
        if kind.elem_type:
            known.dtypes.setdefault(value.name, _dtype(kind.elem_type))
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            known.shapes.setdefault(value.name, tuple(d.dim_value for d in kind.shape.dim))
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    known.shapes[node.output[0]] = tuple(attribute.t.dims)
                    known.dtypes[node.output[0]] = _dtype(attribute.t.data_type)
        for output in node.output:
            known.producers[output] = node
    return known


def _dtype(elem_type: int) -> str:
    return _DTYPES.get(
        elem_type, helper.tensor_dtype_to_np_dtype(elem_type).name if elem_type in TensorProto.DataType.values() and elem_type else "?"
    )


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _matmul_shape(a: Shape, b: Shape) -> Shape:
    """numpy.matmul's rule."""
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    batch = _broadcast(left[:-2], right[:-2])
    return (*batch, *([left[-2]] if len(a) > 1 else []), *([right[-1]] if len(b) > 1 else []))


def _broadcast(a: Shape, b: Shape) -> Shape:
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(max(x, y) if 0 not in (x, y) else 0 for x, y in zip(left, right, strict=True))


def _swap(shape: Shape, condition: Any) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if condition and len(shape) > 1 else shape


def _fused_shapes(known: _Graph) -> list[Any]:
    """Outputs of fused nodes whose inputs are known and whose own shape is not."""
    added = []
    for node in known.nodes:
        if node.domain in ("", "ai.onnx") or not node.output or known.shape(node.output[0]) is not None:
            continue
        rule = _FUSED_RULES.get(node.op_type, _same_as_input)
        try:
            shape = rule(node, [known.shape(i) for i in node.input])
        except (TypeError, IndexError, KeyError):  # an input of unknown shape
            continue
        source = known.dtype(node.input[0]) if node.input else None
        elem = next((e for e, n in _DTYPES.items() if n == source), TensorProto.FLOAT)
        if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention"):
            elem = TensorProto.FLOAT
        if shape is not None:
            added.append(helper.make_tensor_value_info(node.output[0], elem, shape))
            known.shapes[node.output[0]] = shape
    return added


def _same_as_input(node: Any, shapes: list[Any]) -> Shape | None:
    shape: Shape | None = shapes[0]
    return shape


def _fused_conv_shape(node: Any, shapes: list[Any]) -> Shape:
    attributes = _attributes(node)
    x, w = shapes[0], shapes[1]
    rank = len(w) - 2
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    spatial = tuple((x[2 + i] + pads[i] + pads[i + rank] - dilations[i] * (w[2 + i] - 1) - 1) // strides[i] + 1 for i in range(rank))
    return (x[0], w[0], *spatial)


_FUSED_RULES: dict[str, Callable[[Any, list[Any]], Shape | None]] = {
    "FusedMatMul": lambda node, s: _matmul_shape(
        _swap(s[0], _attributes(node).get("transA")), _swap(s[1], _attributes(node).get("transB"))
    ),
    "FusedGemm": lambda node, s: (_swap(s[0], _attributes(node).get("transA"))[0], _swap(s[1], _attributes(node).get("transB"))[1]),
    "GemmFastGelu": lambda node, s: _matmul_shape(s[0], s[1]),
    "MatMulIntegerToFloat": lambda node, s: _matmul_shape(s[0], s[1]),
    "DynamicQuantizeMatMul": lambda node, s: _matmul_shape(s[0], s[1]),
    "TransposeMatMul": lambda node, s: _matmul_shape(
        _swap(s[0], _attributes(node).get("transA")), _swap(s[1], _attributes(node).get("transB"))
    ),
    "MatMulNBits": lambda node, s: (*s[0][:-1], _attributes(node)["N"]),
    "QGemm": lambda node, s: (_swap(s[0], _attributes(node).get("transA"))[0], _swap(s[3], _attributes(node).get("transB"))[1]),
    "FusedConv": _fused_conv_shape,
    "NhwcFusedConv": lambda node, s: None,
    "Attention": lambda node, s: (*s[0][:2], (_attributes(node).get("qkv_hidden_sizes") or [0, 0, s[1][1] // 3])[2]),
    "QAttention": lambda node, s: (*s[0][:2], s[1][1] // 3),
    "MultiHeadAttention": lambda node, s: (*s[0][:2], (s[2] if len(s) > 2 and s[2] else s[0])[-1]) if len(s[0]) == 3 else None,
    "EmbedLayerNormalization": lambda node, s: (*s[0], s[2][-1]),
}


# FLOPs of one node, from (node, graph). None where a shape is missing.
_Flops = Callable[[Any, _Graph], "float | None"]


def _out(node: Any, graph: _Graph) -> Shape:
    shape = graph.shape(node.output[0])
    if shape is None:
        raise _UnknownShapeError
    return shape


def _in(node: Any, graph: _Graph, at: int) -> Shape:
    shape = graph.shape(node.input[at]) if at < len(node.input) and node.input[at] else None
    if shape is None:
        raise _UnknownShapeError
    return shape


class _UnknownShapeError(Exception):
    """A shape inference did not find: the node's FLOPs are None."""


def _matmul(a_at: int, b_at: int) -> _Flops:
    def flops(node: Any, graph: _Graph) -> float:
        attributes = _attributes(node)
        a = _swap(_in(node, graph, a_at), attributes.get("transA"))
        b = _swap(_in(node, graph, b_at), attributes.get("transB"))
        return 2.0 * math.prod(_matmul_shape(a, b)) * a[-1]

    return flops


def _conv(x_at: int, w_at: int) -> _Flops:
    def flops(node: Any, graph: _Graph) -> float:
        w = _in(node, graph, w_at)  # [Cout, Cin/groups, *kernel]
        return 2.0 * math.prod(_out(node, graph)) * math.prod(w[1:])

    return flops


def _conv_transpose(node: Any, graph: _Graph) -> float:
    return 2.0 * math.prod(_in(node, graph, 0)) * math.prod(_in(node, graph, 1)[1:])  # weight [Cin, Cout/groups, *kernel]


def _nbits(node: Any, graph: _Graph) -> float:
    attributes = _attributes(node)
    return 2.0 * math.prod(_in(node, graph, 0)[:-1]) * int(attributes["K"]) * int(attributes["N"])


def _recurrent(gates: int) -> _Flops:
    def flops(node: Any, graph: _Graph) -> float:
        x, w, r = (
            _in(node, graph, 0),
            _in(node, graph, 1),
            _in(node, graph, 2),
        )  # w [directions, gates·hidden, input], r [.., gates·hidden, hidden]
        assert w[1] % gates == 0, f"{node.op_type} weight {w} has no {gates} gates"
        return 2.0 * x[0] * x[1] * (math.prod(w) + math.prod(r))

    return flops


def _einsum(node: Any, graph: _Graph) -> float:
    """A product of n operands over the whole index space, n-1 multiply-adds a point; two operands are exact, more an upper bound."""
    equation = _attributes(node)["equation"].decode().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for at, term in enumerate(terms):
        shape = _in(node, graph, at)
        letters = term.replace("...", "")
        hidden = len(shape) - len(letters)
        head, _, tail = term.partition("...") if "..." in term else (term, "", "")
        names = [*head, *(f"...{hidden - i}" for i in range(hidden)), *tail]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return 2.0 * max(0, len(terms) - 1) * math.prod(sizes.values())


def _attention_standard(node: Any, graph: _Graph) -> float:
    """ai.onnx Attention (opset 23): Q, K, V as [B, H, T, D] or [B, T, H·D], with a past to prepend."""
    q, k, v = (_in(node, graph, i) for i in range(3))
    attributes = _attributes(node)
    past = graph.shape(node.input[4]) if len(node.input) > 4 and node.input[4] else None
    heads = int(attributes.get("q_num_heads", 0))
    if len(q) == 3:
        kv_heads = int(attributes.get("kv_num_heads", heads))
        batch, length, width, width_v = q[0], q[1], q[2] // heads, v[2] // kv_heads
        length_k = k[1]
    else:
        batch, heads, length, width, width_v = q[0], q[1], q[2], q[3], v[3]
        length_k = k[2]
    length_k += past[2] if past else 0
    return 2.0 * batch * heads * length * length_k * (width + width_v)


def _attention_fused(node: Any, graph: _Graph) -> float:
    """com.microsoft Attention: input [B, T, E] times packed weights [E, Eq+Ek+Ev], then the scores."""
    x, w = _in(node, graph, 0), _in(node, graph, 1)
    total = w[1]
    sizes: list[int] = _attributes(node).get("qkv_hidden_sizes") or [total // 3] * 3
    batch, length, width = x
    return 2.0 * batch * length * width * total + 2.0 * batch * length * length * (sizes[0] + sizes[2])


def _mha(node: Any, graph: _Graph) -> float:
    """com.microsoft MultiHeadAttention: projections already done. Query [B, T, E], or packed [B, T, H, 3, D]; key [B, S, E], packed kv [B, S, H, 2, D], or past ready [B, H, S, D]."""
    q = _in(node, graph, 0)
    if len(q) == 5:
        return 4.0 * q[0] * q[1] * q[1] * q[2] * q[4]
    k = _in(node, graph, 1)
    if len(k) == 5:
        return 4.0 * q[0] * q[1] * k[1] * q[2]
    length_k = k[2] if len(k) == 4 else k[1]
    v = graph.shape(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    width_v = v[-1] * (v[1] if len(v) == 4 else 1) if v else q[2]
    past = graph.shape(node.input[6]) if len(node.input) > 6 and node.input[6] else None
    return 2.0 * q[0] * q[1] * (length_k + (past[2] if past else 0)) * (q[2] + width_v)


def _gqa(node: Any, graph: _Graph) -> float:
    """com.microsoft GroupQueryAttention: the cache is counted full, as long as its buffer says."""
    attributes = _attributes(node)
    q = _in(node, graph, 0)
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    has_key = len(node.input) > 1 and bool(node.input[1])
    width = q[2] // heads if has_key else q[2] // (heads + 2 * kv_heads)
    past = graph.shape(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    length = q[1] + (past[2] if past else 0)
    return 4.0 * q[0] * q[1] * length * heads * width


def _deform(node: Any, graph: _Graph) -> float:
    return 2.0 * math.prod(_out(node, graph)) * math.prod(_in(node, graph, 1)[1:])


PRODUCTS: dict[str, tuple[_Flops, tuple[int, ...]]] = {
    "MatMul": (_matmul(0, 1), (0, 1)),
    "Gemm": (_matmul(0, 1), (0, 1)),
    "MatMulInteger": (_matmul(0, 1), (0, 1)),
    "QLinearMatMul": (_matmul(0, 3), (0, 3)),
    "Conv": (_conv(0, 1), (0, 1)),
    "ConvInteger": (_conv(0, 1), (0, 1)),
    "QLinearConv": (_conv(0, 3), (0, 3)),
    "ConvTranspose": (_conv_transpose, (0, 1)),
    "DeformConv": (_deform, (0, 1)),
    "Einsum": (_einsum, (0, 1)),
    "LSTM": (_recurrent(4), (0, 1)),
    "GRU": (_recurrent(3), (0, 1)),
    "RNN": (_recurrent(1), (0, 1)),
    "Attention": (_attention_standard, (0, 1)),
    "com.microsoft.Attention": (_attention_fused, (0, 1)),
    "com.microsoft.QAttention": (_attention_fused, (0, 1)),
    "com.microsoft.MultiHeadAttention": (_mha, (0, 1)),
    "com.microsoft.GroupQueryAttention": (_gqa, (0, 1)),
    "com.microsoft.FusedMatMul": (_matmul(0, 1), (0, 1)),
    "com.microsoft.TransposeMatMul": (_matmul(0, 1), (0, 1)),
    "com.microsoft.FusedGemm": (_matmul(0, 1), (0, 1)),
    "com.microsoft.GemmFastGelu": (_matmul(0, 1), (0, 1)),
    "com.microsoft.MatMulIntegerToFloat": (_matmul(0, 1), (0, 1)),
    "com.microsoft.DynamicQuantizeMatMul": (_matmul(0, 1), (1,)),
    "com.microsoft.QGemm": (_matmul(0, 3), (0, 3)),
    "com.microsoft.FusedConv": (_conv(0, 1), (0, 1)),
    "com.microsoft.QLinearConv": (_conv(0, 3), (0, 3)),
    "com.microsoft.MatMulNBits": (_nbits, (0,)),
}
"""Op -> (its FLOPs, inputs whose dtype it computes in)."""

_ZERO_FUSED = frozenset(
    """
    BiasGelu FastGelu Gelu QuickGelu BiasSplitGelu BiasAdd BiasSoftmax BiasDropout SkipLayerNormalization SkipSimplifiedLayerNormalization EmbedLayerNormalization
    SimplifiedLayerNormalization GroupNorm SkipGroupNorm QuantizeLinear DequantizeLinear QLinearAdd QLinearMul QLinearLeakyRelu QLinearSigmoid QLinearSoftmax QLinearConcat
    QLinearAveragePool QLinearGlobalAveragePool QLinearReduceMean QLinearWhere RotaryEmbedding Rfft Irfft NhwcMaxPool Trilu Inverse MemcpyFromHost MemcpyToHost
    """.split()
) - {"Rfft", "Irfft", "Inverse"}
_UNKNOWN_STANDARD = frozenset(
    {"Det", "DFT", "STFT", "Scan", "Loop", "SequenceMap", "FlexAttention", "LinearAttention", "CausalConvWithState"}
)
"""Standard ops that compute more than element by element and have no formula here."""
_FREE = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant", "Dropout"})
"""Ops that move nothing at inference: views, and facts about shapes."""


def _op_name(node: Any) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _node_name(node: Any) -> str:
    return node.name or (f"node_of_{node.output[0]}" if node.output else node.op_type)


def _nodes(graph: _Graph) -> list[tuple[str, Any, float | None, str | None, float]]:
    """(name, node, FLOPs or None, dtype, bytes) of every node, branches expanded."""
    rows = []
    for node in graph.nodes:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            branches = [_nodes(_facts(a.g, graph)) for a in node.attribute if a.name in ("then_branch", "else_branch")]
            rows.extend(max(branches, key=lambda b: math.fsum(r[2] or 0.0 for r in b), default=[]))
            continue
        rows.append((_node_name(node), node, _node_flops(node, graph), _compute_dtype(node, graph), _traffic(node, graph)))
    return rows


def _node_flops(node: Any, graph: _Graph) -> float | None:
    name = _op_name(node)
    found = PRODUCTS.get(name)
    if found is not None:
        try:
            return found[0](node, graph)
        except _UnknownShapeError:
            return None
    if node.domain in ("", "ai.onnx", "ai.onnx.ml"):
        return None if node.op_type in _UNKNOWN_STANDARD else 0.0
    return 0.0 if node.domain == "com.microsoft" and node.op_type in _ZERO_FUSED else None


_LOW = frozenset({"int8", "uint8", "float8_e4m3fn", "float8_e5m2", "int16"})


def _compute_dtype(node: Any, graph: _Graph) -> str | None:
    found = PRODUCTS.get(_op_name(node))
    if found is None:
        return graph.dtype(node.output[0]) if node.output else None
    operands = [node.input[i] for i in found[1] if i < len(node.input) and node.input[i]]
    quantised = [_dequantised_from(name, graph) for name in operands]
    if len(quantised) > 1 and all(q in _LOW for q in quantised):
        return quantised[0]
    return next((d for name in operands if (d := graph.dtype(name))), None)


def _dequantised_from(name: str, graph: _Graph) -> str | None:
    """The integers (or fp8) behind a tensor, through the layout changes an exporter puts between a DequantizeLinear and its user."""
    for _ in range(8):
        node = graph.producer(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            return graph.dtype(node.input[0])
        if node.op_type not in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Cast"):
            return None
        name = node.input[0]
    return None


def _traffic(node: Any, graph: _Graph) -> float:
    """Each distinct input read once, each output written once; a gather reads what it returns."""
    if node.op_type in _FREE:
        return 0.0

    def size(name: str) -> float:
        shape = graph.shape(name)
        return float(math.prod(shape) * DTYPE_BYTES.get(graph.dtype(name) or "", 4)) if shape is not None else 0.0

    outputs = math.fsum(size(o) for o in node.output if o)
    inputs = list(dict.fromkeys(i for i in node.input if i))
    if node.op_type in ("Gather", "GatherElements", "GatherND", "Slice") and inputs:
        return min(size(inputs[0]), outputs) + outputs + math.fsum(size(i) for i in inputs[1:])
    return outputs + math.fsum(size(i) for i in inputs)
