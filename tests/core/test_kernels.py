"""Kernel names of real libraries -> what they do (torch 2.11 to 2.13, cuBLAS 12 and 13, cuDNN 9, CUTLASS, Triton, flash attention, older cards). Names rot: a new one belongs here first."""

from __future__ import annotations

import pytest

from gpuopt.core.kernels import CLASSES, KINDS, PATTERNS, dtype, is_fused, is_product, kernel_class, kind, on_tensor_cores, short

NAMES = [
    # (name, class, kind, on tensor cores, dtype it multiplies in)
    # product
    ("_matvecs", "other product", "product", False, None),
    ("_matvecs_gated", "other product", "product", False, None),
    ("_attend_one", "attention", "attention", None, None),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "tensor-core product", "product", True, "float16"),
    ("nvjet_sm90_hss_64x8_64x16_1x1_h_bz_splitK_NNT", "tensor-core product", "product", True, "float16"),
    ("nvjet_tst_320x128_64x3_1x2_h_bz_coopB_bias_TNT", "tensor-core product", "product", True, "bfloat16"),
    (
        "void at::native::tinygemm_m16n8k16_chunk_kernel<at::native::ALayout_RM<(at::native::KReductionType)0>, at::native::BLayout_TC_int4<8, 128>, "
        "at::native::ALayout_RM<(at::native::KReductionType)0>, 8, 8>(void const*, void const*, void const*, void*, int, int, int, int, int, int)",
        "tensor-core product",
        "product",
        True,
        "bfloat16",
    ),
    ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas", "tensor-core product", "product", True, "float16"),
    ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", "tensor-core product", "product", True, "float16"),
    ("ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_ldg8_f2f_stages_64x5_nn", "tensor-core product", "product", True, "bfloat16"),
    ("volta_h884gemm_64x128_ldg8_nn", "tensor-core product", "product", True, "float16"),
    ("turing_fp16_s1688gemm_fp16_256x64_ldg8_f2f_nn", "tensor-core product", "product", True, "float16"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x4_nn_align4>(Params)", "tensor-core product", "product", True, "tf32"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>(Params)", "tensor-core product", "product", True, "float16"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1>(Params)", "tensor-core product", "product", True, "float64"),
    ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int,int,int,int>, cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm90TmaGmma>>>", "tensor-core product", "product", True, None),
    ("sm90_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute_kernel__5x_cublas", "tensor-core product", "product", True, "int8"),
    ("ampere_sgemm_128x64_tn", "other product", "product", False, "float32"),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>(Params)", "other product", "product", False, "float32"),
    ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x8_stage3_warpsize1x4x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas", "other product", "product", False, "float32"),
    ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_warpsize2x2x1_tensor16x8x8_execute_kernel_cublas", "tensor-core product", "product", True, "tf32"),
    ("void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false>(Params)", "other product", "product", False, "float16"),
    ("void gemvx::kernel<int, int, float, float, float, float, false, true, false, false, 7, false>(Params)", "other product", "product", False, "float32"),
    ("void gemmSN_NN_kernel<float, 256, 4, 2, 8, 2, 4, false>(Params)", "other product", "product", False, "float32"),
    ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_stage3_warpsize2x2x1_g1_tensor16x8x16_execute_kernel__5x_cudnn", "tensor-core product", "product", True, "float16"),
    ("void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false, true>(Params)", "other product", "product", False, "float32"),
    ("_5x_cudnn_volta_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1", "other product", "product", False, "float32"),
    ("void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, float>(Params)", "other product", "product", False, "float32"),
    ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::Half, int>(Params)", "other product", "product", False, "float16"),
    ("triton_tem_fused_addmm_7", "other product", "product", None, None),
    ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize256x64x8_stage3_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas", "other product", "product", False, "float32"),
    ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize128x128x8_stage3_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel__51_cublas", "other product", "product", False, "float32"),
    ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas", "tensor-core product", "product", True, "tf32"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas", "tensor-core product", "product", True, "bfloat16"),
    ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas", "tensor-core product", "product", True, "float16"),
    ("sm90_xmma_gemm_f64f64_f64f64_f64_nn_n_tilesize64x128x16_stage3_tensor16x8x8_kernel", "tensor-core product", "product", True, "float64"),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "tensor-core product", "product", True, "float16"),
    ("nvjet_hss_64x8_64x16_1x1_v_bz_splitK_NNT", "tensor-core product", "product", True, "float16"),
    ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "tensor-core product", "product", True, "bfloat16"),
    ("nvjet_sm100_tst_64x32_64x16_2x1_2cta_v_bz_TNN", "tensor-core product", "product", True, "bfloat16"),
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "tensor-core product", "product", True, "bfloat16"),
    ("volta_fp16_s884gemm_fp16_128x128_ldg8_f2f_tn", "tensor-core product", "product", True, "float16"),
    ("turing_fp16_s1688gemm_fp16_256x128_ldg8_f2f_tn", "tensor-core product", "product", True, "float16"),
    ("ampere_sgemm_64x32_sliced1x4_tn", "other product", "product", False, "float32"),
    ("volta_sgemm_128x64_nn", "other product", "product", False, "float32"),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x128_8x4_tn_align1>(T1::Params)", "other product", "product", False, "float32"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x3_nn_align4>(cutlass_80_tensorop_s1688gemm_256x128_16x3_nn_align4::Params)", "tensor-core product", "product", True, "tf32"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>(cutlass_80_wmma_tensorop::Params)", "tensor-core product", "product", True, "float16"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>(cutlass_80_wmma_tensorop::Params)", "tensor-core product", "product", True, "bfloat16"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1>(cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1::Params)", "tensor-core product", "product", True, "float64"),
    ("cutlass3x_sm100_simt_sgemm_f32_f32_f32_f32_f32_64x32x16_1x1x1_3_ntn_align1_bias_f32_relu", "other product", "product", False, "float32"),
    ("std::enable_if<!T7, void>::type internal::gemvx::kernel<int, int, __half, __half, __half, float, false, true, true, false, 7, false, cublasGemvParamsEx<int, cublasGemvTensorStridedBatched<__half const>, float> >", "other product", "product", False, "float16"),
    ("std::enable_if<!T7, void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, false, true, true, false, 7>", "other product", "product", False, "bfloat16"),
    ("void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false, cublasGemvParamsEx<int> >", "other product", "product", False, "float32"),
    ("void gemmSN_TN_kernel<float, 128, 16, 2, 4, 4, 4, true, cublasGemvTensorStridedBatched<float const> >", "other product", "product", False, "float32"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn", "tensor-core product", "product", True, "bfloat16"),
    ("sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4_warpsize2x2x1_g1_tensor16x8x8", "tensor-core product", "product", True, "tf32"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_256x128_32x3_nhwc_align8>(cutlass_tensorop::Params)", "tensor-core product", "product", True, "float16"),
    ("void cutlass_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_256x128_32x3>(cutlass_tensorop_f16::Params)", "tensor-core product", "product", True, "float16"),
    ("_5x_cudnn_ampere_scudnn_128x32_relu_interior_nn_v1", "other product", "product", False, "float32"),
    ("ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1", "other product", "product", False, "float32"),
    ("void implicit_convolve_sgemm<__half, __half, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int, __half const*, int, __half*)", "other product", "product", False, "float16"),
    ("void precomputed_convolve_sgemm<float, 512, 6, 7, 4, 3, 5, 1, false>(int, int, int, float const*)", "other product", "product", False, "float32"),
    ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::Half, int>(at::GenericPackedTensorAccessor<c10::Half const, 4ul>)", "other product", "product", False, "float16"),
    ("triton_tem_fused_addmm_0", "other product", "product", None, None),
    ("triton_tem_fused_mm_3", "other product", "product", None, None),
    # attention
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1", "attention", "attention", True, "float16"),
    ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>, false>(Params)", "attention", "attention", True, None),
    ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t>::Params)", "attention", "attention", True, "float16"),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)", "attention", "attention", False, "float32"),
    ("_gemm_mha_v2", "attention", "attention", True, None),
    ("triton_tem_fused_flex_attention_0", "attention", "attention", None, None),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t> >(pytorch_flash::Flash_fwd_params)", "attention", "attention", True, "bfloat16"),
    ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4, false, false, cutlass::half_t> >(pytorch_flash::Flash_fwd_params)", "attention", "attention", True, "float16"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention", "attention", True, "float16"),
    ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_3_64x64x128_4x1x1_kernel0_0", "attention", "attention", True, "float16"),
    ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t, cutlass::arch::Sm80, true, 64, 64, 64>::Params)", "attention", "attention", True, "float16"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t, cutlass::arch::Sm80, true>::Params)", "attention", "attention", True, "bfloat16"),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float, cutlass::arch::Sm80, true, 64, 64, 64>::Params)", "attention", "attention", False, "float32"),
    # cast
    ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&), std::array<char*, 2ul> >(int, at::native::x, std::array<char*, 2ul>)", "cast", "cast", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::float8_copy_kernel_cuda(at::TensorIteratorBase&), std::array<char*, 2ul> >(int, at::native::x, std::array<char*, 2ul>)", "cast", "cast", None, None),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#10}::operator()() const::{lambda(float)#1}, at::native::memory::LoadWithCast<1>, at::native::memory::StoreWithCast<1> >", "cast", "cast", None, None),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::direct_copy_kernel_cuda(x)>>", "cast", "cast", None, None),
    ("triton_poi_fused__to_copy_2", "cast", "cast", None, None),
    ("triton_poi_fused__to_copy_view_11", "cast", "cast", None, None),
    ("void onnxruntime::cuda::_UnaryElementWise<float, __half, onnxruntime::cuda::OP_Cast<float, __half>, 256, 4>(Params)", "cast", "cast", None, None),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}, std::array<char*, 2ul>, 4, TrivialOffsetCalculator<1, unsigned int>, at::native::memory::LoadWithCast<1>, at::native::memory::StoreWithCast<1> >(int)", "cast", "cast", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}, std::array<char*, 2ul> >", "cast", "cast", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::float16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}, std::array<char*, 2ul> >", "cast", "cast", None, None),
    ("triton_poi_fused__to_copy_0", "cast", "cast", None, None),
    # strided copy
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#10}::operator()() const::{lambda(float)#1}, at::native::memory::LoadWithoutCast, at::native::memory::StoreWithoutCast>", "layout", "strided copy", None, None),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(x)>>", "layout", "strided copy", None, None),
    ("triton_poi_fused_clone_3", "layout", "strided copy", None, None),
    ("triton_poi_fused__unsafe_view_clone_transpose_3", "layout", "strided copy", None, None),
    ("void onnxruntime::cuda::Transpose4DKernelParallelizeMultipleElementsPerThreadInInnermostDim<2>(Params)", "layout", "strided copy", None, None),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>", "layout", "strided copy", None, None),
    # nchw-nhwc
    ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>(Params)", "layout", "nchw-nhwc", None, None),
    ("void cudnn::engines_precompiled::nhwcToNchwKernel<float, float, float, false, false, (cudnnKernelDataType_t)2>(Params)", "layout", "nchw-nhwc", None, None),
    ("void cudnn::engines_precompiled::nchwToNhwcKernel<float, __half, float, false, true, (cudnnKernelDataType_t)0>(nchw2nhwc_params_t<float>)", "layout", "nchw-nhwc", None, None),
    ("void cudnn::ops::nhwcToNchwKernel<__half, __half, float, true, false, (cudnnKernelDataType_t)0>(nhwc2nchw_params_t<float>, __half const*)", "layout", "nchw-nhwc", None, None),
    # reformat
    ("void genericReformat::copyVectorizedKernel<double, __half, __half, true, true, 1>(Params)", "layout", "reformat", None, None),
    # pointwise
    ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl, std::array<char*, 2ul> >(int, at::native::GeluCUDAKernelImpl, std::array<char*, 2ul>)", "pointwise", "pointwise", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 2ul> >(int, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 2ul>)", "pointwise", "pointwise", None, None),
    ("triton_poi_fused_add_gelu_0", "pointwise", "pointwise", None, None),
    ("triton_poi_fused__to_copy_add_2", "pointwise", "pointwise", None, None),
    ("void onnxruntime::cuda::_BinaryElementWiseSimple<true, true, __half, __half, __half, onnxruntime::cuda::OP_Add<__half>>(Params)", "pointwise", "pointwise", None, None),
    ("generatedNativePointwise", "pointwise", "pointwise", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, at::native::GeluType)::{lambda()#2}>", "pointwise", "pointwise", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >(int)", "pointwise", "pointwise", None, None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int)", "pointwise", "pointwise", None, None),
    ("triton_poi_fused_gelu_view_2", "pointwise", "pointwise", None, None),
    ("triton_poi_fused_native_layer_norm_convolution_4", "pointwise", "pointwise", None, None),
    ("triton_poi_fused__to_copy_add_mul_1", "pointwise", "pointwise", None, None),
    # batch norm
    ("void cudnn::bn_fw_inf_1C11_kernel_NCHW<float, float, true, 1>(Params)", "pointwise", "batch norm", None, None),
    ("void at::native::batch_norm_transform_input_channels_last_kernel<c10::Half, c10::Half, float, c10::Half, 4>(Params)", "pointwise", "batch norm", None, None),
    ("void cudnn::bn_fw_inf_1C11_kernel_NCHW<float, float, true, 1>(float, float, cudnnTensorStruct, float const*)", "pointwise", "batch norm", None, None),
    ("void at::native::batch_norm_transform_input_channels_last_kernel<c10::Half, float, c10::Half, 4>(c10::Half const*)", "pointwise", "batch norm", None, None),
    # softmax
    ("void (anonymous namespace)::softmax_warp_forward<c10::Half, c10::Half, float, 9, false, false>(Params)", "reduction", "softmax", None, None),
    ("triton_per_fused__softmax_1", "reduction", "softmax", None, None),
    ("triton_per_fused__softmax_add_7", "reduction", "softmax", None, None),
    ("triton_red_fused__safe_softmax__to_copy_add_2", "reduction", "softmax", None, None),
    ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 9, false, false, 32>(float*, float const*, int, int, int, bool const*, int)", "reduction", "softmax", None, None),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, at::native::(anonymous namespace)::SoftMaxForwardEpilogue>(float*, float const*, int)", "reduction", "softmax", None, None),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForwardSmem<8, c10::Half, float, c10::Half, at::native::(anonymous namespace)::SoftMaxForwardEpilogue, long>(c10::Half*)", "reduction", "softmax", None, None),
    # norm
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float, false>(int, float)", "reduction", "norm", None, None),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float, false>(int, float, c10::Half const*)", "reduction", "norm", None, None),
    # pool
    ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::Half>(Params)", "reduction", "pool", None, None),
    ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::Half, int>(c10::Half const*, int)", "reduction", "pool", None, None),
    # reduction
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half, true, false, false>(Params)", "reduction", "reduction", None, None),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(Params)", "reduction", "reduction", None, None),
    ("triton_red_fused_add_native_layer_norm_4", "reduction", "reduction", None, None),
    ("triton_red_fused_native_layer_norm_add_3", "reduction", "reduction", None, None),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int, float, 4, 4> >", "reduction", "reduction", None, None),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half, false, true, false>(cublasLt::cublasSplitKParams<float>)", "reduction", "reduction", None, None),
    # cat
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 4, 64, 64>(Params)", "copy", "cat", None, None),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::(anonymous namespace)::OpaqueType<2u>, unsigned int, 3, 128, 1>(OpaqueType<2u>*)", "copy", "cat", None, None),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at::native::(anonymous namespace)::OpaqueType<2u>, unsigned int, 3, 128, 1, 16, 8>(char*)", "copy", "cat", None, None),
    # gather
    ("void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(Params)", "copy", "gather", None, None),
    ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::Half, long, unsigned int, 2, 2, -2, true>(Params)", "copy", "gather", None, None),
    ("void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long, long, long, bool)", "copy", "gather", None, None),
    ("void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>(at::cuda::detail::TensorInfo<float, unsigned int>)", "copy", "gather", None, None),
    # index
    ("void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_put_kernel_impl<at::native::OpaqueType<2> >()>", "copy", "index", None, None),
    ("void at_cuda_detail::cub::DeviceSelectSweepKernel<at_cuda_detail::cub::detail::device_select_policy_hub<long, bool, int, false, false> >", "copy", "index", None, None),
    # memory
    ("Memcpy DtoD (Device -> Device)", "copy", "memory", None, None),
    ("Memset (Device)", "copy", "memory", None, None),
    # collective
    ("ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "other", "collective", None, None),
    # other
    ("__myl_AddResMulMeaSubMulMeaAddSqrDivMulMulAdd_myl0_3", "other", "other", None, None),
    ("my_kernel", "other", "other", None, None),
    ("", "other", "other", None, None),
    ("my_own_kernel(float*)", "other", "other", None, None),
    # random, sort
    ("void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4, at::native::templates::cuda::uniform_and_transform<float> >(long)", "pointwise", "random", None, None),
    ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(Params)", "reduction", "sort", None, None),
    ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::DeviceRadixSortPolicy<float, long, int> >(Params)", "reduction", "sort", None, None),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::WelfordOps<float, float, int, std::pair<float, float> >, unsigned int, float, 2, 4> >(Params)", "reduction", "reduction", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected", "what", "tensor", "multiplies"), NAMES, ids=[n[0][:60] for n in NAMES])
def test_a_kernel_is_known_by_its_name(name, expected, what, tensor, multiplies):
    assert (kernel_class(name), kind(name), on_tensor_cores(name), dtype(name)) == (expected, what, tensor, multiplies)


def test_every_class_and_kind_has_a_name_here_and_every_pattern_a_kind():
    assert {kernel_class(name) for name, *_ in NAMES} == set(CLASSES) == {*KINDS.values(), "tensor-core product"}
    assert {kind(name) for name, *_ in NAMES} == set(KINDS)
    assert {found for found, _, _ in PATTERNS} == set(KINDS)


def test_only_products_and_attention_have_units_and_a_dtype():
    assert {found for found, tensor, _ in PATTERNS if tensor is not None} == {"product", "attention"}
    assert all(tensor is None and multiplies is None for _, _, what, tensor, multiplies in NAMES if what not in ("product", "attention"))


def test_products_are_products_whatever_computes_them():
    assert is_product("ampere_sgemm_128x64_tn") and is_product("nvjet_hsh_8x8") and is_product("triton_tem_fused_mm_0")
    assert not is_product("triton_poi_fused_mm_0")


def test_only_what_a_compiler_wrote_counts_as_fused():
    assert is_fused("triton_poi_fused_add_0") and is_fused("__myl_AddMul_myl0_1")
    assert not is_fused("void at::native::vectorized_elementwise_kernel<4, x>(int)") and not is_fused("triton_matmul_of_mine")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x128_8x4_tn_align1>(T1::Params)",
            "cutlass_80_simt_sgemm_128x128_8x4_tn_align1",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >(int)",
            "vectorized_elementwise_kernel<CUDAFunctor_add>",
        ),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>(float*)", "cunn_SoftMaxForward"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"),
        ("", ""),
    ],
)
def test_a_short_name_fits_a_line_and_keeps_what_tells_kernels_apart(name, expected):
    assert short(name) == expected
