"""Sizes -> a denoising UNet of the kind of Stable Diffusion: residual blocks told the time, self- and cross-attention, skips from the way down."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """[N, Cin, H, W], [N, E] -> [N, Cout, H, W]."""

    def __init__(self, n_in: int, n_out: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm_in, self.conv_in = nn.GroupNorm(groups, n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(time, n_out)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = self.conv_in(F.silu(self.norm_in(x))) + self.time(F.silu(time))[:, :, None, None]
        summed: Tensor = self.shortcut(x) + self.conv_out(F.silu(self.norm_out(inner)))
        return summed


class Attention(nn.Module):
    """[N, S, C] looks at [N, T, D]."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (
            nn.Linear(width, width, bias=False),
            nn.Linear(source, width, bias=False),
            nn.Linear(source, width, bias=False),
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(source), self.v(source)))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Transformer(nn.Module):
    """One block over the pixels, which also looks at the text: [N, C, H, W], [N, T, D] -> [N, C, H, W]."""

    def __init__(self, width: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.GroupNorm(groups, width, eps=1e-6), nn.Linear(width, width), nn.Linear(width, width)
        self.norm_self, self.self_attention = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm_cross, self.cross_attention = nn.LayerNorm(width), Attention(width, context, heads)
        self.norm_feed, self.gate, self.down = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        rows = self.enter(self.norm(x).flatten(2).transpose(1, 2))
        normed = self.norm_self(rows)
        rows = rows + self.self_attention(normed, normed)
        rows = rows + self.cross_attention(self.norm_cross(rows), context)
        value, gate = self.gate(self.norm_feed(rows)).chunk(2, -1)
        rows = rows + self.down(value * F.gelu(gate))
        return x + self.leave(rows).transpose(1, 2).unflatten(2, x.shape[2:])


class UNet(nn.Module):
    """`widths` channels a level, two residual blocks and two attentions a level down, three up; the last level attends in its middle alone."""

    def __init__(self, widths: tuple[int, ...], context: int, head: int, groups: int = 32, channels: int = 4) -> None:
        super().__init__()
        self.width, time = widths[0], 4 * widths[0]
        self.time_in, self.time_out = nn.Linear(self.width, time), nn.Linear(time, time)
        self.first = nn.Conv2d(channels, self.width, 3, padding=1)
        self.down, self.shrink, self.up, self.grow = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips, n_in = [self.width], self.width
        for level, width in enumerate(widths):
            attends = level < len(widths) - 1
            for _ in range(2):
                self.down.append(self._step(n_in, width, time, context, head, groups, attends))
                n_in = width
                skips.append(width)
            if attends:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                Residual(n_in, n_in, time, groups),
                Transformer(n_in, context, n_in // head, groups),
                Residual(n_in, n_in, time, groups),
            ]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(3):
                self.up.append(self._step(n_in + skips.pop(), width, time, context, head, groups, level < len(widths) - 1))
                n_in = width
            if level:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.last = nn.GroupNorm(groups, n_in), nn.Conv2d(n_in, channels, 3, padding=1)

    @staticmethod
    def _step(n_in: int, width: int, time: int, context: int, head: int, groups: int, attends: bool) -> nn.ModuleList:
        parts: list[nn.Module] = [Residual(n_in, width, time, groups)]
        return nn.ModuleList([*parts, Transformer(width, context, width // head, groups)] if attends else parts)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """[N, 4, H, W], int64 [N], [N, T, D] -> the noise, [N, 4, H, W]; H and W multiples of 2 a level."""
        half = self.width // 2
        # In fp32, as everybody does it: at step 1000 an angle in fp16 is off by half a radian. Then in the weights' type.
        slopes = torch.exp(torch.arange(half, device=sample.device, dtype=torch.float32) * (-math.log(10000.0) / half))
        angles = timestep.to(torch.float32)[:, None] * slopes
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(sample.dtype)
        time = self.time_out(F.silu(self.time_in(waves)))
        x = self.first(sample)
        skips = [x]
        for i, step in enumerate(self.down):
            x = self._through(step, x, time, context)
            skips.append(x)
            if i % 2 and i // 2 < len(self.shrink):
                x = self.shrink[i // 2](x)
                skips.append(x)
        x = self.middle[2](self.middle[1](self.middle[0](x, time), context), time)
        for i, step in enumerate(self.up):
            x = self._through(step, torch.cat([x, skips.pop()], 1), time, context)
            if i % 3 == 2 and i // 3 < len(self.grow):
                x = self.grow[i // 3](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        noise: Tensor = self.last(F.silu(self.norm(x)))
        return noise

    @staticmethod
    def _through(step: nn.Module, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        parts = list(step.children())
        x = parts[0](x, time)
        if len(parts) > 1:
            x = parts[1](x, context)
        return x
