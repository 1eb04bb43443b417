"""Transformers that see."""

from __future__ import annotations

from typing import Any

import transformers as hf

from . import TORCHVISION, Architecture, convnets, floats, tokens
from .arithmetic import attention, conv, decoder_layer, encoder_layer, linear, out

CLASSES = 1000
LABELS: dict[str, Any] = {"num_labels": CLASSES}


def vit() -> Architecture:
    layers, width, heads, feed, patch, image = 12, 768, 12, 3072, 16, 224
    patches = (image // patch) ** 2
    return Architecture(
        name="ViT-B/16",
        shows="a convolution that cuts patches, a class token",
        build=lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                num_hidden_layers=layers,
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=feed,
                patch_size=patch,
                image_size=image,
                **LABELS,
            )
        ),
        args=(floats(1, 3, image, image),),
        hand=conv(patches, 3, width, patch**2) + layers * encoder_layer(1, patches + 1, width, feed) + linear(1, width, CLASSES),
        published=2 * 17.564e9,
        source=TORCHVISION,
    )


def deit() -> Architecture:
    batch, layers, width, heads, feed, patch, image = 2, 2, 384, 6, 1536, 16, 224
    patches = (image // patch) ** 2
    return Architecture(
        name="DeiT-S, distilled",
        shows="two extra tokens, two heads",
        build=lambda: hf.DeiTForImageClassificationWithTeacher(
            hf.DeiTConfig(
                num_hidden_layers=layers,
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=feed,
                patch_size=patch,
                image_size=image,
                **LABELS,
            )
        ),
        args=(floats(batch, 3, image, image),),
        hand=conv(batch * patches, 3, width, patch**2)
        + layers * encoder_layer(batch, patches + 2, width, feed)
        + 2 * linear(batch, width, CLASSES),
    )


def swin() -> Architecture:
    width, depths, heads, window, patch, image = 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 4, 224
    side = image // patch
    hand = conv(side**2, 3, width, patch**2)
    channels = width
    for stage, depth in enumerate(depths):
        windows = (side // window) ** 2
        hand += depth * encoder_layer(windows, window**2, channels, 4 * channels)
        if stage < len(depths) - 1:
            side //= 2
            hand += linear(side**2, 4 * channels, 2 * channels)  # four neighbours merged
            channels *= 2
    return Architecture(
        name="Swin-T",
        shows="attention in windows, shifted ones too; patches merged between stages",
        build=lambda: hf.SwinForImageClassification(
            hf.SwinConfig(embed_dim=width, depths=depths, num_heads=heads, window_size=window, patch_size=patch, image_size=image, **LABELS)
        ),
        args=(floats(1, 3, image, image),),
        hand=hand + linear(1, channels, CLASSES),
        published=2 * 4.491e9,
        source=TORCHVISION,
    )


def segformer() -> Architecture:
    image, classes, head = 512, 150, 256
    widths, depths, reductions, kernels, strides = (32, 64, 160, 256), (1, 1, 1, 1), (8, 4, 2, 1), (7, 3, 3, 3), (4, 2, 2, 2)
    hand, side, n_in = 0.0, image, 3
    for width, depth, reduction, kernel, stride in zip(widths, depths, reductions, kernels, strides, strict=True):
        side = out(side, kernel, stride, kernel // 2)
        here, feed = side**2, 4 * width
        keys = (side // reduction) ** 2
        hand += conv(here, n_in, width, kernel**2)
        shrink = conv(keys, width, width, reduction**2) if reduction > 1 else 0.0
        attend = 2 * linear(here, width, width) + 2 * linear(keys, width, width) + attention(1, here, keys, width)
        mix = linear(here, width, feed, width) + conv(here, feed, feed, 9, groups=feed)
        hand += depth * (shrink + attend + mix) + linear(here, width, head)
        n_in = width
    largest = (image // 4) ** 2
    return Architecture(
        name="SegFormer-B0",
        shows="keys and values from a shrunken map, depthwise convolution inside the feed-forward, an all-linear head",
        build=lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=list(widths),
                depths=list(depths),
                sr_ratios=list(reductions),
                patch_sizes=list(kernels),
                strides=list(strides),
                num_attention_heads=[1, 2, 5, 8],
                mlp_ratios=[4, 4, 4, 4],
                decoder_hidden_size=head,
                num_labels=classes,
            )
        ),
        args=(floats(1, 3, image, image),),
        hand=hand + linear(largest, 4 * head, head) + linear(largest, head, classes),
    )


def detr() -> Architecture:
    height, across, width, heads, feed, queries, layers, labels = 256, 320, 256, 8, 2048, 50, 2, 91
    depths = (1, 1, 1, 1)
    backbone = convnets.resnet_stages(depths, height, across)
    cells = (height // 32) * (across // 32)
    return Architecture(
        name="DETR",
        shows="a convolutional backbone under an encoder-decoder; learned queries",
        build=lambda: hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=hf.ResNetConfig(depths=list(depths), out_features=["stage4"]),
                d_model=width,
                encoder_layers=layers,
                decoder_layers=layers,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=feed,
                decoder_ffn_dim=feed,
                num_queries=queries,
                num_labels=labels,
            )
        ),
        args=(floats(1, 3, height, across),),
        hand=backbone
        + linear(cells, 2048, width)
        + layers * (encoder_layer(1, cells, width, feed) + decoder_layer(1, queries, cells, width, feed))
        + linear(queries, width, labels + 1)
        + linear(queries, width, width, width, 4),
    )


def clip() -> Architecture:
    texts, images, length, layers = 3, 2, 77, 2
    width, heads, feed, seen, seen_heads, seen_feed, patch, image, common = 512, 8, 2048, 768, 12, 3072, 32, 224, 512
    patches = (image // patch) ** 2
    text = layers * encoder_layer(texts, length, width, feed) + linear(texts, width, common)
    sight = (
        conv(images * patches, 3, seen, patch**2)
        + layers * encoder_layer(images, patches + 1, seen, seen_feed)
        + linear(images, seen, common)
    )
    return Architecture(
        name="CLIP",
        shows="two towers of different widths and batches, then every text against every image",
        build=lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={
                    "num_hidden_layers": layers,
                    "hidden_size": width,
                    "num_attention_heads": heads,
                    "intermediate_size": feed,
                    "vocab_size": 997,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
                vision_config={
                    "num_hidden_layers": layers,
                    "hidden_size": seen,
                    "num_attention_heads": seen_heads,
                    "intermediate_size": seen_feed,
                    "patch_size": patch,
                    "image_size": image,
                },
                projection_dim=common,
            )
        ),
        kwargs={"input_ids": tokens(texts, length), "pixel_values": floats(images, 3, image, image)},
        hand=text + sight + linear(texts, common, images),
    )


ROWS = (vit, deit, swin, segformer, detr, clip)
