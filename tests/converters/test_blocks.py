"""Which submodules' forwards can be read and written anew, and what is passed over."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gpuopt.converters.blocks import blocks


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * 2


class Masked(Plain):
    def forward(self, x, mask=None):
        return self.linear(x) if mask is None else mask


class Decides(Plain):
    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class DecidesMasked(Masked):
    def forward(self, x, mask=None):
        return self.linear(x) if x.sum() > 0 else x


def names(module):
    return [block.name for block in blocks(module, nn.Linear)]


def called(module):
    """What the outermost block calls, by path."""
    *_, block = blocks(module, nn.Linear)
    return [node.target for node in block.graph.nodes if node.op == "call_module"]


def test_inner_blocks_come_first():
    assert names(nn.Sequential(Plain(), nn.Sequential(Plain()))) == ["0", "1.0", "1", ""]


def test_what_holds_no_such_layer_is_not_read():
    assert names(nn.Sequential(Plain(), nn.Sequential(nn.ReLU()))) == ["0", ""]


def test_what_cannot_be_followed_is_one_node_of_what_holds_it():
    module = nn.Sequential(Plain(), Decides())
    assert names(module) == ["0", ""]
    assert called(module) == ["0.linear", "1"]


def test_an_optional_input_is_passed_over_and_read_where_it_is_called():
    module = nn.Sequential(Masked())
    assert names(module) == [""] and called(module) == ["0.linear"]
    module = nn.Sequential(Plain(), DecidesMasked())
    assert names(module) == ["0", ""] and called(module) == ["0.linear", "1"]


def test_hooked_and_patched_modules_are_one_node():
    module = nn.Sequential(Plain(), Plain(), Plain())
    module[0].register_forward_pre_hook(lambda _m, args: args)
    module[1].forward = lambda x: x
    assert names(module) == ["0", "2", ""]
    assert called(module) == ["0", "1", "2.linear"]


def test_a_rewritten_block_is_the_same_object_with_another_forward():
    module = nn.Sequential(Plain(), Plain())
    x = torch.randn(2, 4)
    before, inner = module(x), module[0]
    for block in blocks(module, nn.Linear):
        if block.name == "0":
            (product,) = (node for node in block.graph.nodes if node.op == "call_function")
            product.update_arg(1, 4)
            block.rewrite()
    assert module[0] is inner and isinstance(inner, Plain) and repr(type(inner)) == repr(Plain)
    assert type(module[1]) is Plain
    torch.testing.assert_close(module[0](x), 2 * module[1].__class__.forward(inner, x))
    for same in (module, copy.deepcopy(module)):
        assert not torch.equal(same(x), before)
        torch.testing.assert_close(same(x), module[1](2 * Plain.forward(inner, x)))


def test_a_forward_that_keeps_what_it_computed_keeps_no_symbols():
    class Keeps(Plain):
        calls, last = 0, None

        def forward(self, x):
            self.calls += 1
            self.last = self.linear(x)
            return self.last

    module = nn.Sequential(Keeps())
    assert names(module) == ["0", ""]
    assert module[0].last is None and module[0].calls == 0
    module(torch.randn(2, 4))
    assert isinstance(module[0].last, torch.Tensor) and module[0].calls == 1
