"""A node as ONNX Runtime ran it -> the FLOPs of its products, from the shapes it was given."""

from __future__ import annotations

import math

from gpuopt.backends.ort.profile import NodeRun

PRODUCTS = frozenset(
    "MatMul Gemm FusedMatMul FusedGemm TransposeMatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QLinearMatMul QGemm GemmFloat8 MatMulNBits "
    "GemmFastGelu FusedMatMulActivation".split()
)
CONVOLUTIONS = frozenset("Conv FusedConv NhwcFusedConv ConvInteger QLinearConv NhwcConv".split())
KINDS = {
    **dict.fromkeys((*CONVOLUTIONS, "ConvTranspose", "FusedConvTranspose", "DeformConv"), "convolution"),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention"), "attention"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent"),
}
"""Operator -> kind of work, as in core/tally.py; a product where absent."""

UNCOUNTED = frozenset(
    "ConvTranspose Einsum LSTM GRU RNN Attention MultiHeadAttention PackedAttention PackedMultiHeadAttention GroupQueryAttention "
    "DecoderMaskedMultiHeadAttention QAttention LongformerAttention FusedConvTranspose DeformConv".split()
)
"""These compute, and their FLOPs are not in their own shapes alone: taken from `layer_flops` where the name survived."""


def node_flops(node: NodeRun) -> float | None:
    """FLOPs of a run node, 2 a multiply-add; 0 for what is no product of matrices, None where its shapes do not say."""
    if node.op in PRODUCTS:
        return _product_flops(node)
    if node.op in CONVOLUTIONS:
        return _convolution_flops(node)
    if node.op == "ConvTranspose" and len(node.inputs) > 1:
        (_, data), (_, weight) = node.inputs[:2]
        return 2.0 * math.prod(data) * math.prod(weight[1:])
    if node.op == "Attention" and len(node.inputs) >= 3 and len(node.inputs[1][1]) == 2:  # com.microsoft: the projections are inside
        (_, x), (_, weight) = node.inputs[:2]
        if len(x) == 3:
            return 2.0 * math.prod(x) * weight[1] + 4.0 * x[0] * x[1] ** 2 * (weight[1] // 3)
    if node.op == "Attention" and len(node.inputs) >= 3 and all(len(shape) == 4 for _, shape in node.inputs[:3]):
        (_, q), (_, k), (_, v) = node.inputs[:3]
        return 2.0 * math.prod(q[:3]) * k[2] * (q[3] + v[3])
    if node.op == "MultiHeadAttention" and len(node.inputs) >= 3 and all(len(shape) == 3 for _, shape in node.inputs[:3]):
        (_, q), (_, k), (_, v) = node.inputs[:3]
        return 2.0 * q[0] * q[1] * k[1] * (q[2] + v[2])
    return None if node.op in UNCOUNTED else 0.0


def _product_flops(node: NodeRun) -> float | None:
    """A weight may be packed away and absent from the profile, so the inner size comes from the first operand and the output alone."""
    if not node.inputs or not node.outputs:
        return None
    a, out = node.inputs[0][1], node.outputs[0][1]
    rows = out[-2] if len(out) > 1 else 1
    if not a or not math.prod(out):
        return None
    if len(a) == 1 or node.op not in ("Gemm", "FusedMatMul", "TransposeMatMul", "FusedGemm", "GemmFloat8"):
        return 2.0 * math.prod(out) * a[-1]
    # These may transpose A: of its last two sizes, one is the rows of the output, the other the inner size.
    return 2.0 * math.prod(out) * (a[-1] * a[-2] / rows)


def _convolution_flops(node: NodeRun) -> float | None:
    """Weights are [out channels, in channels / groups, *kernel]; in any layout their size over the out channels is the multiply-adds an output element."""
    spatial = len(node.outputs[0][1]) if node.outputs else 0
    weights = [shape for _, shape in node.inputs[1:] if len(shape) == spatial]
    if not weights or spatial < 3:
        return None
    out = node.outputs[0][1]
    channels = weights[0][0]
    return 2.0 * math.prod(out) * math.prod(weights[0]) / channels if channels in out else None
