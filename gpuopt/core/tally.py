"""Ops with their tensors -> FLOPs by the dtype they compute in -> PrecisionAudit.

Only work that runs on matrix units is weighed (products, convolutions, attention, recurrent layers): it is what a precision is asked for.
Ops arrive by name and tensors by their `shape` and `dtype`, so the same rules read a live dispatch, a compiler's FX graph and an exported one, and need no torch.
Formulas count 2 a multiply-add; attention is counted whole, causal or not.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gpuopt.core.result import PrecisionAudit

HONOURED_SHARE = 0.99
"""A request is honoured when at least this share of the FLOPs it applies to runs in it: small heads and positional products may stay wider."""
QUANTISED_SHARE = 0.5
"""The same for fp8, int8, w8 and w4, which leave layers out by design (a head tied to its embedding, sizes no kernel takes) and say which: with less than half the name would be
wrong. The share itself is always told."""

_DTYPES: dict[str, tuple[str, ...]] = {
    "fp64": ("float64",),
    "fp32": ("float32",),
    "tf32": ("tf32",),
    "bf16": ("bfloat16",),
    "fp16": ("float16",),
    "fp8": ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "int8": ("int8", "uint8"),
}
_APPLIES_TO: dict[str, tuple[frozenset[str], str]] = {
    "tf32": (frozenset({"product", "convolution", "recurrent"}), "product and convolution FLOPs"),
    **dict.fromkeys(("fp8", "int8"), (frozenset({"product", "recurrent"}), "product FLOPs")),
}
"""What a request is about, where not about all: torch's attention kernels have none of these modes, its convolutions none of eight bits; both keep the activations' dtype."""
_STORED = {"w8": ("int8",), "w4": ("int4",)}
"""Requests about how weights are stored: their products run in the activations' dtype, so what counts is not FLOPs but elements of the weights that products read."""
_UNPACKS = 15
"""`& 15` of a word leaves one value of four bits: that is how packed weights are read, where no kernel takes them as they are."""
_PACKED = {"_weight_int4pack_mm": 8}
"""Products that take four-bit weights packed -> weights an element of their second operand."""
_SCALES = frozenset({"sub", "mul", "add"})
"""Ops by which four-bit values become weights. Eight bits are scaled after the product."""
_KEEPS_VALUES = frozenset(
    "_to_copy to convert_element_type t permute transpose view _unsafe_view reshape clone expand detach alias slice squeeze unsqueeze".split()
)
"""Ops after which a tensor still is the weight it was: in another dtype or layout."""


class Tally:
    """FLOPs of matrix work, filled op by op. `tf32_*`: fp32 products and convolutions go through TF32 tensor cores."""

    def __init__(self, *, tf32_matmul: bool = False, tf32_conv: bool = False) -> None:
        self._tf32 = {"product": tf32_matmul, "convolution": tf32_conv, "recurrent": tf32_conv}
        self._flops: dict[tuple[str, str, str], float] = defaultdict(float)
        """(kind, dtype, where) -> FLOPs"""
        self._opaque: set[str] = set()
        self._seen: set[int] = set()
        self._weights: dict[tuple[str, str], float] = defaultdict(float)
        """(dtype a product's second operand is stored in, where) -> elements; 2-D operands alone, since attention's have a batch"""
        self._stems_from: dict[int, tuple[weakref.ref[Any], str]] = {}
        """id of a widened tensor -> (itself, the narrow dtype it was made from)"""
        self._num_widened = 0

    def add(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, where: str = "") -> None:
        """One op: its full name (`aten.addmm.default`), the tensors it was given and what it returned."""
        namespace, _, rest = op.partition(".")
        name = rest.partition(".")[0]
        if name in _KEEPS_VALUES:
            self._follow(_at(args, 0), out)
        elif name in _SCALES and (first := _at(args, 0)) is not None and self._origin(first) == "int4":
            self._follow(first, out)
        elif name == "bitwise_and" and len(args) > 1 and _is_mask(args[1]) and hasattr(out, "dtype"):
            self._num_widened += 1
            self._stems_from[id(out)] = (weakref.ref(out), "int4")
        formula = _FORMULAS.get(name or namespace)
        if formula is None:
            if namespace not in _PLAIN_NAMESPACES and rest:
                self._opaque.add(f"{namespace}.{name}")
            return
        kind, count = formula
        found = count(args, kwargs, out)
        if found is None:
            self._opaque.add(f"{namespace}.{name}")
            return
        flops, dtype = found
        if dtype == "float32" and self._tf32.get(kind):
            dtype = "tf32"
        where = where or f"{name} {'x'.join(_short(args))}"
        self._flops[kind, dtype, where] += flops
        weight = _at(args, 2 if name in _WEIGHT_THIRD else 1) if kind == "product" else None
        if weight is not None and name in _PACKED:
            self._weights["int4", where] += _PACKED[name] * _size(weight.shape)
        elif weight is not None and len(weight.shape) == 2:
            self._weights[self._origin(weight), where] += _size(weight.shape)

    def _origin(self, tensor: Any) -> str:
        """The dtype its values are stored in: its own, or the narrow one it was widened from."""
        known = self._stems_from.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else _dtype(tensor)

    def _follow(self, before: Any, after: Any) -> None:
        if before is None or not hasattr(after, "dtype") or (origin := self._origin(before)) not in _NARROW:
            return
        self._num_widened += _dtype(before) in _NARROW and _dtype(after) not in _NARROW
        if _dtype(after) != origin:
            self._stems_from[id(after)] = (weakref.ref(after), origin)

    def add_graph(self, graph: Any) -> None:
        """Every call of a torch.fx graph whose nodes carry fake tensors in `meta["val"]`, inner graphs of control flow once each."""
        if id(graph) in self._seen:
            return
        self._seen.add(id(graph))
        for node in graph.nodes:
            if node.op == "get_attr":
                inner = getattr(getattr(graph, "owning_module", None), str(node.target), None)
                if inner is not None and hasattr(inner, "graph"):
                    self.add_graph(inner.graph)
            if node.op != "call_function":
                continue
            args = [_value(a) for a in node.args]
            kwargs = {k: _value(v) for k, v in node.kwargs.items()}
            self.add(_op_name(node.target), args, kwargs, node.meta.get("val"), _module_of(node))

    def add_counted(self, kind: str, dtype: str, flops: float | None, where: str) -> None:
        """Work somebody else counted (layers of an engine, nodes a runtime ran): `kind` is `product`, `convolution`, `attention` or `recurrent`; None is "no formula"."""
        if flops is None:
            self._opaque.add(where)
        elif flops:
            self._flops[kind, dtype, where] += flops

    @property
    def flops(self) -> dict[str, float]:
        """dtype -> FLOPs, largest first."""
        found: dict[str, float] = defaultdict(float)
        for (_, dtype, _), flops in self._flops.items():
            found[dtype] += flops
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def audit(self, requested: str | None, method: str, *, extra: str = "") -> PrecisionAudit:
        """Shares by dtype, and whether `requested` (a Precision) carries them. Nothing requested is honoured by anything."""
        total = sum(self._flops.values())
        reasons = [extra] if extra else []
        if self._opaque:
            reasons.append("not counted, no formula: " + ", ".join(sorted(self._opaque)[:5]))
        if not total:
            reasons.insert(0, "no matrix product, convolution or attention was found: there is nothing a precision applies to")
            return PrecisionAudit(shares={}, method=method, honoured=True, requested=requested, reason="; ".join(reasons))
        shares = {dtype: flops / total for dtype, flops in self.flops.items()}
        honoured = True
        outside: tuple[str, ...] = ()
        if requested is not None:
            if requested in _STORED:
                honoured, reason, outside = self._stored_as(_STORED[requested])
            else:
                honoured, reason, outside = self._run_in(requested, total)
            reasons.insert(0, reason)
        return PrecisionAudit(
            shares=shares, method=method, honoured=honoured, requested=requested, exceptions=outside, reason="; ".join(reasons)
        )

    def _run_in(self, requested: str, total: float) -> tuple[bool, str, tuple[str, ...]]:
        """Honoured or not, the share of FLOPs that says so, and what runs in something else."""
        wanted = _DTYPES[requested]
        kinds, scope = _APPLIES_TO.get(requested, (None, "FLOPs"))
        applies = {key: f for key, f in self._flops.items() if kinds is None or key[0] in kinds}
        base = sum(applies.values())
        share = sum(f for (_, dtype, _), f in applies.items() if dtype in wanted) / base if base else 1.0
        least = QUANTISED_SHARE if requested in ("fp8", "int8") else HONOURED_SHARE
        verdict = "" if share >= least else f", under the {least:.0%} that counts as honoured"
        others = sorted(((f, key) for key, f in applies.items() if key[1] not in wanted), key=lambda item: (-item[0], item[1]))
        outside = tuple(f"{where}: {dtype}, {f / total:.1%}" for f, (_, dtype, where) in others[:5])
        return share >= least, f"{share:.2%} of {scope} run in {'/'.join(wanted[:2])}{verdict}", outside

    def _stored_as(self, wanted: tuple[str, ...]) -> tuple[bool, str, tuple[str, ...]]:
        """The same by the elements of the products' weights. Products that a compiler took apart show no weights: what it widens is all there is to tell then."""
        base = sum(self._weights.values())
        if not base:
            said = f"{self._num_widened} weights of {wanted[0]} are widened" if self._num_widened else "no weight is widened"
            return True, f"no product shows its weights; {said} in the code they became", ()
        share = sum(n for (dtype, _), n in self._weights.items() if dtype in wanted) / base
        verdict = "" if share >= QUANTISED_SHARE else f", under the {QUANTISED_SHARE:.0%} that counts as honoured"
        others = sorted(((n, key) for key, n in self._weights.items() if key[0] not in wanted), key=lambda item: (-item[0], item[1]))
        outside = tuple(f"{where}: stored as {dtype}, {n / base:.1%}" for n, (dtype, where) in others[:5])
        return share >= QUANTISED_SHARE, f"{share:.2%} of the weights that products read are stored in {wanted[0]}{verdict}", outside


def tf32_flags(backends: Any, capability: tuple[int, int] | None) -> dict[str, bool]:
    """`torch.backends` and the GPU's compute capability (None: no GPU) -> Tally's arguments, as the switches stand now."""
    if capability is None or capability < (8, 0):
        return {"tf32_matmul": False, "tf32_conv": False}
    try:
        return {"tf32_matmul": bool(backends.cuda.matmul.allow_tf32), "tf32_conv": bool(backends.cudnn.allow_tf32)}
    except RuntimeError:  # switches set through the newer interface cannot be read through the older one
        matmul, conv = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        return {"tf32_matmul": matmul == "tf32", "tf32_conv": conv == "tf32"}


_NARROW = frozenset({"int8", "int4"})
_WEIGHT_THIRD = frozenset({"addmm", "_addmm_activation", "_sparse_semi_structured_addmm"})
"""Products that are given what they add first."""

_PLAIN_NAMESPACES = frozenset(
    {"aten", "prims", "prim", "inductor", "_operator", "operator", "math", "builtins", "rngprims", "_c10d_functional"}
)
"""Ops without a formula here only move or map elements; any other namespace may hide a product."""

_CONTROL_FLOW = frozenset({"cond", "while_loop", "scan", "map_impl", "invoke_subgraph", "wrap_with_set_grad_enabled"})
"""Higher-order ops whose inner graphs are walked; any other one may hide a product."""

_Found = tuple[float, str] | None


def _contraction(left: int) -> Callable[[Sequence[Any], Mapping[str, Any], Any], _Found]:
    """Any product whose last dimension of argument `left` is summed over: 2 x outputs x K."""

    def count(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
        a = _at(args, left)
        return None if a is None or not hasattr(out, "shape") else (2.0 * _size(out.shape) * _int(a.shape[-1]), _dtype(a))

    return count


def _matvecs(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    """One row times each matrix of a list."""
    row, weights = _at(args, 0), args[1] if len(args) > 1 else ()
    return None if row is None or not isinstance(weights, (list, tuple)) else (2.0 * sum(_size(w.shape) for w in weights), _dtype(row))


def _addbmm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    a, b = _at(args, 1), _at(args, 2)
    return None if a is None or b is None else (2.0 * _size(a.shape) * _int(b.shape[-1]), _dtype(a))


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    """2 x outputs x (in channels a group x kernel); transposed: 2 x inputs x (out channels a group x kernel)."""
    x, w = _at(args, 0), _at(args, 1)
    if x is None or w is None:
        return None
    transposed = kwargs.get("transposed", args[6] if len(args) > 6 else False) is True
    over = x if transposed else out
    if isinstance(over, (list, tuple)):
        over = over[0]
    return 2.0 * _size(over.shape) * _size(w.shape[1:]), _dtype(x)


def _convolution_packed(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    """oneDNN's fused convolution: same shapes, but argument 6 is something else."""
    return _convolution(args[:3], {}, out)


def _convolution_transposed(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    return _convolution(args[:3], {"transposed": True}, out)


def _attention(heads_first: bool) -> Callable[[Sequence[Any], Mapping[str, Any], Any], _Found]:
    """2 x queries x keys x (head size of k + head size of v), a head: [B,H,S,E], or [B,S,H,E] in the kernels' own layout."""

    def count(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
        q, k, v = (_at(args, i) if len(args) > i else kwargs.get(n) for i, n in enumerate(("query", "key", "value")))
        if q is None or k is None or v is None or len(q.shape) != 4:
            return None
        seq = 2 if heads_first else 1
        rows = _size(q.shape[:-1])
        return 2.0 * rows * _int(k.shape[seq]) * (_int(q.shape[-1]) + _int(v.shape[-1])), _dtype(q)

    return count


def _encoder_layer(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    """The fused nn.TransformerEncoderLayer: four linear layers and one self-attention, [B,S,D]."""
    return _fused_block(args, args[0], (3, 5, 14, 16))


def _multi_head(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    """The fused nn.MultiheadAttention: projections in and out and one attention, [B,S,D]."""
    return _fused_block(args, args[0], (5, 7))


def _fused_block(args: Sequence[Any], src: Any, weights: Sequence[int]) -> _Found:
    matrices = [_at(args, i) for i in weights]
    if len(src.shape) != 3 or any(w is None for w in matrices):
        return None
    batch, seq, width = (_int(d) for d in src.shape)
    linear = sum(_size(w.shape) for w in matrices)
    return 2.0 * batch * seq * linear + 4.0 * batch * seq * seq * width, _dtype(src)


def _recurrent_layer(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    x, w_in, w_hidden = (_at(args, i) for i in range(3))
    if x is None or w_in is None or w_hidden is None:
        return None
    return 2.0 * _size(x.shape[:-1]) * (_size(w_in.shape) + _size(w_hidden.shape)), _dtype(x)


def _recurrent_stack(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> _Found:
    """cuDNN: argument 1 is the list of weights and biases of all layers."""
    x, weights = _at(args, 0), args[1] if len(args) > 1 else None
    if x is None or not isinstance(weights, (list, tuple)):
        return None
    return 2.0 * _size(x.shape[:-1]) * sum(_size(w.shape) for w in weights if len(w.shape) == 2), _dtype(x)


_FORMULAS: dict[str, tuple[str, Callable[[Sequence[Any], Mapping[str, Any], Any], _Found]]] = {
    **dict.fromkeys(
        ("mm", "bmm", "mv", "dot", "vdot", "inner", "linear", "matmul", "_int_mm", "_scaled_mm", "_scaled_mm_v2", "_linear_pointwise")
        + ("_mkl_linear", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm", "_dyn_quant_matmul_4bit")
        + ("mkldnn_linear", "_sparse_semi_structured_mm", "_sparse_semi_structured_linear", "linear_gelu"),
        ("product", _contraction(0)),
    ),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "_addmm_activation", "_sparse_semi_structured_addmm"), ("product", _contraction(1))),
    "addbmm": ("product", _addbmm),
    "matvecs": ("product", _matvecs),
    "gated_matvec": ("product", lambda args, kwargs, out: _matvecs([args[0], list(args[1:3])], kwargs, out)),
    **dict.fromkeys(
        ("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "cudnn_convolution_relu")
        + ("cudnn_convolution_add_relu", "mkldnn_convolution", "conv1d", "conv2d", "conv3d", "_conv_depthwise2d", "conv_depthwise3d")
        + ("slow_conv2d_forward", "_slow_conv2d_forward", "slow_conv3d", "thnn_conv2d", "miopen_convolution", "conv_relu"),
        ("convolution", _convolution_packed),
    ),
    "convolution": ("convolution", _convolution),
    "_convolution": ("convolution", _convolution),
    "convolution_overrideable": ("convolution", _convolution),
    "_convolution_pointwise": ("convolution", _convolution_packed),
    **dict.fromkeys(
        ("cudnn_convolution_transpose", "_convolution_transpose_pointwise", "slow_conv_transpose2d", "slow_conv_transpose3d")
        + ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ("convolution", _convolution_transposed),
    ),
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
        + ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")
        + ("_scaled_dot_product_fused_attention_overrideable", "flex_attention", "attend_one"),
        ("attention", _attention(True)),
    ),
    **dict.fromkeys(("_flash_attention_forward", "_efficient_attention_forward"), ("attention", _attention(False))),
    "_transformer_encoder_layer_fwd": ("product", _encoder_layer),
    "_native_multi_head_attention": ("product", _multi_head),
    "mkldnn_rnn_layer": ("recurrent", _recurrent_layer),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), ("recurrent", _recurrent_stack)),
}


def _value(argument: Any) -> Any:
    """An FX argument with its nodes replaced by the fake tensors they stand for."""
    if isinstance(argument, (list, tuple)):
        return [_value(a) for a in argument]
    meta = getattr(argument, "meta", None)
    return meta.get("val") if isinstance(meta, dict) and hasattr(argument, "target") else argument


def _op_name(target: Any) -> str:
    """`aten.addmm.default` for an ATen overload, `builtins.getitem` for Python's own functions, `flex_attention` for higher-order ops."""
    if hasattr(target, "_schema") or not hasattr(target, "__module__"):
        return str(target)
    name = str(getattr(target, "_name", None) or getattr(target, "__name__", target))
    if any(cls.__name__ == "HigherOrderOperator" for cls in type(target).__mro__):
        if name in _FORMULAS:
            return name
        return f"prim.{name}" if name in _CONTROL_FLOW else f"higher_order.{name}"
    return f"builtins.{name}"


def _module_of(node: Any) -> str:
    """Qualified name of the innermost module an FX node came from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return str(path).replace("L['self'].", "").removeprefix("L['self']").replace("_modules['", "").replace("']", "")


def _at(args: Sequence[Any], index: int) -> Any:
    """The tensor at `index`, or None."""
    found = args[index] if index < len(args) else None
    return found if hasattr(found, "shape") and hasattr(found, "dtype") else None


def _is_mask(argument: Any) -> bool:
    return isinstance(argument, int) and argument == _UNPACKS


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(shape: Sequence[Any]) -> int:
    return math.prod(_int(d) for d in shape)


def _int(dim: Any) -> int:
    """A size; for a symbolic one its hint, because int() would fix it in the graph being compiled. Unknown sizes count as 1."""
    if isinstance(dim, int):
        return dim
    hint = getattr(getattr(dim, "node", None), "hint", None)
    return hint if isinstance(hint, int) else 1


def _short(args: Sequence[Any]) -> Iterator[str]:
    for tensor in (_at(args, i) for i in range(min(len(args), 3))):
        if tensor is not None:
            yield "[" + ",".join(str(_int(d)) for d in tensor.shape) + "]"
