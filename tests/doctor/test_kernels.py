"""Names as CUPTI reports them (torch 2.11 to 2.13, cuBLAS 12 and 13, cuDNN 9, CUTLASS, Triton, flash attention, older cards) -> what the table says of them."""

from __future__ import annotations

import pytest

from gpuopt.doctor import kernels

AT = "void at::native::"
ANON = "void at::native::(anonymous namespace)::"

PRODUCTS = {
    # name: (uses tensor cores, dtype)
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize256x64x8_stage3_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas": (
        False,
        "float32",
    ),
    "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize128x128x8_stage3_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel__51_cublas": (
        False,
        "float32",
    ),
    "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas": (True, "tf32"),
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas": (
        True,
        "bfloat16",
    ),
    "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas": (True, "float16"),
    "sm90_xmma_gemm_f64f64_f64f64_f64_nn_n_tilesize64x128x16_stage3_tensor16x8x8_kernel": (True, "float64"),
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": (True, "float16"),
    "nvjet_hss_64x8_64x16_1x1_v_bz_splitK_NNT": (True, "float16"),
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN": (True, "bfloat16"),
    "nvjet_sm90_hss_64x8_64x16_1x1_h_bz_splitK_NNT": (True, "float16"),
    "nvjet_sm100_tst_64x32_64x16_2x1_2cta_v_bz_TNN": (True, "bfloat16"),
    "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn": (True, "float16"),
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": (True, "bfloat16"),
    "volta_fp16_s884gemm_fp16_128x128_ldg8_f2f_tn": (True, "float16"),
    "turing_fp16_s1688gemm_fp16_256x128_ldg8_f2f_tn": (True, "float16"),
    "ampere_sgemm_128x64_tn": (False, "float32"),
    "ampere_sgemm_64x32_sliced1x4_tn": (False, "float32"),
    "volta_sgemm_128x64_nn": (False, "float32"),
    "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x128_8x4_tn_align1>(T1::Params)": (False, "float32"),
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x3_nn_align4>(cutlass_80_tensorop_s1688gemm_256x128_16x3_nn_align4::Params)": (
        True,
        "tf32",
    ),
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>(cutlass_80_wmma_tensorop::Params)": (
        True,
        "float16",
    ),
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>(cutlass_80_wmma_tensorop::Params)": (
        True,
        "bfloat16",
    ),
    "void cutlass::Kernel2<cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1>(cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1::Params)": (
        True,
        "float64",
    ),
    "cutlass3x_sm100_simt_sgemm_f32_f32_f32_f32_f32_64x32x16_1x1x1_3_ntn_align1_bias_f32_relu": (False, "float32"),
    "std::enable_if<!T7, void>::type internal::gemvx::kernel<int, int, __half, __half, __half, float, false, true, true, false, 7, false, "
    "cublasGemvParamsEx<int, cublasGemvTensorStridedBatched<__half const>, float> >": (False, "float16"),
    "std::enable_if<!T7, void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, false, true, true, false, 7>": (
        False,
        "bfloat16",
    ),
    "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false, cublasGemvParamsEx<int> >": (
        False,
        "float32",
    ),
    "void gemmSN_TN_kernel<float, 128, 16, 2, 4, 4, 4, true, cublasGemvTensorStridedBatched<float const> >": (False, "float32"),
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn": (
        True,
        "bfloat16",
    ),
    "sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4_warpsize2x2x1_g1_tensor16x8x8": (
        True,
        "tf32",
    ),
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_256x128_32x3_nhwc_align8>(cutlass_tensorop::Params)": (
        True,
        "float16",
    ),
    "void cutlass_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_256x128_32x3>(cutlass_tensorop_f16::Params)": (
        True,
        "float16",
    ),
    "_5x_cudnn_ampere_scudnn_128x32_relu_interior_nn_v1": (False, "float32"),
    "ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1": (False, "float32"),
    "void implicit_convolve_sgemm<__half, __half, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int, __half const*, int, __half*)": (
        False,
        "float16",
    ),
    "void precomputed_convolve_sgemm<float, 512, 6, 7, 4, 3, 5, 1, false>(int, int, int, float const*)": (False, "float32"),
    f"{ANON}conv_depthwise2d_forward_kernel<3, c10::Half, int>(at::GenericPackedTensorAccessor<c10::Half const, 4ul>)": (False, "float16"),
    "triton_tem_fused_addmm_0": (None, None),
    "triton_tem_fused_mm_3": (None, None),
}
"""`nvjet` is cuBLAS's own generator for Hopper and later: its first letters say input, compute and output (h half, t bfloat16, s single)."""

ATTENTION = {
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t> >(pytorch_flash::Flash_fwd_params)": "bfloat16",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4, false, false, cutlass::half_t> >(pytorch_flash::Flash_fwd_params)": "float16",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "float16",
    "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_3_64x64x128_4x1x1_kernel0_0": "float16",
    "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t, cutlass::arch::Sm80, true, 64, 64, 64>::Params)": "float16",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t, cutlass::arch::Sm80, true>::Params)": "bfloat16",
    "fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float, cutlass::arch::Sm80, true, 64, 64, 64>::Params)": "float32",
    "triton_tem_fused_flex_attention_0": None,
}

OTHERS = {
    "void cudnn::engines_precompiled::nchwToNhwcKernel<float, __half, float, false, true, (cudnnKernelDataType_t)0>(nchw2nhwc_params_t<float>)": "layout",
    "void cudnn::ops::nhwcToNchwKernel<__half, __half, float, true, false, (cudnnKernelDataType_t)0>(nhwc2nchw_params_t<float>, __half const*)": "layout",
    f"{ANON}CatArrayBatchedCopy_aligned16_contig<at::native::(anonymous namespace)::OpaqueType<2u>, unsigned int, 3, 128, 1>(OpaqueType<2u>*)": "cat",
    f"{ANON}CatArrayBatchedCopy_vectorized<at::native::(anonymous namespace)::OpaqueType<2u>, unsigned int, 3, 128, 1, 16, 8>(char*)": "cat",
    f"{AT}elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda()#3}}>": "copy",
    f"{AT}unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda(float)#1}}, std::array<char*, 2ul>, 4, "
    "TrivialOffsetCalculator<1, unsigned int>, at::native::memory::LoadWithCast<1>, at::native::memory::StoreWithCast<1> >(int)": "cast",
    f"{AT}vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda(float)#1}}, std::array<char*, 2ul> >": "cast",
    f"{AT}vectorized_elementwise_kernel<4, at::native::float16_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda(float)#1}}, std::array<char*, 2ul> >": "cast",
    "triton_poi_fused__to_copy_0": "cast",
    f"{AT}vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, at::native::GeluType)::{{lambda()#2}}>": "pointwise",
    f"{AT}vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >(int)": "pointwise",
    f"{AT}vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int)": "pointwise",
    "triton_poi_fused_gelu_view_2": "pointwise",
    "triton_poi_fused_native_layer_norm_convolution_4": "pointwise",
    "triton_poi_fused__to_copy_add_mul_1": "pointwise",
    "triton_red_fused_native_layer_norm_add_3": "reduction",
    "triton_per_fused__softmax_add_7": "softmax",
    "triton_red_fused__safe_softmax__to_copy_add_2": "softmax",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 9, false, false, 32>(float*, float const*, int, int, int, bool const*, int)": "softmax",
    f"{ANON}cunn_SoftMaxForward<4, float, float, float, at::native::(anonymous namespace)::SoftMaxForwardEpilogue>(float*, float const*, int)": "softmax",
    f"{ANON}cunn_SoftMaxForwardSmem<8, c10::Half, float, c10::Half, at::native::(anonymous namespace)::SoftMaxForwardEpilogue, long>(c10::Half*)": "softmax",
    f"{ANON}vectorized_layer_norm_kernel<c10::Half, float, false>(int, float, c10::Half const*)": "norm",
    "void cudnn::bn_fw_inf_1C11_kernel_NCHW<float, float, true, 1>(float, float, cudnnTensorStruct, float const*)": "norm",
    f"{AT}batch_norm_transform_input_channels_last_kernel<c10::Half, float, c10::Half, 4>(c10::Half const*)": "norm",
    f"{AT}vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long, long, long, bool)": "gather",
    f"{ANON}indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>(at::cuda::detail::TensorInfo<float, unsigned int>)": "gather",
    f"{AT}index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_put_kernel_impl<at::native::OpaqueType<2> >()>": "index",
    "void at_cuda_detail::cub::DeviceSelectSweepKernel<at_cuda_detail::cub::detail::device_select_policy_hub<long, bool, int, false, false> >": "index",
    f"{AT}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int, float, 4, 4> >": "reduction",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half, false, true, false>(cublasLt::cublasSplitKParams<float>)": "reduction",
    f"{ANON}max_pool_forward_nhwc<c10::Half, int>(c10::Half const*, int)": "pool",
    "ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collective",
    "Memset (Device)": "memset",
    "my_own_kernel(float*)": "other",
    "": "other",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_says_whether_it_uses_tensor_cores_and_in_which_dtype(name: str) -> None:
    assert kernels.kind(name) == "product"
    assert (kernels.uses_tensor_cores(name), kernels.dtype(name)) == PRODUCTS[name]


@pytest.mark.parametrize("name", ATTENTION)
def test_fused_attention_is_known_whatever_library_made_it(name: str) -> None:
    assert (kernels.kind(name), kernels.dtype(name)) == ("attention", ATTENTION[name])
    assert kernels.uses_tensor_cores(name) is not False


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_has_a_kind_and_no_tensor_cores(name: str) -> None:
    assert kernels.kind(name) == OTHERS[name]
    assert kernels.uses_tensor_cores(name) is None and kernels.dtype(name) is None


def test_a_short_name_fits_a_line_and_keeps_what_tells_kernels_apart() -> None:
    assert (
        kernels.short("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x128_8x4_tn_align1>(T1::Params)")
        == "cutlass_80_simt_sgemm_128x128_8x4_tn_align1"
    )
    add = f"{AT}vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >(int)"
    assert kernels.short(add) == "vectorized_elementwise_kernel<CUDAFunctor_add>"
    assert kernels.short(f"{ANON}cunn_SoftMaxForward<4, float, float, float>(float*)") == "cunn_SoftMaxForward"
    assert kernels.short("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT") == "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"
    assert kernels.short("") == ""
