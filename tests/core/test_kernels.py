"""Kernel names of real libraries -> what they do. Names rot: a new one belongs here first."""

from __future__ import annotations

import pytest

from gpuopt.core.kernels import CLASSES, PATTERNS, is_fused, is_product, kernel_class, on_tensor_cores

ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::{}, std::array<char*, 2ul> >(int, at::native::{}, std::array<char*, 2ul>)"
COPIES = "void at::native::{}<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda()#3}}::operator()() const::{{lambda()#10}}::operator()() const::{{lambda(float)#1}}{}"

NAMES = [
    # cuBLAS on Hopper and Blackwell, then older ones
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "tensor-core product", True),
    ("nvjet_sm90_hss_64x8_64x16_1x1_h_bz_splitK_NNT", "tensor-core product", True),
    ("nvjet_tst_320x128_64x3_1x2_h_bz_coopB_bias_TNT", "tensor-core product", True),
    (
        "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "tensor-core product",
        True,
    ),
    ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", "tensor-core product", True),
    ("ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_ldg8_f2f_stages_64x5_nn", "tensor-core product", True),
    ("volta_h884gemm_64x128_ldg8_nn", "tensor-core product", True),
    ("turing_fp16_s1688gemm_fp16_256x64_ldg8_f2f_nn", "tensor-core product", True),
    ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x4_nn_align4>(Params)", "tensor-core product", True),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>(Params)", "tensor-core product", True),
    ("void cutlass::Kernel2<cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1>(Params)", "tensor-core product", True),
    (
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int,int,int,int>, cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm90TmaGmma>>>",
        "tensor-core product",
        True,
    ),
    ("sm90_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute_kernel__5x_cublas", "tensor-core product", True),
    ("ampere_sgemm_128x64_tn", "other product", False),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>(Params)", "other product", False),
    (
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x8_stage3_warpsize1x4x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas",
        "other product",
        False,
    ),
    (
        "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_warpsize2x2x1_tensor16x8x8_execute_kernel_cublas",
        "tensor-core product",
        True,
    ),
    ("void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false>(Params)", "other product", False),
    ("void gemvx::kernel<int, int, float, float, float, float, false, true, false, false, 7, false>(Params)", "other product", False),
    ("void gemmSN_NN_kernel<float, 256, 4, 2, 8, 2, 4, false>(Params)", "other product", False),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half, true, false, false>(Params)", "reduction", None),
    # cuDNN
    (
        "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_stage3_warpsize2x2x1_g1_tensor16x8x16_execute_kernel__5x_cudnn",
        "tensor-core product",
        True,
    ),
    ("void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false, true>(Params)", "other product", False),
    ("_5x_cudnn_volta_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1", "other product", False),
    ("void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, float>(Params)", "other product", False),
    ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::Half, int>(Params)", "other product", False),
    ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>(Params)", "layout", None),
    (
        "void cudnn::engines_precompiled::nhwcToNchwKernel<float, float, float, false, false, (cudnnKernelDataType_t)2>(Params)",
        "layout",
        None,
    ),
    ("void cudnn::bn_fw_inf_1C11_kernel_NCHW<float, float, true, 1>(Params)", "pointwise", None),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1", "attention", True),
    # attention
    ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>, false>(Params)", "attention", True),
    ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t>::Params)", "attention", True),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)", "attention", False),
    ("_gemm_mha_v2", "attention", True),
    # PyTorch's own
    (ELEMENTWISE.format("GeluCUDAKernelImpl", "GeluCUDAKernelImpl"), "pointwise", None),
    (ELEMENTWISE.format("CUDAFunctor_add<c10::Half>", "CUDAFunctor_add<c10::Half>"), "pointwise", None),
    (ELEMENTWISE.format("bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)", "x"), "cast", None),
    (ELEMENTWISE.format("float8_copy_kernel_cuda(at::TensorIteratorBase&)", "x"), "cast", None),
    (COPIES.format("unrolled_elementwise_kernel", ", at::native::memory::LoadWithCast<1>, at::native::memory::StoreWithCast<1> >"), "cast", None),
    (
        COPIES.format("unrolled_elementwise_kernel", ", at::native::memory::LoadWithoutCast, at::native::memory::StoreWithoutCast>"),
        "layout",
        None,
    ),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(x)>>", "layout", None),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::direct_copy_kernel_cuda(x)>>", "cast", None),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 4, 64, 64>(Params)", "copy", None),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float, false>(int, float)", "reduction", None),
    ("void (anonymous namespace)::softmax_warp_forward<c10::Half, c10::Half, float, 9, false, false>(Params)", "reduction", None),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(Params)", "reduction", None),
    ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::Half>(Params)", "reduction", None),
    (
        "void at::native::batch_norm_transform_input_channels_last_kernel<c10::Half, c10::Half, float, c10::Half, 4>(Params)",
        "pointwise",
        None,
    ),
    ("void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(Params)", "copy", None),
    ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::Half, long, unsigned int, 2, 2, -2, true>(Params)", "copy", None),
    # generated
    ("triton_poi_fused_add_gelu_0", "pointwise", None),
    ("triton_poi_fused__to_copy_2", "cast", None),
    ("triton_poi_fused__to_copy_add_2", "pointwise", None),
    ("triton_poi_fused__to_copy_view_11", "cast", None),
    ("triton_poi_fused_clone_3", "layout", None),
    ("triton_poi_fused__unsafe_view_clone_transpose_3", "layout", None),
    ("triton_red_fused_add_native_layer_norm_4", "reduction", None),
    ("triton_per_fused__softmax_1", "reduction", None),
    ("triton_tem_fused_addmm_7", "other product", None),
    ("triton_tem_fused_flex_attention_0", "attention", None),
    # ONNX Runtime, TensorRT, collectives
    ("void onnxruntime::cuda::_UnaryElementWise<float, __half, onnxruntime::cuda::OP_Cast<float, __half>, 256, 4>(Params)", "cast", None),
    ("void onnxruntime::cuda::_BinaryElementWiseSimple<true, true, __half, __half, __half, onnxruntime::cuda::OP_Add<__half>>(Params)", "pointwise", None),
    ("void onnxruntime::cuda::Transpose4DKernelParallelizeMultipleElementsPerThreadInInnermostDim<2>(Params)", "layout", None),
    ("void genericReformat::copyVectorizedKernel<double, __half, __half, true, true, 1>(Params)", "layout", None),
    ("generatedNativePointwise", "pointwise", None),
    ("__myl_AddResMulMeaSubMulMeaAddSqrDivMulMulAdd_myl0_3", "other", None),
    ("ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "other", None),
    ("Memcpy DtoD (Device -> Device)", "copy", None),
    ("Memset (Device)", "copy", None),
    ("my_kernel", "other", None),
    ("", "other", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected", "tensor"), NAMES, ids=[n[:60] for n, _, _ in NAMES])
def test_a_kernel_is_known_by_its_name(name, expected, tensor):
    assert (kernel_class(name), on_tensor_cores(name)) == (expected, tensor)


def test_every_class_has_a_name_here_and_every_pattern_a_class():
    assert {kernel_class(name) for name, _, _ in NAMES} == set(CLASSES)
    assert {found for found, _, _ in PATTERNS} == set(CLASSES)


def test_products_are_products_whatever_computes_them():
    assert is_product("ampere_sgemm_128x64_tn") and is_product("nvjet_hsh_8x8") and is_product("triton_tem_fused_mm_0")
    assert not is_product("triton_poi_fused_mm_0")


def test_only_what_a_compiler_wrote_counts_as_fused():
    assert is_fused("triton_poi_fused_add_0") and is_fused("__myl_AddMul_myl0_1")
    assert not is_fused(ELEMENTWISE.format("x", "x")) and not is_fused("triton_matmul_of_mine")
