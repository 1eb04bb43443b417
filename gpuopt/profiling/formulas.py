"""One ATen call -> its FLOPs, or 0 because nothing multiplies in it, or None because nobody knows.

The convention, as everywhere in the field: 2 FLOPs a multiply-add (8 where the numbers are complex), "model FLOPs".
Products are counted: matrix products, convolutions, attention, recurrent cells, FFTs. Element-wise ops, normalisations, softmax, reductions, pooling, gathers
and copies count **0 and are known**: their cost is bytes. Attention is counted full, causal or not, and padding is counted like data, because
that is what every published figure does; the notes of a `Count` say so.

What is in neither table (a custom op, a matrix inverse) is None. A new product without a row here is therefore reported as unknown, never as a silent zero.
User formulas registered by `torch.utils.flop_counter.register_flop_formula` are honoured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from gpuopt.profiling.zeros import KNOWN_ZERO, NOT_ZERO, ZERO_ELSEWHERE, ZERO_NAMESPACES

Args = Mapping[str, Any]
"""Arguments by their schema names; tensors need only `.shape` (and `.dtype` where it matters)."""
Formula = Callable[[Args, Any], "float | None"]


def _numel(shape: Any) -> int:
    return math.prod(int(n) for n in shape)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor.shape)


def _pick(args: Args, *names: str) -> Any:
    for name in names:
        if args.get(name) is not None:
            return args[name]
    raise KeyError(names[0])


def _matmul(left: str, right: str) -> Formula:
    """(…, m, k) @ (…, k, n), batched or not; two-to-an-element storage (fp4) holds twice the k it shows."""

    def flops(args: Args, out: Any) -> float:
        a, b = args[left], args[right]
        *batch, m, k = _shape(a)
        packed = 2 if str(getattr(a, "dtype", "")).endswith("_x2") else 1
        return 2.0 * math.prod(batch) * m * k * packed * _shape(b)[-1]

    return flops


def _mv(matrix: str) -> Formula:
    return lambda args, out: 2.0 * _numel(args[matrix].shape)


def _rows(matrices: str) -> Formula:
    """One row times each of them."""
    return lambda args, out: sum(2.0 * _numel(matrix.shape) for matrix in args[matrices])


def _vector(left: str) -> Formula:
    return lambda args, out: 2.0 * _numel(args[left].shape)


def _addr(args: Args, out: Any) -> float:
    return 2.0 * _numel(args["vec1"].shape) * _numel(args["vec2"].shape)


def _linear_like(args: Args, out: Any) -> float:
    """Anything that maps the last dimension k of its input to its output, however its weight is packed: 2·k an output element."""
    x = _pick(args, "self", "input", "inp", "X", "qx", "x")
    return 2.0 * _numel(_first(out).shape) * _shape(x)[-1]


def _grouped(args: Args, out: Any) -> float:
    """`offs` cuts one of M, N, K into groups, so the pieces add up to one product; 3-D by 3-D is a batch of products."""
    a, b = args["self"], args["mat2"]
    m, k = _shape(a)[-2:]
    n = _shape(b)[-1]
    groups = _shape(a)[0] if len(a.shape) == 3 and len(b.shape) == 3 else 1
    packed = 2 if str(getattr(a, "dtype", "")).endswith("_x2") else 1
    return 2.0 * groups * m * k * packed * n


def _conv(args: Args, out: Any) -> float:
    """Weight [Cout, Cin/groups, *kernel]: each output element takes one multiply-add a weight of its filter.

    Transposed, weight [Cin, Cout/groups, *kernel]: each input element gives one a weight. Taps that fall on padding are counted, as everywhere.
    """
    x, weight = _pick(args, "input", "self", "X", "qx"), _pick(args, "weight", "W", "qw")
    taps = _numel(weight.shape) // max(1, _shape(weight)[0])
    base = x if args.get("transposed") else _first(out)
    return 2.0 * _numel(base.shape) * taps


def _conv_transpose(args: Args, out: Any) -> float:
    return _conv({**args, "transposed": True}, out)


def _conv_tbc(args: Args, out: Any) -> float:
    return 2.0 * _numel(_first(out).shape) * _numel(_shape(args["weight"])[:2])


def _quantized_conv(args: Args, out: Any) -> float | None:
    packed = _pick(args, "packed_weight", "weight")
    if not hasattr(packed, "unpack"):
        return None
    return _conv({"input": args["qx"], "weight": packed.unpack()[0]}, out)


def sdpa_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> float:
    """q [B, H, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv] -> 2·B·H·Tq·Tk·(D + Dv); fewer key heads than query heads are shared, not saved."""
    *batch, length, width = query
    return 2.0 * math.prod(batch) * length * key[-2] * (width + value[-1])


def _sdpa(args: Args, out: Any) -> float:
    return sdpa_flops(_shape(_pick(args, "query", "q")), _shape(_pick(args, "key", "k")), _shape(_pick(args, "value", "v")))


class NeedsValuesError(Exception):
    """FLOPs that depend on what a tensor holds, which a fake one does not: the caller runs the model once instead."""


def _lengths(starts: Any) -> list[int] | None:
    """Lengths from cumulative ones [B + 1]; None where nobody knows them (no memory behind the tensor)."""
    if starts.is_meta:
        return None
    if isinstance(starts, FakeTensor):
        raise NeedsValuesError("the sequences' lengths are data")
    return [int(n) for n in starts.diff().tolist()]


def _packed_attention(args: Args, out: Any) -> float | None:
    """Sequences one after the other: q [T, H, D] (or [1, T, H, D]), cut by cumulative lengths; without those a plain batch [B, T, H, D]. Each attends to its own, in full."""
    query, key, value = (_shape(_pick(args, name, name[0])) for name in ("query", "key", "value"))
    starts_q = next((args[n] for n in ("cum_seq_q", "cu_seqlens_q", "cu_seq_q") if args.get(n) is not None), None)
    starts_k = next((args[n] for n in ("cum_seq_k", "cu_seqlens_k", "cu_seq_k") if args.get(n) is not None), None)
    heads, each = query[-2], query[-1] + value[-1]
    if starts_q is None:
        return 2.0 * heads * each * query[0] * query[-3] * key[-3]
    if args.get("block_table") is not None:
        return None  # keys live in pages, and how many of them count is data of another kind
    lengths_q = _lengths(starts_q)
    lengths_k = _lengths(starts_k) if starts_k is not None else lengths_q
    used = args.get("seqused_k")
    if used is not None and not used.is_meta:
        lengths_k = _lengths(torch.nn.functional.pad(used.cumsum(0), (1, 0)))
    if lengths_q is None or lengths_k is None:
        return None
    return 2.0 * heads * each * sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))


def _attention_block(args: Args) -> float:
    """Projections and scores of multi-head attention over [B, T, E] inputs."""
    query = args["query"]
    if query.is_nested:
        raise ValueError("lengths of a nested tensor are data")
    batch, length, width = _shape(query)
    length_k, length_v = _shape(args["key"])[1], _shape(args["value"])[1]
    projections = 2.0 * batch * width * width * (length + length_k + length_v + length)
    return projections + 4.0 * batch * length * length_k * width


def _native_mha(args: Args, out: Any) -> float | None:
    return None if args["query"].is_nested else _attention_block(args)


def _encoder_layer(args: Args, out: Any) -> float | None:
    src = args["src"]
    if src.is_nested:
        return None
    tokens = _numel(_shape(src)[:2])
    feed_forward = 2.0 * tokens * (_numel(args["ffn_weight_1"].shape) + _numel(args["ffn_weight_2"].shape))
    return _attention_block({"query": src, "key": src, "value": src}) + feed_forward


def _rnn_steps(args: Args) -> int:
    """Time steps summed over the batch; a packed sequence is [steps, features]."""
    x = _pick(args, "input", "data")
    return _numel(_shape(x)[:-1])


def _rnn(args: Args, out: Any) -> float:
    """LSTM, GRU and plain cells, any depth and direction: each step multiplies by every 2-D weight once (biases are vectors)."""
    weights = args.get("weight", args.get("params"))
    return 2.0 * _rnn_steps(args) * sum(_numel(w.shape) for w in weights or () if len(w.shape) == 2)


def _mkldnn_rnn_layer(args: Args, out: Any) -> float:
    # weight0 and weight1 are input and hidden weights, weight2 and weight3 their biases. A reordered weight may show an opaque shape, so the gates are counted
    # from the sizes: 4 for LSTM (mode 2), 3 for GRU (mode 3), 1 otherwise.
    hidden = int(args["hidden_size"])
    gates = {2: 4, 3: 3}.get(int(args["mode"]), 1)
    return 2.0 * _rnn_steps(args) * gates * hidden * (_shape(args["input"])[-1] + hidden)


def _fft(real_side: str) -> Formula:
    """5·n·log2(n) a complex transform of n points (Cooley-Tukey, FFTW's convention), half of it where one side is real."""

    def flops(args: Args, out: Any) -> float:
        full = {"none": args["self"], "in": args["self"], "out": _first(out)}[real_side]
        points = _numel(_shape(full)[d] for d in args["dim"])
        share = 1.0 if real_side == "none" else 0.5
        return share * 5.0 * _numel(full.shape) * math.log2(points) if points > 1 else 0.0

    return flops


def _cdist(args: Args, out: Any) -> float:
    """One multiply-add a coordinate of each pair, as in its own product form |a|²+|b|²-2ab."""
    return 2.0 * _numel(_first(out).shape) * _shape(args["x1"])[-1]


def _trilinear(args: Args, out: Any) -> float:
    """`bilinear`: y[b,o] = Σij x1[b,i] W[o,i,j] x2[b,j], contracted over i, then over j. Other uses: a product of three an element of the whole domain."""
    first, weight, last = _shape(args["i1"]), _shape(args["i2"]), _shape(args["i3"])
    if len(first) == 2 and len(weight) == 3 and len(last) == 2 and list(args["sumdim"]) == [2, 3]:
        outputs, width, other = weight
        return 2.0 * first[0] * outputs * other * (width + 1)
    domain: list[int] = []
    rank = len(first) + len(args["expand1"])
    for shape, expand in ((first, args["expand1"]), (weight, args["expand2"]), (last, args["expand3"])):
        sizes = iter(shape)
        full = [1 if d in list(expand) else next(sizes) for d in range(rank)]
        domain = [max(a, b) for a, b in zip(domain, full, strict=True)] if domain else full
    return 3.0 * _numel(domain)


def _deform_conv(args: Args, out: Any) -> float:
    return 2.0 * _numel(_first(out).shape) * (_numel(args["weight"].shape) // _shape(args["weight"])[0])


_CONVOLUTIONS = (
    "aten::convolution aten::_convolution aten::convolution_overrideable aten::cudnn_convolution aten::cudnn_convolution_relu aten::cudnn_convolution_add_relu "
    "aten::miopen_convolution aten::miopen_convolution_relu aten::miopen_convolution_add_relu aten::miopen_depthwise_convolution aten::mkldnn_convolution "
    "aten::_conv_depthwise2d aten::conv_depthwise3d aten::_slow_conv2d_forward aten::slow_conv_dilated2d aten::slow_conv_dilated3d aten::slow_conv3d_forward "
    "aten::_nnpack_spatial_convolution aten::_mps_convolution mkldnn::_convolution_pointwise mkldnn::_convolution_pointwise_ "
    "onednn::qconv1d_pointwise onednn::qconv2d_pointwise onednn::qconv3d_pointwise onednn::qconv_pointwise gpuopt::conv_relu"
).split()
_TRANSPOSED = (
    "aten::cudnn_convolution_transpose aten::miopen_convolution_transpose aten::_mps_convolution_transpose aten::slow_conv_transpose2d aten::slow_conv_transpose3d "
    "mkldnn::_convolution_transpose_pointwise"
).split()
_ATTENTIONS = (
    "aten::scaled_dot_product_attention aten::_scaled_dot_product_flash_attention aten::_scaled_dot_product_flash_attention_for_cpu "
    "aten::_scaled_dot_product_efficient_attention aten::_scaled_dot_product_cudnn_attention aten::_scaled_dot_product_fused_attention_overrideable "
    "aten::_scaled_dot_product_attention_math aten::_scaled_dot_product_attention_math_for_mps aten::_cudnn_attention_forward aten::_triton_scaled_dot_attention "
    "gpuopt::attend_one"
).split()
_PACKED_ATTENTIONS = (
    "aten::_flash_attention_forward aten::_efficient_attention_forward torch_attn::_varlen_attn torch_attn::_varlen_attn_out "
    "flash_attn::_flash_attn_forward flash_attn::_flash_attn_varlen_forward"
).split()
_LINEARS = (
    "aten::linear aten::mkldnn_linear aten::_weight_int4pack_mm aten::_weight_int4pack_mm_for_cpu aten::_weight_int4pack_mm_with_scales_and_zeros aten::_weight_int8pack_mm "
    "aten::_mixed_dtypes_linear aten::_dyn_quant_matmul_4bit mkldnn::_linear_pointwise mkl::_mkl_linear onednn::qlinear_pointwise "
    "quantized::linear quantized::linear_relu quantized::linear_dynamic quantized::linear_relu_dynamic quantized::linear_dynamic_fp16 gpuopt::linear_gelu"
).split()
_RNNS = (
    "aten::_cudnn_rnn aten::miopen_rnn aten::_lstm_mps aten::lstm aten::gru aten::rnn_tanh aten::rnn_relu quantized::lstm quantized::gru"
).split()

PRODUCTS: dict[str, Formula] = {
    "aten::mm": _matmul("self", "mat2"),
    "aten::addmm": _matmul("mat1", "mat2"),
    "aten::_addmm_activation": _matmul("mat1", "mat2"),
    "aten::bmm": _matmul("self", "mat2"),
    "aten::baddbmm": _matmul("batch1", "batch2"),
    "aten::addbmm": _matmul("batch1", "batch2"),
    "aten::_int_mm": _matmul("self", "mat2"),
    "aten::_scaled_mm": _matmul("self", "mat2"),
    "aten::_scaled_mm_v2": _matmul("self", "mat2"),
    "aten::mv": _mv("self"),
    "gpuopt::matvecs": _rows("weights"),
    "gpuopt::gated_matvec": lambda args, out: 2.0 * (_numel(args["gate"].shape) + _numel(args["up"].shape)),
    "aten::addmv": _mv("mat"),
    "aten::dot": _vector("self"),
    "aten::vdot": _vector("self"),
    "aten::addr": _addr,
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm_v2": _grouped,
    "aten::conv_tbc": _conv_tbc,
    "aten::_native_multi_head_attention": _native_mha,
    "aten::_triton_multi_head_attention": _native_mha,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::mkldnn_rnn_layer": _mkldnn_rnn_layer,
    "aten::_fft_c2c": _fft("none"),
    "aten::_fft_r2c": _fft("in"),
    "aten::_fft_c2r": _fft("out"),
    "aten::_cdist_forward": _cdist,
    "aten::_euclidean_dist": _cdist,
    "aten::_trilinear": _trilinear,
    "torchvision::deform_conv2d": _deform_conv,
    "quantized::conv1d": _quantized_conv,
    "quantized::conv2d": _quantized_conv,
    "quantized::conv3d": _quantized_conv,
    "quantized::conv2d_relu": _quantized_conv,
    **dict.fromkeys(_CONVOLUTIONS, _conv),
    **dict.fromkeys(_TRANSPOSED, _conv_transpose),
    **dict.fromkeys(_ATTENTIONS, _sdpa),
    **dict.fromkeys(_PACKED_ATTENTIONS, _packed_attention),
    **dict.fromkeys(_LINEARS, _linear_like),
    "transformers::grouped_mm_fallback": lambda args, out: _grouped({"self": args["input"], "mat2": args["weight"]}, out),
    **dict.fromkeys(_RNNS, _rnn),
}
"""Ops that multiply, by schema name without overload. In-place variants (`addmm_`) share the row of the plain name."""

NOT_TENSOR_CORES = frozenset(
    {"aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r", "aten::_cdist_forward", "aten::_euclidean_dist", "aten::_trilinear"}
)
"""Products that never run in TF32: no matrix unit takes them as they stand."""

for _name in ("fft_c2c", "fft_r2c", "fft_c2r"):
    PRODUCTS[f"prims::{_name}"] = PRODUCTS[f"aten::_{_name}"]


def family(name: str) -> str:
    """`aten::addmm_` -> `aten::addmm`: the name a table knows, without the in-place underscore."""
    if name in PRODUCTS or name in ZERO_ELSEWHERE or name.removeprefix("aten::") in KNOWN_ZERO:
        return name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_product(name: str) -> bool:
    """Whether a schema name (`aten::mm`) has a formula in our own table."""
    return family(name) in PRODUCTS


_ZERO_TAGS = {getattr(torch.Tag, n) for n in ("pointwise", "reduction", "view_copy") if hasattr(torch.Tag, n)}


def is_known_zero(name: str) -> bool:
    """Whether a traced op (`aten::add`, no overload) is known to hold no products of its own: by table, namespace, PyTorch's tags, by being a view or a composite.

    A composite op only calls others, which a trace shows below it.
    """
    return is_zero_when_dispatched(name) or any(_is_composite(o) for o in _overloads(name) if family(name) not in PRODUCTS)


@cache
def is_zero_when_dispatched(name: str) -> bool:
    """The same for an op that reached the dispatcher, where composites have been taken apart: one that has not must be in a table."""
    plain = family(name)
    if plain in PRODUCTS:
        return False
    if plain in NOT_ZERO:
        return False
    namespace, _, op = plain.partition("::")
    if plain in ZERO_ELSEWHERE or namespace in ZERO_NAMESPACES or (namespace == "aten" and op in KNOWN_ZERO):
        return True
    return any(_ZERO_TAGS & set(o.tags) or o.is_view for o in _overloads(name))


@cache
def _overloads(name: str) -> tuple[Any, ...]:
    namespace, _, op = name.partition("::")
    packet = getattr(torch.ops.aten, op, None) if namespace == "aten" else None
    return tuple(getattr(packet, o) for o in packet.overloads()) if packet is not None else ()


def _is_composite(overload: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd"))


def flops_of(func: Any, bound: Args, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float | None:
    """FLOPs of one dispatched call; 0.0 where known to hold no products, None where unknown.

    Parameters
    ----------
    func: the OpOverload. bound: its arguments by schema name, for our formulas. args, kwargs: as dispatched, for PyTorch's.
    out: what it returned (shapes are enough: fake tensors will do).
    """
    name = func._schema.name
    formula = PRODUCTS.get(family(name))
    if formula is not None:
        tensors = [t for t in bound.values() if isinstance(t, torch.Tensor)]
        if any(str(t.layout) not in ("torch.strided", "torch._mkldnn") for t in tensors):
            return None  # products of sparse tensors depend on data
        flops = formula(bound, out)
        is_complex = flops is not None and len(tensors) > 1 and all(t.is_complex() for t in tensors)
        return flops * 4 if flops is not None and is_complex else flops
    registered = flop_registry.get(func._overloadpacket)
    if registered is not None:
        return float(registered(*args, **kwargs, out_val=out))
    return 0.0 if is_zero_when_dispatched(name) else None


def flops_from_shapes(name: str, shapes: tuple[tuple[int, ...], ...]) -> float | None:
    """FLOPs of an op known only by its name and the shapes of its tensor inputs, as a trace gives them; None where those do not settle it.

    Enough for matrix products and attention. A convolution needs its output's shape, so it is joined from a `Count` instead.
    """
    plain = family(name)
    match plain:
        case "aten::mm" | "aten::bmm" | "aten::_int_mm" | "aten::_scaled_mm":
            left, right = 0, 1
        case "aten::addmm" | "aten::baddbmm" | "aten::_addmm_activation" | "aten::addbmm":
            left, right = 1, 2
        case "aten::mv":
            return 2.0 * math.prod(shapes[0]) if shapes and len(shapes[0]) == 2 else None
        case _:
            if plain in _ATTENTIONS and len(shapes) >= 3 and all(len(s) == 4 for s in shapes[:3]):
                return sdpa_flops(*shapes[:3])
            return 0.0 if is_known_zero(name) else None
    if len(shapes) <= right or len(shapes[left]) < 2 or len(shapes[right]) < 2:
        return None
    *batch, m, k = shapes[left]
    return 2.0 * math.prod(batch) * m * k * shapes[right][-1]


_CANONICAL = {
    **dict.fromkeys(_CONVOLUTIONS + _TRANSPOSED + ["aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::thnn_conv2d"], "convolution"),
    **dict.fromkeys([*_ATTENTIONS, *_PACKED_ATTENTIONS], "attention"),
    **dict.fromkeys([*_RNNS, "aten::mkldnn_rnn_layer"], "rnn"),
    "aten::cudnn_batch_norm": "batch_norm",
    "aten::native_batch_norm": "batch_norm",
    "aten::_native_batch_norm_legit_no_training": "batch_norm",
    "aten::batch_norm": "batch_norm",
    "aten::_batch_norm_impl_index": "batch_norm",
}


def canonical(name: str) -> str:
    """One name for all kernels of one product: a count made on a CPU (`mkldnn_convolution`) still joins a trace of a GPU (`cudnn_convolution`)."""
    plain = family(name)
    return _CANONICAL.get(plain, plain.replace("::", "."))
