"""A kernel's name -> what it does and whether tensor cores do it. The patterns are data; the first that matches wins.

Names are as CUPTI reports them: demangled C++ of PyTorch's own kernels, identifiers of cuBLAS, cuDNN, CUTLASS, TensorRT and generated code. Libraries rename kernels at will, so
what no pattern knows is `other`, and a product whose name says nothing of tensor cores is left open (None), never guessed.
"""

from __future__ import annotations

import re
from functools import lru_cache

TENSOR_PRODUCT = "tensor-core product"
OTHER_PRODUCT = "other product"
LAYOUT = "layout"
CAST = "cast"
POINTWISE = "pointwise"
REDUCTION = "reduction"
ATTENTION = "attention"
COPY = "copy"
OTHER = "other"

CLASSES = (TENSOR_PRODUCT, OTHER_PRODUCT, LAYOUT, CAST, POINTWISE, REDUCTION, ATTENTION, COPY, OTHER)

_VIEWS = (
    r"(?:_?unsafe_view|view|reshape|transpose|permute|t|unsqueeze|squeeze|expand|slice|select|split|alias|detach|clone|contiguous|_conj)"
)
_TYPES = r"(?:_to_copy|to_copy|convert_element_type)"

PATTERNS: tuple[tuple[str, bool | None, str], ...] = (
    # Generated kernels are named after the ops in them (`triton_poi_fused__to_copy_0`): their prefix decides, so they come first.
    (ATTENTION, None, r"^triton_tem_.*(?:flex|attention|sdpa)"),
    (OTHER_PRODUCT, None, r"^triton_(?:tem|mm)_"),
    (CAST, None, rf"^triton_poi_fused_+(?:{_VIEWS}_+)*{_TYPES}(?:_+{_VIEWS})*_\d+$"),
    (LAYOUT, None, rf"^triton_poi_fused_+{_VIEWS}(?:_+{_VIEWS})*_\d+$"),
    (REDUCTION, None, r"^triton_(?:red|per|spl)_"),
    (POINTWISE, None, r"^triton_(?:poi|for)_|generatedNativePointwise"),
    (OTHER, None, r"^__myl_|[Nn]ccl|all_?reduce|reduce_?scatter|all_?gather"),
    (COPY, None, r"^Mem(?:cpy|set)"),
    (REDUCTION, None, r"splitKreduce|split_k_reduce"),
    (ATTENTION, False, r"fmha_cutlass[FB]_f32"),
    (ATTENTION, True, r"flash_(?:fwd|bwd)|fmha_cutlass[FB]_b?f16|_sdpa_sm\d|native_sdpa|fmha_v\d|mha_v2|FlashAttn(?:Fwd|Bwd)Sm"),
    (ATTENTION, None, r"flash::|[Ff]lash_?[Aa]tt|fmha|sdpa|mha_(?:fwd|varlen)|attention_kernel|AttentionKernel|MultiheadAttention|multihead_attention|_attn_fwd|paged_att"),
    (LAYOUT, None, r"(?i)nchw_?to_?nhwc|nhwc_?to_?nchw|nchw2nhwc|nhwc2nchw|n[ch]hwc?AddPadding|tensorTransformGeneric|convertTensor_kernel|transpose_readWrite"),
    (LAYOUT, None, r"genericReformat|copyPackedKernel|permutationKernel|conv\w*_layout"),
    # Plain multiply-adds: f32f32_f32f32 is fp32 in and fp32 in the multiplier, where TF32 shows as f32f32_tf32f32.
    (OTHER_PRODUCT, False, r"ffma|_simt_|(?:^|[^a-z0-9])[sdcz]gemm|convolve_[sdhc]gemm|[sd]cudnn|xmma_\w*_f32f32_f32f32_|winograd|fft2d|fft1d|regular_fft|vector_fft"),
    (OTHER_PRODUCT, False, r"gemv|gemmSN|gemmk1|(?:^|\W)dot_kernel|[Dd]epthwise|conv2d_grouped_direct|conv2d_c1_k1|im2col|col2im|vol2col|mv_kernel"),
    (TENSOR_PRODUCT, True, r"nvjet|xmma_(?:new_|sparse_)?(?:gemm|fprop|dgrad|wgrad)|xmma_implicit|warpgroupsize|tensorop|wmma|wgmma|(?<![A-Za-z])[hiqdb]mma|tcgen05"),
    (TENSOR_PRODUCT, True, r"(?:884|1688|16816|16832|161616|8816|8832)(?:tf32)?(?:gemm|fprop|dgrad|wgrad|cudnn)|cutlass3x_sm(?:90|100|103|120)|[Mm]arlin|machete|deep_?gemm"),
    (TENSOR_PRODUCT, True, r"cutlass::device_kernel.*(?:[Ss]m90|[Ss]m100|MMA_64x|GMMA)|f8f8bf16"),
    (OTHER_PRODUCT, None, r"(?i)gemm|cutlass.*kernel|fprop|implicit_con|convolve|convolution|(?:^|_)matmul|scaled_mm"),
    (CAST, None, r"b?float(?:16|8\w*)_copy_kernel_cuda|(?:b?float16tofloat32|float32tob?float16)_copy|_Cast[,>]|OP_Cast|CastKernel|cast_kernel"),
    (CAST, None, r"direct_copy_kernel_cuda.*WithCast|gpu_kernel_impl<.*direct_copy_kernel_cuda"),
    (LAYOUT, None, r"direct_copy_kernel_cuda|[Tt]ranspose(?:_\w+|\w*)?[Kk]ernel|contiguous_kernel|[Pp]ermute\w*[Kk]ernel"),
    (COPY, None, r"CatArrayBatchedCopy|copy_device_to_device|_concat_kernel|ConcatKernel|SplitKernel"),
    (POINTWISE, None, r"batch_norm_transform_input|batch_norm_elementwise|bn_fw_inf|batch_norm_inference"),
    (
        REDUCTION,
        None,
        r"(?i)soft_?max|layer_?norm|batch_?norm|bn_fw|bn_bw|group_?norm|rms_?norm|RowwiseMoments|reduce|max_?pool|avg_?pool|average_?pool|pooling|DeviceScan|cumsum|welford|sort|topk|radix",
    ),
    (COPY, None, r"(?i)gather|indexSelect|embedding|index_(?:put|elementwise|copy|fill|kernel)|masked_(?:select|scatter)|scatter|nonzero|DeviceSelect"),
    (POINTWISE, None, r"elementwise|ElementWise|Functor|pointwise|[Bb]ias_?(?:[Gg]elu|[Aa]ct|[Rr]elu)|Gelu\w*Kernel|[Aa]ctivation_?[Kk]ernel|silu_and_mul|rotary|distribution"),
)  # fmt: skip
"""(class, whether tensor cores do it where the name tells, pattern)."""

_TRAITS = {TENSOR_PRODUCT, OTHER_PRODUCT, ATTENTION}
_TABLE = tuple((name, tensor, re.compile(pattern)) for name, tensor, pattern in PATTERNS)
_FUSED = re.compile(r"^triton_(?:poi|red|per|for|spl|tem)_|^__myl_|generatedNativePointwise|^cudnn_generated")


@lru_cache(maxsize=16384)
def _matched(name: str) -> tuple[str, bool | None]:
    return next(((found, tensor) for found, tensor, pattern in _TABLE if pattern.search(name)), (OTHER, None))


def kernel_class(name: str) -> str:
    """One of `CLASSES`. `layout` and `cast` change nothing but where or how values are stored; batch norm in eval mode is `pointwise`; softmax, norms and pools are `reduction`,
    gathers and concatenations `copy`. A product whose name tells nothing of its units is an `other product`: `on_tensor_cores` is None then."""
    return _matched(name)[0]


def on_tensor_cores(name: str) -> bool | None:
    """Whether a product or an attention uses tensor cores by its name; None where the name does not say, or it is neither."""
    found, tensor = _matched(name)
    return tensor if found in _TRAITS else None


def is_product(name: str) -> bool:
    """A matrix product or a convolution, whatever computes it."""
    return kernel_class(name) in (TENSOR_PRODUCT, OTHER_PRODUCT)


@lru_cache(maxsize=16384)
def is_fused(name: str) -> bool:
    """Written by a compiler that fuses (Inductor, TensorRT, cuDNN's graph engine): what could be one pass has become one."""
    return _FUSED.search(name) is not None
