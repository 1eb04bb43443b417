"""fuse_conv: what it fuses, what it must leave alone, and that outputs stay what fp64 says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpuopt.models
from gpuopt.converters import change
from gpuopt.converters.rewrites import fuse_conv
from gpuopt.converters.rewrites.fuse_conv import ConvReLU
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision, TensorSpec, Transforms
from gpuopt.programs import artifact
from gpuopt.programs.export import export


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stirred(module):
    """Batch norms far from doing nothing, in fp64 and eval mode."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module.double().eval()


def fused(module):
    return sum(isinstance(part, ConvReLU) for part in module.modules())


def check(module, channels=8, *, count, sums=0):
    """Rewrite a copy: this many convolutions are fused, `sums` of them with a residual, and nothing else changes, the caller's tensor included."""
    stirred(module)
    x = torch.randn(2, channels, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        given, kept = x.clone(), x.clone()
        ref = module(given)
        rewritten = copy.deepcopy(module)
        assert fuse_conv.applies(rewritten) is None
        note = fuse_conv.apply(rewritten, None, None)
        out = rewritten(kept)
    torch.testing.assert_close(out, ref, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kept, given, rtol=1e-10, atol=1e-10)
    assert fused(rewritten) == count, note
    assert f" {sums} with a residual" in note
    return rewritten


def refuses(module, channels=8):
    stirred(module)
    before = copy.deepcopy(module)
    assert "no 2-D convolution" in fuse_conv.applies(module)
    with pytest.raises(Unsupported, match="nothing to fuse"):
        fuse_conv.apply(module, None, None)
    assert repr(module) == repr(before) and fused(module) == 0


def conv(inner=8, outer=8, kernel=3, **more):
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **more)


class Torchvision(nn.Module):
    """A bottleneck as torchvision writes it: one ReLU in place, three times."""

    def __init__(self, stride=1, outer=8):
        super().__init__()
        self.conv1, self.bn1 = conv(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4, 3, bias=False, stride=stride), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(4, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(8, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer)) if stride > 1 else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Timm(nn.Module):
    """A basic block as timm writes it, with the places for what it may drop."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.drop_block, self.act1, self.aa = conv(), nn.BatchNorm2d(8), nn.Identity(), nn.ReLU(inplace=True), None
        self.conv2, self.bn2, self.se, self.act2, self.drop_path = conv(), nn.BatchNorm2d(8), None, nn.ReLU(inplace=True), nn.Dropout2d(0.5)

    def forward(self, x):
        shortcut = x
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        if self.aa is not None:
            x = self.aa(x)
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act2(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = conv(padding_mode="zeros"), nn.Conv2d(8, 8, 3, padding="same", dilation=2), conv(8, 3)

    def forward(self, x):
        y = F.relu(self.first(x))
        y = torch.relu(torch.add(x, self.second(y))).relu()
        return self.last(y).relu_()


def test_transformers_resnet_is_fused_whole():
    module = stirred(gpuopt.models.resnet101_tiny())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ref = copy.deepcopy(module)(x).logits
    note = fuse_conv.apply(module, None, None)
    torch.testing.assert_close(module(x).logits, ref, rtol=1e-9, atol=1e-9)
    assert "folded 12 of 12" in note and "of 12 convolutions 7 fused with their ReLU, 3 with a residual" in note


def test_names_and_classes_stay_what_they_were():
    module = check(nn.Sequential(Torchvision(), Torchvision(2, 16)), count=6, sums=2)
    block = module.get_submodule("1")
    assert isinstance(block, Torchvision) and type(block).__qualname__ == "Torchvision" and type(block).__module__ == __name__
    assert isinstance(module.get_submodule("1.conv3"), ConvReLU)


@pytest.mark.parametrize(
    ("module", "count", "sums"),
    [(Torchvision(), 3, 1), (Torchvision(2, 16), 3, 1), (Timm(), 2, 1), (Functional(), 3, 1)],
    ids=lambda m: type(m).__name__,
)
def test_blocks_as_people_write_them(module, count, sums):
    check(module, count=count, sums=sums)


def test_the_shortcuts_bias_is_added_with_the_other():
    module = check(Torchvision(2, 16), count=3, sums=1)
    assert module.downsample[0].bias is None


def test_a_shortcut_that_others_read_keeps_its_bias():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.short = conv(), conv(8, 8, 1)

        def forward(self, x):
            short = self.short(x)
            return F.relu(self.main(x) + short), short

    stirred(module := Twice())
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    ref = module(x)
    fuse_conv.apply(module, None, None)
    torch.testing.assert_close(module(x), ref)
    assert module.short.bias is not None


def test_a_plain_sequence_keeps_its_code():
    module = check(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.ReLU6(), conv(bias=False), nn.ReLU()), count=2)
    assert type(module) is nn.Sequential


class OfTwo(nn.Module):
    """A forward over two layers and whatever else."""

    def __init__(self, forward, **more):
        super().__init__()
        self.a, self.b, self.relu = conv(**more), conv(**more), nn.ReLU()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def in_place_residual(m, x):
    kept = x * 2
    kept += m.a(x)  # writes into `kept`, which is returned besides
    return F.relu(kept), kept


def written_between(m, x):
    x = x * 1
    y = m.a(x)
    z = x.mul_(3)
    return F.relu(y + z)


LEFT_ALONE = {
    "read twice": lambda m, x: (lambda y: F.relu(y) + y)(m.a(x)),
    "called twice": lambda m, x: F.relu(m.a(F.gelu(m.a(x)))),
    "written into the residual": in_place_residual,
    "written between": written_between,
    "scaled sum": lambda m, x: F.relu(torch.add(m.a(x), x, alpha=2)),
    "sum with a number": lambda m, x: F.relu(m.a(x) + 1),
    "another activation": lambda m, x: F.leaky_relu(m.a(x)) + F.relu6(m.b(x)),
    "sum read twice": lambda m, x: (lambda y: F.relu(y) + y)(m.a(x) + x),
    "a tensor with itself": lambda m, x: (lambda y: F.relu(y + y))(m.a(x)),
    "values decide": lambda m, x: F.relu(m.a(x)) if x.sum() > 0 else F.relu(m.b(x)),
}


@pytest.mark.parametrize("how", LEFT_ALONE)
def test_it_is_left_alone_when(how):
    refuses(OfTwo(LEFT_ALONE[how]))


@pytest.mark.parametrize("more", [{"groups": 8}, {"groups": 2}, {"padding_mode": "reflect"}])
def test_other_kinds_of_convolution_are_left_alone(more):
    refuses(OfTwo(lambda m, x: F.relu(m.a(x)) + m.relu(m.b(x)), **more))


def test_a_residual_that_broadcasts_is_summed_as_before():
    check(OfTwo(lambda m, x: F.relu(m.a(x) + m.b(x).mean((2, 3), keepdim=True))), count=1, sums=1)


def test_a_sum_of_two_convolutions_fuses_one():
    check(OfTwo(lambda m, x: m.relu(m.a(x) + m.b(x))), count=1, sums=1)


def test_what_cannot_be_followed_does_not_stop_the_rest():
    rest = OfTwo(LEFT_ALONE["values decide"])
    check(nn.Sequential(conv(), nn.ReLU(), rest), count=1)


def test_optional_inputs_are_not_guessed():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, x, mask=None):
            y = self.a(x)
            return F.relu(y if mask is None else y * mask)

    refuses(Masked())


@pytest.mark.parametrize("where", ["a", "relu"])
def test_a_hooked_layer_keeps_its_hook(where):
    module = OfTwo(lambda m, x: m.relu(m.a(x)))
    module.get_submodule(where).register_forward_hook(lambda _m, _args, out: out + 1)
    refuses(module)


def test_a_hooked_block_keeps_its_hook():
    inner = OfTwo(lambda m, x: F.relu(m.a(x)))
    inner.register_forward_hook(lambda _m, _args, out: out + 1)
    check(nn.Sequential(inner, conv(), nn.ReLU()), count=2)


def test_a_layer_in_two_places_changes_in_neither_by_accident():
    shared = conv()
    check(nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Sigmoid())), count=1)


def test_tied_weights_stay_tied():
    module = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
    module[2].weight = module[0].weight
    rewritten = check(module, count=2)
    assert rewritten[2].weight is rewritten[0].weight


def test_it_says_why_not():
    assert fuse_conv.applies(nn.Linear(3, 3)) == "there is no 2-D convolution"
    assert "FX can follow" in fuse_conv.applies(nn.Sequential(conv(), nn.Sigmoid()))


def test_it_can_be_asked_without_weights():
    with torch.device("meta"):
        assert fuse_conv.applies(nn.Sequential(Torchvision(), conv())) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_survives_a_copy_a_bundle_and_a_compiler(tmp_path, layout):
    module = stirred(nn.Sequential(Torchvision(), Torchvision(2, 16), conv(16, 4), nn.ReLU())).float().to(memory_format=layout)
    spec = TensorSpec.parse("x:float32[N,8,9,9]")
    inputs = Inputs(args=(torch.randn(2, 8, 9, 9).contiguous(memory_format=layout),), specs=(spec,), dims={"N": 2})
    ref = copy.deepcopy(module).double()(inputs.args[0].double())
    fuse_conv.apply(module, None, inputs)
    module = copy.deepcopy(module)
    program = export(module, inputs, {"N": (1, 8)})
    assert sum(str(node.target) == "gpuopt.conv_relu.default" for node in program.graph.nodes) == 7
    files = artifact.save(module, inputs, {"N": (1, 8)}, tmp_path)
    loaded, _ = artifact.load(tmp_path, files, {"signed_by_us": True})
    with torch.no_grad():
        for run in (module, loaded, torch.compile(module, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(run(*inputs.args).double(), ref, rtol=1e-4, atol=1e-5)


def test_the_whole_way_to_half_precision():
    module = stirred(nn.Sequential(Torchvision(), Torchvision(2, 16))).float()
    x = torch.randn(2, 8, 9, 9)
    inputs = Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[N,8,9,9]"),), dims={"N": 2})
    ref = copy.deepcopy(module).double()(x.double())
    transforms = Transforms(channels_last=True, fold_batch_norm=True, rewrites=("fuse_conv",))
    changed = change.apply(Model(form="module", name="m", module=module, dtype="float32"), Precision.BF16, transforms, inputs)
    assert any(note.startswith("fuse_conv: of 7 convolutions 4 fused") for note in changed.notes)
    assert fused(module) == 0, "the caller's own model was changed"
    with torch.no_grad():
        out = changed.module(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert ((out.double() - ref).norm() / ref.norm()) < 0.02
