"""`recipes.zoo.tiny:NAME` -> the same twenty, of the same classes, small enough for a laptop: for rehearsals and tests. Their figures mean nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from gpuopt.models.factory import factory
from recipes.zoo import networks

IMAGE = "pixel_values:float32[N,3,64,64]"
TEXT = "input_ids:int64[N,S]<99"
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@factory(IMAGE)
def resnet50() -> nn.Module:
    return networks.resnet(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=10)


@factory(IMAGE)
def regnet_y_4gf() -> nn.Module:
    return networks.regnet(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=10)


@factory(IMAGE)
def convnext_tiny() -> nn.Module:
    return networks.convnext(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=10)


@factory(IMAGE)
def mobilenet_v2() -> nn.Module:
    return networks.mobilenet(side=64, depth_multiplier=0.1, num_labels=10)


@factory(IMAGE)
def efficientnet_b0() -> nn.Module:
    return networks.efficientnet(width_coefficient=0.2, depth_coefficient=0.3, hidden_dim=256, image_size=64, num_labels=10)


@factory(IMAGE)
def vit_base() -> nn.Module:
    return networks.vit(**LAYERS, image_size=64, patch_size=16, num_labels=10)


@factory(IMAGE)
def swin_tiny() -> nn.Module:
    return networks.swin(embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, image_size=64, num_labels=10)


@factory(IMAGE)
def segformer_b0() -> nn.Module:
    return networks.segformer(
        hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_labels=10
    )


@factory("pixel_values:float32[N,3,64,96]")
def detr_resnet50() -> nn.Module:
    return networks.detr(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 16, 16, 32),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
        num_labels=10,
    )


@factory("input_ids:int64[N,16]<99", IMAGE)
def clip_vit_base() -> nn.Module:
    return networks.clip(
        {**LAYERS, "vocab_size": 99, "max_position_embeddings": 16, **networks.SPECIAL}, {**LAYERS, "image_size": 64, "patch_size": 16}, 16
    )


@factory(TEXT)
def bert_base() -> nn.Module:
    return networks.bert(**LAYERS, vocab_size=99, max_position_embeddings=64)


@factory(TEXT)
def deberta_v3_base() -> nn.Module:
    return networks.deberta(**LAYERS, vocab_size=99, max_position_embeddings=64, position_buckets=8)


@factory(TEXT)
def gpt2() -> nn.Module:
    return networks.gpt2(n_layer=2, n_embd=32, n_head=2, vocab_size=99, n_positions=64)


@factory(TEXT)
def smollm2_360m() -> nn.Module:
    return networks.llama(**LAYERS, num_key_value_heads=1, vocab_size=99)


@factory(TEXT)
def granite_moe() -> nn.Module:
    return networks.moe(**LAYERS, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=99)


@factory(TEXT, "decoder_input_ids:int64[N,8]<99")
def t5_base() -> nn.Module:
    return networks.t5(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=99)


@factory("input_features:float32[N,16,64]", "decoder_input_ids:int64[N,8]<99")
def whisper_small() -> nn.Module:
    return networks.whisper(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=99,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=16,
        **networks.SPECIAL,
        decoder_start_token_id=1,
    )


@factory("input_values:float32[N,1600]")
def wav2vec2_base() -> nn.Module:
    return networks.wav2vec2(**LAYERS, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=32)


@factory("sample:float32[N,4,16,16]", "timestep:int64[N]<1000", "context:float32[N,7,24]")
def diffusion_unet() -> nn.Module:
    return networks.unet((16, 32), context=24, head=8, groups=4)


@factory("input_ids:int64[N,S]<1000")
def lstm_tagger() -> nn.Module:
    return networks.lstm(1000, 16, 24, 2, 5)
