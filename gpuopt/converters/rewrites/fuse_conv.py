"""Convolution -> (batch norm folded) -> [+ residual] -> ReLU, as one op that cuDNN runs as one kernel.

A ReLU that is a module of its own and called once becomes an Identity, and the code around it stays. Where the sum with a residual is fused, or one ReLU module
serves several places, the block's forward is written anew from what FX read of it. Batch norms that are still there are folded first: nothing fuses across them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gpuopt.converters import folding
from gpuopt.converters.blocks import DROPOUTS, Block, blocks
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs
from gpuopt.programs.ops.conv import conv_relu

WHAT = "convolution + bias (+ residual) + ReLU as one cuDNN kernel; batch norms are folded first. For channels_last"
APPROXIMATE = False
SETTINGS: tuple[str, ...] = ()

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)
_NONE = "no 2-D convolution of one group is read by a ReLU alone, directly or through a sum, in a forward that FX can follow"


class ConvReLU(nn.Module):
    """A convolution's weights, its ReLU and, where it is called with two tensors, the sum with the second before it. [N, Cin, H, W] -> [N, Cout, H', W']."""

    bias: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = list(conv.stride), _pads(conv), list(conv.dilation)
        self.weight = conv.weight
        if conv.bias is not None:
            self.bias = conv.bias
        else:  # cuDNN's kernel wants one; made once here instead of at every call there
            self.register_buffer("bias", conv.weight.new_zeros(conv.out_channels).detach())
        self.train(conv.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_relu(input, self.weight, self.bias, residual, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={tuple(kernel)}, stride={tuple(self.stride)}, padding={tuple(self.padding)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    conv: fx.Node
    relu: fx.Node
    total: fx.Node | None = None
    """The sum between them."""
    residual: fx.Node | None = None


def applies(module: nn.Module) -> str | None:
    """None where a convolution would be fused, counting those whose batch norm can be folded; else why not."""
    if not any(type(part) is nn.Conv2d for part in module.modules()):
        return "there is no 2-D convolution"
    for block in blocks(module, nn.Conv2d, _is_leaf):
        if next(_matches(block, (nn.BatchNorm2d, *DROPOUTS)), None) is not None:
            return None
    return _NONE


def apply(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
    """Fuse in place; returns how many of how many. `inputs` let folding see which layer feeds which batch norm. Raises Unsupported where nothing fuses."""
    convs = sum(type(part) is nn.Conv2d for part in module.modules())
    notes = []
    if any(type(part) is nn.BatchNorm2d for part in module.modules()):
        notes.append(folding.fold(module, inputs))
    plain, summed = 0, 0
    for block in blocks(module, nn.Conv2d, _is_leaf):
        found = list(_matches(block))
        if any([_fuse(block, match) for match in found]):
            block.rewrite()
        plain += sum(match.residual is None for match in found)
        summed += sum(match.residual is not None for match in found)
    if not plain + summed:
        raise Unsupported(f"nothing to fuse: {_NONE}", fix="leave --rewrite fuse_conv out")
    notes.append(f"of {convs} convolutions {plain} fused with their ReLU, {summed} with a residual and its ReLU")
    return "; ".join(notes)


def _matches(block: Block, through: tuple[type[nn.Module], ...] = ()) -> Iterator[_Match]:
    taken: set[fx.Node] = set()
    for node in block.graph.nodes:
        if not _is_relu(block, node) or not node.args:
            continue
        source = block.source(node.args[0], through)
        if _is_fusable(block, source):
            match = _Match(conv=source, relu=node)
        else:
            found = _summed(block, node, source, through)
            if found is None:
                continue
            match = found
        if match.conv not in taken:
            taken.add(match.conv)
            yield match


def _summed(block: Block, relu: fx.Node, total: Any, through: tuple[type[nn.Module], ...]) -> _Match | None:
    """relu(conv + residual). In place, the sum must write into the convolution's own output: into another's it would be seen outside."""
    if not isinstance(total, fx.Node) or len(total.args) != 2 or total.kwargs:
        return None
    is_method = total.op == "call_method" and total.target in ("add", "add_")
    if not is_method and not (total.op == "call_function" and total.target in _SUMS):
        return None
    is_in_place = total.target in (operator.iadd, "add_")
    for index in (0,) if is_in_place else (0, 1):
        conv, residual = block.source(total.args[index], through), total.args[1 - index]
        if not isinstance(residual, fx.Node) or residual is total.args[index] or not _is_fusable(block, conv):
            continue
        # The convolution moves down to the ReLU: what it reads must be the same there.
        if not block.is_written(conv.args[0], conv, relu) and not block.is_written(residual, total, relu):
            return _Match(conv=conv, relu=relu, total=total, residual=residual)
    return None


def _is_fusable(block: Block, node: Any) -> bool:
    conv = block.layer(node)
    if type(conv) is not nn.Conv2d or len(node.args) != 1 or not block.is_own(node):
        return False
    # Grouped and depthwise convolutions have kernels of their own, which fuse nothing.
    is_even = conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return conv.groups == 1 and conv.padding_mode == "zeros" and not is_even


def _is_relu(block: Block, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(block.layer(node)) is nn.ReLU


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, ConvReLU)


def _fuse(block: Block, match: _Match) -> bool:
    """Exchange the modules; True where the block's forward has to follow its graph from now on."""
    path = str(match.conv.target)
    conv = block.module.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    fused_layer = ConvReLU(conv)
    block.module.set_submodule(path, fused_layer)
    _take_bias(block, match, fused_layer)
    if match.residual is None and block.is_own(match.relu):
        block.module.set_submodule(str(match.relu.target), nn.Identity())
        return False
    is_plain = match.residual is None
    values = match.conv.args if is_plain else (*match.conv.args, match.residual)
    with block.graph.inserting_before(match.conv if is_plain else match.relu):
        fused = block.graph.call_module(path, values)
    match.relu.replace_all_uses_with(fused)
    node: fx.Node = match.relu
    while node is not match.conv:  # from the ReLU back to the convolution, nobody else reads these
        before = node.all_input_nodes
        block.graph.erase_node(node)
        node = next(n for n in before if not n.users)
    block.graph.erase_node(match.conv)
    return True


def _take_bias(block: Block, match: _Match, into: ConvReLU) -> None:
    """Where the residual is a convolution's output that nobody else reads, its bias is added with the other one: a pass over a whole tensor less on a GPU."""
    node = block.source(match.residual)
    shortcut = block.layer(node)
    if type(shortcut) is not nn.Conv2d or shortcut.bias is None or not block.is_own(node):
        return
    total = (into.bias.double() + shortcut.bias.double()).to(into.bias.dtype).detach()
    if "bias" in into._parameters:
        into.bias = nn.Parameter(total, requires_grad=into.bias.requires_grad)
    else:
        into.bias = total
    bare = copy.copy(shortcut)  # another path may lead to the same layer, and keeps its bias
    bare._parameters = {**shortcut._parameters, "bias": None}
    block.module.set_submodule(str(node.target), bare)


def _pads(conv: nn.Conv2d) -> list[int]:
    """The padding in pixels of one side; `same` of an odd kernel is symmetric."""
    if isinstance(conv.padding, str):
        return [d * (k - 1) // 2 if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return list(conv.padding)
