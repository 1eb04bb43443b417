"""Op name -> known to hold no products: element-wise ops, gathers, copies, norms, pooling and the like, whose whole cost is bytes."""

from __future__ import annotations

KNOWN_ZERO = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _add_relu _aminmax _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _functional_assert_scalar
    _batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional _chunk_cat _coalesce _copy_from _copy_from_and_resize _cummax_helper _cummin_helper
    _efficientzerotensor _embedding_bag _embedding_bag_forward_only _fill_mem_eff_dropout_mask_ _index_put_impl _index_put_impl_ _is_all_true _is_any_true
    _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward _lazy_clone _local_scalar_dense _log_softmax _logcumsumexp _masked_scale _masked_softmax _mkldnn_reshape
    _mkldnn_transpose _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _new_zeros_with_same_feature_meta _nnz
    _pack_padded_sequence _pin_memory _prelu_kernel _print _reshape_copy _resize_output _resize_output_ _safe_softmax _softmax _stack _thnn_fused_gru_cell
    _thnn_fused_lstm_cell _to_copy _to_cpu _to_dense _transform_bias_rescale_qkv _unique _unique2 _unsafe_index _unsafe_index_put _unsafe_masked_index
    _unsafe_masked_index_put_accumulate _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm_interface _nested_tensor_from_mask _nested_tensor_from_mask_left_aligned _convert_weight_to_int4pack
    _convert_weight_to_int4pack_for_cpu _grid_sampler_2d_cpu_fallback _cudnn_rnn_flatten_weight _cudnn_init_dropout_state _use_cudnn_ctc_loss
    adaptive_max_pool2d adaptive_max_pool3d affine_grid_generator allclose arange as_strided_ as_strided_scatter avg_pool2d avg_pool3d batch_norm_elemt bernoulli
    bincount block_diag bucketize cat cauchy channel_shuffle clone col2im complex constant_pad_nd copy copy_ cudnn_affine_grid_generator cudnn_batch_norm
    cudnn_grid_sampler cummax cummin cumprod cumsum detach_ diag_embed diagonal_scatter dist embedding embedding_renorm empty empty_like empty_permuted empty_strided
    equal exponential eye fft_fftfreq fft_rfftfreq fill flip from_file full full_like gather geometric glu grid_sampler_2d grid_sampler_3d hann_window hamming_window
    bartlett_window blackman_window kaiser_window histc im2col index index_add index_copy index_fill index_put index_reduce index_select is_pinned is_same_size isin item
    kthvalue lift lift_fresh linalg_cross linspace log_normal log_sigmoid_forward logcumsumexp logspace masked_fill masked_scatter masked_select max_pool2d_with_indices
    max_pool3d_with_indices max_unpool2d max_unpool3d median miopen_batch_norm mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d mkldnn_max_pool3d
    mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight mode multinomial nanmedian native_batch_norm native_dropout native_group_norm native_layer_norm native_norm
    new_empty new_empty_strided new_full new_ones new_zeros nonzero nonzero_static normal normal_functional ones ones_like pixel_shuffle pixel_unshuffle poisson polar put
    rand rand_like randint randint_like randn randn_like random randperm record_stream reflection_pad1d reflection_pad2d reflection_pad3d renorm repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d resize resize_ resize_as resize_as_ roll rot90 rrelu_with_noise rrelu_with_noise_functional rsub
    scalar_tensor scatter scatter_add scatter_reduce searchsorted segment_reduce select_scatter set set_ slice_scatter sort squeeze_ stack t_ take to_mkldnn
    to_padded_tensor topk trace transpose_ tril tril_indices triu triu_indices uniform unique_consecutive unique_dim unique_dim_consecutive unsafe_split
    unsafe_split_with_sizes unsqueeze_ upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d var_mean std_mean view_as_complex view_as_real zero zeros zeros_like _fused_rms_norm rms_norm _local_scalar_dense dropout feature_dropout
    bernoulli_ to contiguous reshape type_as float half detach alias _has_compatible_shallow_copy_type lift_fresh_copy argsort one_hot
    hardswish gelu mish threshold glu_jvp floor_divide heaviside gcd lcm copysign abs eq ge gt le lt ne xlogy __irshift__ __ilshift__
    """.split()
)
"""ATen ops without products that carry no tag saying so. Moved bytes are their whole cost."""

ZERO_NAMESPACES = frozenset({"prim", "prims", "quantized_decomposed", "c10d_functional", "_c10d_functional"})
"""Namespaces without products: element-wise primitives, quantise and dequantise, collectives."""
NOT_ZERO = frozenset(
    {
        "prims::svd",
        "prims::fft_c2c",
        "prims::fft_r2c",
        "prims::fft_c2r",
        "quantized_decomposed::mixed_mm",
        "quantized_decomposed::mixed_linear",
    }
)
"""Their exceptions: products, with a formula or without."""
ZERO_ELSEWHERE = frozenset(
    {
        "torchvision::nms",
        "torchvision::roi_align",
        "torchvision::roi_pool",
        "torchvision::ps_roi_align",
        "torchvision::ps_roi_pool",
        "mkldnn::_reorder_linear_weight",
        "mkldnn::_reorder_convolution_weight",
        "quantized::add",
        "quantized::mul",
        "quantized::add_relu",
        "quantized::cat",
        "aten::quantize_per_tensor",
        "aten::quantize_per_channel",
        "aten::quantize_per_tensor_dynamic",
        "aten::dequantize",
        "profiler::_record_function_enter_new",
        "profiler::_record_function_exit",
    }
)
