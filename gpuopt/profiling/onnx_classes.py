"""ONNX operators, ONNX Runtime's own among them -> classes of work of core/kernels.py, for traces whose ops are nodes (`onnx::MatMul`). Data."""

from __future__ import annotations

from gpuopt.core import kernels

_PRODUCT = """
Conv FusedConv NhwcConv NhwcFusedConv ConvInteger QLinearConv ConvTranspose FusedConvTranspose DeformConv MatMul Gemm FusedMatMul FusedGemm TransposeMatMul FusedMatMulActivation
GemmFastGelu GemmFloat8 MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QLinearMatMul QGemm MatMulNBits Einsum LSTM GRU RNN QAttention
"""
_ATTENTION = "Attention MultiHeadAttention GroupQueryAttention PackedAttention PackedMultiHeadAttention DecoderMaskedMultiHeadAttention LongformerAttention"
_LAYOUT = "Transpose ReorderInput ReorderOutput DepthToSpace SpaceToDepth"
_CAST = "Cast CastLike QuantizeLinear DequantizeLinear DynamicQuantizeLinear"
_REDUCTION = """
Softmax LogSoftmax BiasSoftmax Hardmax LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization SkipSimplifiedLayerNormalization RMSNormalization
EmbedLayerNormalization GroupNormalization GroupNorm SkipGroupNorm InstanceNormalization LpNormalization MeanVarianceNormalization LRN
ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare ArgMax ArgMin TopK CumSum
MaxPool NhwcMaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool QLinearAveragePool QLinearGlobalAveragePool QLinearReduceMean QLinearSoftmax
"""
_POINTWISE = """
Add Sub Mul Div Pow Mod Min Max Sum Mean Neg Abs Sign Exp Log Sqrt Reciprocal Floor Ceil Round Erf Sin Cos Tan Sinh Cosh Tanh Asin Acos Atan
Relu LeakyRelu PRelu Elu Celu Selu Gelu FastGelu BiasGelu QuickGelu BiasAdd BiasSplitGelu Sigmoid HardSigmoid HardSwish Mish Softplus Softsign Swish ThresholdedRelu Clip Shrink
Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf BitwiseAnd BitwiseOr BitwiseXor BitwiseNot BitShift BatchNormalization RotaryEmbedding
QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu QLinearWhere
"""
_COPY = (
    "Concat QLinearConcat Split Slice Gather GatherElements GatherND ScatterElements ScatterND Expand Tile Pad MemcpyFromHost MemcpyToHost"
)

CLASSES: dict[str, str] = {
    **dict.fromkeys(_PRODUCT.split(), kernels.OTHER_PRODUCT),
    **dict.fromkeys(_ATTENTION.split(), kernels.ATTENTION),
    **dict.fromkeys(_LAYOUT.split(), kernels.LAYOUT),
    **dict.fromkeys(_CAST.split(), kernels.CAST),
    **dict.fromkeys(_REDUCTION.split(), kernels.REDUCTION),
    **dict.fromkeys(_POINTWISE.split(), kernels.POINTWISE),
    **dict.fromkeys(_COPY.split(), kernels.COPY),
}
"""What is in none is no work worth telling apart: views, constants, facts about shapes."""
