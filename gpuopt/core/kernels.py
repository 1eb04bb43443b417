"""A kernel's name -> what it does, whether tensor cores do it, and the dtype it multiplies in. The patterns are data; the first that matches wins.

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

KINDS = {
    "product": OTHER_PRODUCT,  # TENSOR_PRODUCT where the name says so
    "attention": ATTENTION,
    "cast": CAST,
    "strided copy": LAYOUT,
    "nchw-nhwc": LAYOUT,
    "reformat": LAYOUT,
    "pointwise": POINTWISE,
    "batch norm": POINTWISE,
    "random": POINTWISE,
    "softmax": REDUCTION,
    "norm": REDUCTION,
    "pool": REDUCTION,
    "sort": REDUCTION,
    "reduction": REDUCTION,
    "cat": COPY,
    "gather": COPY,
    "index": COPY,
    "memory": COPY,
    "collective": OTHER,
    "other": OTHER,
}
"""Kind -> class. A `strided copy` keeps the dtype and changes strides, `nchw-nhwc` is cuDNN's own such pass and `reformat` TensorRT's; `batch norm` is that of eval mode;
`gather` reads rows by index, `index` is any other indexed read or write, `memory` a memcpy or memset."""

_VIEWS = (
    r"(?:_?unsafe_view|view|reshape|transpose|permute|t|unsqueeze|squeeze|expand|slice|select|split|alias|detach|clone|contiguous|_conj)"
)
_TYPES = r"(?:_to_copy|to_copy|convert_element_type)"

PATTERNS: tuple[tuple[str, bool | None, str], ...] = (
    # Generated kernels are named after the ops in them (`triton_poi_fused__to_copy_0`): their prefix decides, so they come first.
    ("attention", None, r"^triton_tem_.*(?:flex|attention|sdpa)"),
    ("product", None, r"^triton_(?:tem|mm)_"),
    ("product", False, r"^_matvecs"),
    ("cast", None, rf"^triton_poi_fused_+(?:{_VIEWS}_+)*{_TYPES}(?:_+{_VIEWS})*_\d+$"),
    ("strided copy", None, rf"^triton_poi_fused_+{_VIEWS}(?:_+{_VIEWS})*_\d+$"),
    ("softmax", None, r"^triton_(?:red|per)_fused_.*softmax"),
    ("reduction", None, r"^triton_(?:red|per|spl)_"),
    ("pointwise", None, r"^triton_(?:poi|for)_|generatedNativePointwise"),
    ("other", None, r"^__myl_"),
    ("collective", None, r"[Nn]ccl|all_?reduce|reduce_?scatter|all_?gather"),
    ("memory", None, r"^Mem(?:cpy|set)"),
    ("reduction", None, r"splitKreduce|split_k_reduce"),
    ("attention", False, r"fmha_cutlass[FB]_f32"),
    ("attention", True, r"flash_(?:fwd|bwd)|fmha_cutlass[FB]_b?f16|_sdpa_sm\d|native_sdpa|fmha_v\d|mha_v2|FlashAttn(?:Fwd|Bwd)Sm"),
    ("attention", None, r"flash::|[Ff]lash_?[Aa]tt|fmha|sdpa|mha_(?:fwd|bwd|varlen)|efficient_attention|attention_kernel|AttentionKernel|MultiheadAttention|multihead_attention"),
    ("attention", None, r"_attn_fwd|paged_att|_attend_one"),
    ("nchw-nhwc", None, r"(?i)nchw_?to_?nhwc|nhwc_?to_?nchw|nchw2nhwc|nhwc2nchw|n(?:chw|hwc)AddPadding|tensorTransformGeneric|convertTensor_kernel|transpose_readWrite|conv\w*_layout"),
    ("reformat", None, r"genericReformat|copyPackedKernel|permutationKernel"),
    # Plain multiply-adds: f32f32_f32f32 is fp32 in and fp32 in the multiplier, where TF32 shows as f32f32_tf32f32.
    ("product", False, r"ffma|_simt_|(?:^|[^a-z0-9])[sdcz]gemm|convolve_[sdhc]gemm|[sdh]cudnn|xmma_\w*_f32f32_f32f32_|winograd|fft2d|fft1d|regular_fft|vector_fft"),
    ("product", False, r"gemv|gemmSN|gemmk1|(?:^|\W)dot_kernel|[Dd]epthwise|conv2d_grouped_direct|conv2d_c1_k1|im2col|col2im|vol2col|mv_kernel"),
    ("product", True, r"nvjet|xmma_(?:new_|sparse_)?(?:gemm|fprop|dgrad|wgrad)|xmma_implicit|warpgroupsize|tensorop|wmma|wgmma|(?<![A-Za-z])[hiqdb]mma|tcgen05"),
    ("product", True, r"(?:884|1688|16816|16832|161616|8816|8832)(?:tf32)?(?:gemm|fprop|dgrad|wgrad|cudnn)|cutlass3x_sm(?:90|100|103|120)|[Mm]arlin|machete|deep_?gemm|tinygemm_m16n8k16"),
    ("product", True, r"cutlass::device_kernel.*(?:[Ss]m90|[Ss]m100|MMA_64x|GMMA)|f8f8bf16"),
    ("product", None, r"(?i)gemm|cutlass.*kernel|fprop|implicit_con|convolve|convolution|(?:^|_)matmul|scaled_mm"),
    ("cast", None, r"b?float(?:16|8\w*)_copy_kernel_cuda|(?:b?float16tofloat32|float32tob?float16)_copy|_Cast[,>]|OP_Cast|CastKernel|cast_kernel"),
    ("cast", None, r"direct_copy_kernel_cuda.*WithCast|gpu_kernel_impl<.*direct_copy_kernel_cuda"),
    ("strided copy", None, r"direct_copy_kernel_cuda|[Tt]ranspose(?:_\w+|\w*)?[Kk]ernel|contiguous_kernel|[Pp]ermute\w*[Kk]ernel"),
    ("cat", None, r"CatArrayBatchedCopy|_concat_kernel|ConcatKernel"),
    ("memory", None, r"copy_device_to_device|SplitKernel"),
    ("batch norm", None, r"batch_norm_transform_input|batch_norm_elementwise|bn_fw_inf|batch_norm_inference"),
    ("softmax", None, r"(?i)soft_?max"),
    ("norm", None, r"(?i)layer_?norm|batch_?norm|bn_fw|bn_bw|group_?norm|rms_?norm|RowwiseMoments"),
    ("sort", None, r"[sS]ort|(?i:topk|radix)"),
    ("pool", None, r"(?i)max_?pool|avg_?pool|average_?pool|pooling"),
    ("reduction", None, r"(?i)reduce|welford|DeviceScan|cumsum"),
    ("gather", None, r"(?i)indexSelect|embedding|gather"),
    ("index", None, r"(?i)index_(?:put|elementwise|copy|fill|kernel)|masked_(?:select|scatter)|scatter|nonzero|DeviceSelect|write_indices|flag_kernel"),
    ("random", None, r"distribution|philox|dropout|multinomial"),
    ("pointwise", None, r"elementwise|ElementWise|Functor|pointwise|[Bb]ias_?(?:[Gg]elu|[Aa]ct|[Rr]elu)|Gelu\w*Kernel|[Aa]ctivation_?[Kk]ernel|silu_and_mul|rotary"),
)  # fmt: skip
"""(kind, whether tensor cores do it where the name tells, pattern)."""

DTYPES: tuple[tuple[str, str], ...] = (
    ("tf32", r"tf32|s1688gemm_\d|s1688(fprop|dgrad|wgrad)\w*_f32|s1688tf32"),
    ("float8_e4m3fn", r"e4m3|e5m2|nvjet_(sm\d+_)?qq|fp8"),
    ("int8", r"i8i8|_s8_|i16832|i8816|imma|int8"),
    ("bfloat16", r"tinygemm_m16n8k16|bf16|bfloat16|BFloat16|nvjet_(sm\d+_)?t[st]"),
    ("float16", r"f16f16|fp16|_f16|__half|half_t|c10::Half|hgemm|h16816|h884|h1688|nvjet_(sm\d+_)?h[sh]|s16816gemm|s884gemm"),
    ("float64", r"dgemm|f64f64|d884gemm|d16816|double"),
    ("float32", r"sgemm|scudnn|f32f32_f32f32|fmha_cutlassF_f32|<float|, float"),
)  # fmt: skip
"""(dtype a product multiplies in, pattern), the first that matches wins. `nvjet` is cuBLAS's generator for Hopper and later: its first letters say input, compute and
output (h half, t bfloat16, s single, q fp8)."""

_DTYPES = tuple((dtype, re.compile(pattern)) for dtype, pattern in DTYPES)
_TABLE = tuple((kind, tensor, re.compile(pattern)) for kind, tensor, pattern in PATTERNS)
_FUSED = re.compile(r"^triton_(?:poi|red|per|for|spl|tem)_|^__myl_|generatedNativePointwise|^cudnn_generated")


@lru_cache(maxsize=16384)
def _matched(name: str) -> tuple[str, bool | None]:
    return next(((found, tensor) for found, tensor, pattern in _TABLE if pattern.search(name)), ("other", None))


def kind(name: str) -> str:
    """One of `KINDS`: what the kernel does, as finely as its name tells."""
    return _matched(name)[0]


def kernel_class(name: str) -> str:
    """One of `CLASSES`. `layout` and `cast` change nothing but where or how values are stored; batch norm in eval mode is `pointwise`; softmax, norms and pools are `reduction`,
    gathers and concatenations `copy`. A product whose name tells nothing of its units is an `other product`: `on_tensor_cores` is None then."""
    found, tensor = _matched(name)
    return TENSOR_PRODUCT if found == "product" and tensor else KINDS[found]


def on_tensor_cores(name: str) -> bool | None:
    """Whether a product or an attention uses tensor cores by its name; None where the name does not say, or it is neither."""
    return _matched(name)[1]


@lru_cache(maxsize=16384)
def dtype(name: str) -> str | None:
    """Dtype a product or an attention multiplies in by its name, `tf32` among them; None where the name does not say, or it is neither."""
    if kind(name) not in ("product", "attention"):
        return None
    return next((found for found, pattern in _DTYPES if pattern.search(name)), None)


def is_product(name: str) -> bool:
    """A matrix product or a convolution, whatever computes it."""
    return kind(name) == "product"


@lru_cache(maxsize=16384)
def is_fused(name: str) -> bool:
    """Written by a compiler that fuses (Inductor, TensorRT, cuDNN's graph engine): what could be one pass has become one."""
    return _FUSED.search(name) is not None


def short(name: str) -> str:
    """A name as it fits a line: no return type, no parameters, of the template arguments only what tells kernels of one template apart."""
    text = re.sub(r"^(void|std::enable_if<[^>]*>::type)\s+", "", name).replace("(anonymous namespace)::", "").replace("at::native::", "")
    head, _, arguments = text.partition("<")
    head = head.partition("(")[0].partition("_tilesize")[0]
    if head.rpartition("::")[2] in ("Kernel", "Kernel2", "device_kernel"):
        return re.split(r"[<>,(]", arguments, maxsplit=1)[0] or head
    functor = re.search(r"\w+_kernel_cuda|\w+KernelImpl|\w+Functor\w*", arguments)
    return f"{head}<{functor[0]}>" if functor and head.endswith("elementwise_kernel") else head
