"""Convolutional networks for images of 224 × 224."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

from . import TORCHVISION, Architecture, floats
from .arithmetic import conv, linear, out

IMAGE, CLASSES = 224, 1000


def resnet_stages(depths: tuple[int, ...], height: int, width: int) -> float:
    """Bottleneck ResNet without its classifier: stem, then 1×1, 3×3 (which strides), 1×1 a block, and a 1×1 shortcut where a stage begins."""
    height, width = out(height, 7, 2, 3), out(width, 7, 2, 3)
    total = conv(height * width, 3, 64, 49)
    height, width = out(height, 3, 2, 1), out(width, 3, 2, 1)
    n_in = 64
    for stage, depth in enumerate(depths):
        n_out = 256 * 2**stage
        inner = n_out // 4
        for block in range(depth):
            before = height * width
            if block == 0 and stage > 0:
                height, width = out(height, 3, 2, 1), out(width, 3, 2, 1)
            after = height * width
            total += conv(before, n_in, inner, 1) + conv(after, inner, inner, 9) + conv(after, inner, n_out, 1)
            total += conv(after, n_in, n_out, 1) if block == 0 else 0.0
            n_in = n_out
    return total


def resnet50() -> Architecture:
    depths = (3, 4, 6, 3)
    return Architecture(
        name="ResNet-50",
        shows="strided bottlenecks and shortcuts",
        build=lambda: hf.ResNetForImageClassification(hf.ResNetConfig(depths=list(depths), num_labels=CLASSES)),
        args=(floats(1, 3, IMAGE, IMAGE),),
        hand=resnet_stages(depths, IMAGE, IMAGE) + linear(1, 2048, CLASSES),
        published=2 * 4.089e9,
        source=TORCHVISION,
    )


def regnet() -> Architecture:
    widths, depths, group, stem = (32, 64, 160, 400), (1, 2, 7, 12), 16, 32
    side = out(IMAGE, 3, 2, 1)
    hand, n_in = conv(side**2, 3, stem, 9), stem
    for width, depth in zip(widths, depths, strict=True):
        for block in range(depth):
            before = side
            if block == 0:
                side = out(side, 3, 2, 1)
            hand += conv(before**2, n_in, width, 1) + conv(side**2, width, width, 9, groups=width // group) + conv(side**2, width, width, 1)
            hand += conv(side**2, n_in, width, 1) if block == 0 else 0.0
            n_in = width
    return Architecture(
        name="RegNetX-400MF",
        shows="grouped convolutions",
        build=lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(
                embedding_size=stem,
                hidden_sizes=list(widths),
                depths=list(depths),
                groups_width=group,
                layer_type="x",
                num_labels=CLASSES,
            )
        ),
        args=(floats(1, 3, IMAGE, IMAGE),),
        hand=hand + linear(1, widths[-1], CLASSES),
        published=2 * 0.414e9,
        source=TORCHVISION,
    )


def convnext() -> Architecture:
    widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    side = IMAGE // 4
    hand = conv(side**2, 3, widths[0], 16)
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            side //= 2
            hand += conv(side**2, widths[stage - 1], width, 4)
        hand += depth * (conv(side**2, width, width, 49, groups=width) + linear(side**2, width, 4 * width, width))
    return Architecture(
        name="ConvNeXt-T",
        shows="depthwise 7×7",
        build=lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=list(widths), depths=list(depths), num_labels=CLASSES)
        ),
        args=(floats(1, 3, IMAGE, IMAGE),),
        hand=hand + linear(1, widths[-1], CLASSES),
        published=2 * 4.456e9,
        source=TORCHVISION,
    )


def inverted(side: int, n_in: int, n_out: int, expand: int, kernel: int, stride: int, squeeze: int = 0) -> tuple[float, int]:
    """MobileNetV2's block: widen, depthwise, (squeeze and excite on one pooled position,) narrow. -> FLOPs, output side."""
    inner, after = n_in * expand, -(-side // stride)
    total = conv(side**2, n_in, inner, 1) if expand > 1 else 0.0
    total += conv(after**2, inner, inner, kernel**2, groups=inner) + conv(after**2, inner, n_out, 1)
    return total + (linear(1, inner, squeeze, inner) if squeeze else 0.0), after


def mobilenet_v2() -> Architecture:
    # The paper's table 2: expansion, channels, repeats, first stride.
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    side = IMAGE // 2
    hand, n_in = conv(side**2, 3, 32, 9), 32
    for expand, n_out, repeats, stride in stages:
        for block in range(repeats):
            flops, side = inverted(side, n_in, n_out, expand, 3, stride if block == 0 else 1)
            hand, n_in = hand + flops, n_out
    return Architecture(
        name="MobileNetV2",
        shows="inverted residuals",
        build=lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(num_labels=CLASSES)),
        args=(floats(1, 3, IMAGE, IMAGE),),
        hand=hand + conv(side**2, 320, 1280, 1) + linear(1, 1280, CLASSES),
        published=2 * 0.301e9,
        source=TORCHVISION,
    )


def efficientnet() -> Architecture:
    # The paper's table 1: expansion, kernel, channels, repeats, first stride.
    stages = (
        (1, 3, 16, 1, 1),
        (6, 3, 24, 2, 2),
        (6, 5, 40, 2, 2),
        (6, 3, 80, 3, 2),
        (6, 5, 112, 3, 1),
        (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    )
    side = IMAGE // 2
    hand, n_in = conv(side**2, 3, 32, 9), 32
    for expand, kernel, n_out, repeats, stride in stages:
        for block in range(repeats):
            flops, side = inverted(side, n_in, n_out, expand, kernel, stride if block == 0 else 1, squeeze=n_in // 4)
            hand, n_in = hand + flops, n_out
    return Architecture(
        name="EfficientNet-B0",
        shows="squeeze and excite on one pooled position",
        build=lambda: hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=IMAGE, num_labels=CLASSES)
        ),
        args=(floats(1, 3, IMAGE, IMAGE),),
        hand=hand + conv(side**2, 320, 1280, 1) + linear(1, 1280, CLASSES),
        published=2 * 0.386e9,
        source=TORCHVISION,
    )


class UNet(nn.Module):
    """Two levels down and up: convolutions, transposed convolutions, skips joined by channels."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bottom = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.up_bottom = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join_down = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, classes, H, W]; H and W multiples of 4."""
        first = self.first(image).relu()
        down = self.down(nn.functional.max_pool2d(first, 2)).relu()
        bottom = self.bottom(nn.functional.max_pool2d(down, 2)).relu()
        up = self.join_down(torch.cat([self.up_bottom(bottom), down], 1)).relu()
        head: torch.Tensor = self.head(self.join(torch.cat([self.up(up), first], 1)).relu())
        return head


def unet() -> Architecture:
    width, classes, side, batch = 24, 5, 96, 2
    full, half, quarter = (batch * (side // step) ** 2 for step in (1, 2, 4))
    return Architecture(
        name="U-Net",
        shows="transposed convolutions: each input position gives one multiply-add a tap",
        build=lambda: UNet(width, classes),
        args=(floats(batch, 3, side, side),),
        hand=conv(full, 3, width, 9)
        + conv(half, width, 2 * width, 9)
        + conv(quarter, 2 * width, 4 * width, 9)
        + conv(quarter, 4 * width, 2 * width, 4)
        + conv(half, 4 * width, 2 * width, 9)
        + conv(half, 2 * width, width, 16)
        + conv(full, 2 * width, width, 9)
        + conv(full, width, classes, 1),
    )


ROWS = (resnet50, regnet, convnext, mobilenet_v2, efficientnet, unet)
