"""A kernel's name -> what it does, whether it uses tensor cores, and the dtype it multiplies in. The patterns are data; the first that matches wins.

Names are those CUPTI reports: demangled C++ for PyTorch's own kernels, mangled-free identifiers for cuBLAS, cuDNN and generated code. A library may call a kernel anything:
what no pattern knows is `other`, and whether that uses tensor cores is None, never a guess.
"""

from __future__ import annotations

import re
from functools import lru_cache

KINDS: tuple[tuple[str, str], ...] = (
    # What is fused is named after its ops (`triton_poi_fused_nchw…`): the prefix decides, so it comes first.
    ("cast", r"^triton_poi_fused__to_copy(_t|_view)?(_\d+)?$"),
    ("pointwise", r"^triton_(poi|for)_"),
    ("softmax", r"^triton_(red|per)_fused_.*softmax"),
    ("reduction", r"^triton_(red|per|spl)_"),
    ("attention", r"^triton_tem_.*(attention|flex)"),
    ("product", r"^triton_tem_|^triton_mm"),
    ("collective", r"nccl|all_?reduce|reduce_?scatter|all_?gather"),
    ("attention", r"flash_(fwd|bwd)|FlashAttn|flash::|FlashAttention|fmha|sdpa|mha_(fwd|bwd|varlen)|attention_kernel|AttentionKernel|efficient_attention"),
    (
        "layout",
        r"nchwToNhwc|nhwcToNchw|nchwAddPadding|tensorTransformGeneric|convertTensor_kernel|transpose_readWrite|nchw2nhwc|nhwc2nchw|conv\w*_layout",
    ),
    # cuBLAS, CUTLASS, cuDNN: before the words below, which their long template arguments may hold.
    ("product", r"nvjet|xmma_(gemm|fprop|dgrad|wgrad|sparse)|cutlass(_\w*)?::(device_)?[Kk]ernel|cutlass\w*_(tensorop|simt|wmma)\w*(gemm|fprop|dgrad|wgrad)"),
    ("product", r"cutlass[_3]\w*gemm|gemm|gemv|GemmUniversal|dot_kernel|scudnn|hcudnn|winograd|convolve|fprop|implicit_con|conv\d?d?_(grouped|depthwise|direct)"),
    ("product", r"depthwise|im2col|col2im|vol2col|fft2d|wgmma|conv2d_c1_k1|gemmk1|DepthwiseConv|_scaled_mm"),
    ("cast", r"(b?float(16|8_\w+))_copy_kernel_cuda|float16tofloat32_copy|bfloat16tofloat32_copy"),
    ("cast", r"direct_copy_kernel_cuda.*(LoadWithCast|StoreWithCast)|(LoadWithCast|StoreWithCast).*direct_copy_kernel_cuda"),
    ("cat", r"CatArrayBatchedCopy"),
    ("copy", r"direct_copy_kernel_cuda|copy_device_to_device|transpose(_\w+)?_kernel|contiguous_kernel"),
    ("softmax", r"[sS]oft_?[mM]ax"),
    ("norm", r"layer_?norm|LayerNorm|batch_norm|BatchNorm|bn_fw|bn_bw|group_?norm|GroupNorm|RowwiseMoments|rms_?norm|RMSNorm"),
    ("gather", r"vectorized_gather_kernel|indexSelect|embedding|EmbeddingBag|gather_elementwise|gather_kernel|\bgather\b"),
    ("index", r"index_put|index_elementwise|index_kernel|index_copy|index_fill|masked_(fill|select|scatter)|write_indices|flag_kernel|nonzero|DeviceSelect|scatter"),
    ("random", r"distribution_elementwise|philox|dropout|multinomial"),
    ("sort", r"[sS]ort|topk|gatherTopK|radix"),
    ("pool", r"pool"),
    ("reduction", r"reduce_kernel|ReduceOp|DeviceReduce|splitKreduce|DeviceScan|cumsum"),
    ("pointwise", r"elementwise_kernel|unrolled_elementwise|CUDAFunctor|BinaryFunctor|FillFunctor|pointwise"),
    ("memset", r"^Memset|memset"),
)  # fmt: skip
"""(kind, pattern)."""

NO_TENSOR_CORES = (
    # `ffma` is the plain multiply-add; f32f32_f32f32 is fp32 in and fp32 in the multiplier, where tf32 shows as f32f32_tf32f32.
    r"ffma|simt|[sd]gemm|scudnn|hcudnn|maxwell_|convolve_sgemm|xmma_\w*_f32f32_f32f32_|winograd|fft2d|gemv|gemvx|dot_kernel|gemmSN|gemmk1"
    r"|depthwise|Depthwise|conv2d_grouped_direct|im2col|conv2d_c1_k1"
)
TENSOR_CORES = (
    r"nvjet|tensorop|tensor(16|8)x8x\d+|wgmma|hmma|imma|bmma|dmma|qmma|warpgroupsize|s?884|1688|16816|16832|161616|8816|h16816|cutlass3x_sm(90|100|103|120)|tcgen05"
    r"|xmma_\w*_(f16f16|bf16bf16|f32f32_tf32f32|i8i8|e4m3|e5m2)|wmma|flash_(fwd|bwd)|fmha_cutlass[FB]_(f16|bf16)|sdpa_sm|device_kernel|f64f64"
)
"""Patterns of names that do; NO_TENSOR_CORES is asked first, because `cutlass_80_simt_sgemm` holds names of both."""

DTYPES: tuple[tuple[str, str], ...] = (
    ("tf32", r"tf32|s1688gemm_\d|s1688(fprop|dgrad|wgrad)\w*_f32|s1688tf32"),
    ("float8_e4m3fn", r"e4m3|e5m2|nvjet_(sm\d+_)?qq|fp8"),
    ("int8", r"i8i8|_s8_|i16832|i8816|imma|int8"),
    ("bfloat16", r"bf16|bfloat16|BFloat16|nvjet_(sm\d+_)?t[st]"),
    ("float16", r"f16f16|fp16|_f16|__half|half_t|c10::Half|hgemm|h16816|h884|h1688|nvjet_(sm\d+_)?h[sh]|s16816gemm|s884gemm"),
    ("float64", r"dgemm|f64f64|d884gemm|d16816|double"),
    ("float32", r"sgemm|scudnn|f32f32_f32f32|fmha_cutlassF_f32|<float|, float"),
)  # fmt: skip
"""(dtype a product multiplies in, pattern)."""

_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)
_PLAIN = re.compile(NO_TENSOR_CORES)
_TENSOR = re.compile(TENSOR_CORES)
_DTYPES = tuple((dtype, re.compile(pattern)) for dtype, pattern in DTYPES)


@lru_cache(maxsize=8192)
def kind(name: str) -> str:
    """`product` (GEMM, GEMV, convolution), `attention` (fused), `pointwise`, `cast`, `copy` (same dtype, another layout), `layout` (cuDNN's NCHW <-> NHWC), `cat`, `softmax`,
    `norm`, `gather`, `index`, `reduction`, `random`, `sort`, `pool`, `collective`, `memset` or `other`."""
    return next((found for found, pattern in _KINDS if pattern.search(name)), "other")


@lru_cache(maxsize=8192)
def uses_tensor_cores(name: str) -> bool | None:
    """Whether a product's or attention's name says tensor cores; None where the name says nothing (generated code, bare `Kernel2`), or it is no product."""
    if kind(name) not in ("product", "attention"):
        return None
    if _PLAIN.search(name) and "warpgroupsize" not in name:
        return False
    return True if _TENSOR.search(name) else None


@lru_cache(maxsize=8192)
def dtype(name: str) -> str | None:
    """Dtype a product or attention multiplies in by its name, `tf32` among them; None where the name does not say."""
    if kind(name) not in ("product", "attention"):
        return None
    return next((found for found, pattern in _DTYPES if pattern.search(name)), None)


def short(name: str) -> str:
    """A name as it fits a line: no return type, no parameters, of the template arguments only what tells kernels of one template apart."""
    text = re.sub(r"^(void|std::enable_if<[^>]*>::type)\s+", "", name).replace("(anonymous namespace)::", "").replace("at::native::", "")
    head, _, arguments = text.partition("<")
    head = head.partition("(")[0].partition("_tilesize")[0]
    if head.rpartition("::")[2] in ("Kernel", "Kernel2", "device_kernel"):
        return re.split(r"[<>,(]", arguments, maxsplit=1)[0] or head
    functor = re.search(r"\w+_kernel_cuda|\w+KernelImpl|\w+Functor\w*", arguments)
    return f"{head}<{functor[0]}>" if functor and head.endswith("elementwise_kernel") else head
