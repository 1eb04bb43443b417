"""Sizes -> FLOPs on paper: what the hand counts are written in. 2 a multiply-add, biases and everything element-wise left out."""

from __future__ import annotations

from itertools import pairwise


def linear(rows: float, *widths: int) -> float:
    """`rows` vectors through a chain of matrices: `linear(tokens, d, 4 * d, d)` is a feed-forward block."""
    return 2.0 * rows * sum(n_in * n_out for n_in, n_out in pairwise(widths))


def attention(batch: float, queries: int, keys: int, width: int) -> float:
    """Scores and mixture over `width` = heads · head width; each query meets each key, whatever mask or window says."""
    return 2.0 * batch * queries * keys * width * 2


def conv(positions: float, n_in: int, n_out: int, taps: int, groups: int = 1) -> float:
    """`positions` = batch · output size; `taps` = the kernel's area. Depthwise: groups = n_in."""
    return 2.0 * positions * n_out * (n_in // groups) * taps


def encoder_layer(batch: int, length: int, width: int, feed: int) -> float:
    """The Transformer's own layer: q, k, v and output projections, attention, two matrices of feed-forward."""
    tokens = batch * length
    return 4 * linear(tokens, width, width) + attention(batch, length, length, width) + linear(tokens, width, feed, width)


def decoder_layer(batch: int, length: int, source: int, width: int, feed: int) -> float:
    """The same with cross attention, whose keys and values are projected from the `source` positions of the encoder."""
    cross = 2 * linear(batch * length, width, width) + 2 * linear(batch * source, width, width)
    return encoder_layer(batch, length, width, feed) + cross + attention(batch, length, source, width)


def out(size: int, kernel: int, stride: int, padding: int) -> int:
    """Output size of a convolution along one axis."""
    return (size + 2 * padding - kernel) // stride + 1
