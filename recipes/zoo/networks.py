"""Sizes -> the twenty modules, with transformers' own classes where it has them. Without arguments they are those of the published model; tests pass smaller ones.

Models that write text have no vocabulary's projection: its logits would be gigabytes at a large batch, and every one is compared with a reference. None keeps a cache.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from recipes.zoo.unet import UNet

SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
"""No token stands for padding: with one, transformers reads the ids back to the host in every call, to warn of it."""
RESIDUAL_SCALE = 0.25
"""Of the last batch norm of a residual branch, as training leaves it: at the untrained 1 every block doubles the variance, and fp16 ends at 65504."""


def damped(model: nn.Module, *ends: str) -> nn.Module:
    """The batch norms whose names end so, scaled. At least one has to be there."""
    found = [module for name, module in model.named_modules() if name.endswith(ends) and isinstance(module, nn.BatchNorm2d)]
    assert found, f"no batch norm is called {ends}"
    for module in found:
        nn.init.constant_(module.weight, RESIDUAL_SCALE)
    return model


def settled(model: nn.Module, side: int) -> nn.Module:
    """Batch norms that know the statistics of four random images of side x side, as trained ones know their data's.

    At the first 0 and 1, the signal of a deep narrow network ends below the least number of fp16, and nothing is left to verify. On one thread: sums in another order would
    make other weights in another process.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # drawn as He et al. do: of 0.02, little more than the norms' epsilon would be left
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before, threads = [norm.momentum for norm in norms], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for norm in norms:
            nn.init.ones_(norm.weight)  # transformers draws EfficientNet's from a normal of 0.02
            norm.train().momentum = 1.0
        with torch.no_grad():
            model(torch.randn(4, 3, side, side))
    finally:
        torch.set_num_threads(threads)
    for norm, momentum in zip(norms, before, strict=True):
        norm.eval().momentum = momentum
    return model


def resnet(**sizes: Any) -> nn.Module:
    """ResNet-50, strides in the 3x3 as in torchvision."""
    given: dict[str, Any] = {"depths": [3, 4, 6, 3], "num_labels": 1000, **sizes}
    return damped(hf.ResNetForImageClassification(hf.ResNetConfig(**given)), "layer.2.normalization")


def regnet(**sizes: Any) -> nn.Module:
    """RegNetY-4GF: grouped convolutions, squeeze and excite."""
    given: dict[str, Any] = {
        "embedding_size": 32,
        "hidden_sizes": [128, 192, 512, 1088],
        "depths": [2, 6, 12, 2],
        "groups_width": 64,
        "layer_type": "y",
        "num_labels": 1000,
        **sizes,
    }
    return damped(hf.RegNetForImageClassification(hf.RegNetConfig(**given)), "layer.3.normalization")


def convnext(**sizes: Any) -> nn.Module:
    """ConvNeXt-T."""
    given: dict[str, Any] = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "num_labels": 1000, **sizes}
    # Scaled as training leaves it: at the first 1e-6 the blocks add nothing that a check could see.
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**{"layer_scale_init_value": RESIDUAL_SCALE, **given}))


def mobilenet(side: int = 224, **sizes: Any) -> nn.Module:
    """MobileNetV2 at width 1."""
    return settled(hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(**{"num_labels": 1000, **sizes})).eval(), side)


def efficientnet(**sizes: Any) -> nn.Module:
    """EfficientNet-B0."""
    given: dict[str, Any] = {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": 1280,
        "image_size": 224,
        "num_labels": 1000,
        **sizes,
    }
    return settled(hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**given)).eval(), given["image_size"])


def vit(**sizes: Any) -> nn.Module:
    """ViT-B/16."""
    return hf.ViTForImageClassification(hf.ViTConfig(**{"num_labels": 1000, **sizes}))


def swin(**sizes: Any) -> nn.Module:
    """Swin-T."""
    given: dict[str, Any] = {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 7,
        "patch_size": 4,
        "image_size": 224,
        "num_labels": 1000,
        **sizes,
    }
    return hf.SwinForImageClassification(hf.SwinConfig(**given))


def segformer(**sizes: Any) -> nn.Module:
    """SegFormer-B0 with the 150 classes of ADE20K."""
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**{"num_labels": 150, **sizes}))


def detr(depths: tuple[int, ...] = (3, 4, 6, 3), hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048), **sizes: Any) -> nn.Module:
    """DETR over a ResNet-50."""
    backbone = hf.ResNetConfig(depths=list(depths), hidden_sizes=list(hidden_sizes), out_features=["stage4"])
    given: dict[str, Any] = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": backbone,
        "num_labels": 91,
        **sizes,
    }
    model = hf.DetrForObjectDetection(hf.DetrConfig(**given))
    # DETR freezes its batch norms: a class of its own, found by its name.
    for name, module in model.named_modules():
        if name.endswith("layer.2.normalization"):
            nn.init.constant_(module.weight, RESIDUAL_SCALE)
    return model


def clip(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, projection: int = 512) -> nn.Module:
    """CLIP ViT-B/32: a tower for texts, one for images."""
    return hf.CLIPModel(hf.CLIPConfig(text_config=dict(text or {}), vision_config=dict(vision or {}), projection_dim=projection))


def bert(**sizes: Any) -> nn.Module:
    """BERT-base, with the pooler."""
    return hf.BertModel(hf.BertConfig(**sizes))


def deberta(**sizes: Any) -> nn.Module:
    """DeBERTa-v3-base: disentangled attention over 256 buckets of distances."""
    given: dict[str, Any] = {
        "vocab_size": 128100,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "relative_attention": True,
        "position_buckets": 256,
        "max_relative_positions": -1,
        "max_position_embeddings": 512,
        "position_biased_input": False,
        "pad_token_id": None,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        **sizes,
    }
    return hf.DebertaV2Model(hf.DebertaV2Config(**given))


def gpt2(**sizes: Any) -> nn.Module:
    """GPT-2 small."""
    return hf.GPT2Model(hf.GPT2Config(**{"use_cache": False, **SPECIAL, **sizes}))


def llama(**sizes: Any) -> nn.Module:
    """SmolLM2-360M: a small Llama, 15 heads over 5."""
    given: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "use_cache": False,
        **SPECIAL,
        **sizes,
    }
    return hf.LlamaModel(hf.LlamaConfig(**given))


def moe(**sizes: Any) -> nn.Module:
    """Granite 3.0 1B-A400M, 8 of its 24 layers: each token through 8 of 32 experts."""
    given: dict[str, Any] = {
        "vocab_size": 49155,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "use_cache": False,
        **SPECIAL,
        **sizes,
    }
    return hf.GraniteMoeModel(hf.GraniteMoeConfig(**given))


def t5(**sizes: Any) -> nn.Module:
    """T5-base (v1.0)."""
    given: dict[str, Any] = {
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 32128,
        "decoder_start_token_id": 0,
        "use_cache": False,
        **sizes,
    }
    return hf.T5Model(hf.T5Config(**given))


def whisper(**sizes: Any) -> nn.Module:
    """Whisper small: thirty seconds of sound, and the tokens written so far."""
    given: dict[str, Any] = {
        "d_model": 768,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "vocab_size": 51865,
        "use_cache": False,
        **sizes,
    }
    return hf.WhisperModel(hf.WhisperConfig(**given))


def wav2vec2(**sizes: Any) -> nn.Module:
    """wav2vec 2.0 base."""
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**sizes))


def unet(widths: tuple[int, ...] = (320, 640, 1280), context: int = 768, head: int = 40, groups: int = 32) -> nn.Module:
    """Stable Diffusion 1.5's UNet without its lowest level."""
    return UNet(widths, context, head, groups)


class Tagger(nn.Module):
    """Tokens -> a label each, by a bidirectional LSTM."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, labels)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N, S] -> [N, S, labels]."""
        labels: torch.Tensor = self.head(self.lstm(self.embedding(input_ids))[0])
        return labels


def lstm(vocabulary: int = 100000, width: int = 300, hidden: int = 512, layers: int = 2, labels: int = 50) -> nn.Module:
    """A tagger over word vectors of 300, two layers of 512 each way."""
    return Tagger(vocabulary, width, hidden, layers, labels)
