"""Batch norms folded: the function stays the same to fp64 rounding, and what must not be folded is not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gpuopt.converters import apply, folding
from gpuopt.core.live import Inputs
from gpuopt.core.spec import Precision, Transforms


def of(x):
    return Inputs(args=(x,))


def norms(module):
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def folded(module, x, *, traced=False):
    """A folded copy; checked against the original in fp64."""
    module = module.double().eval()
    twin = copy.deepcopy(module)
    said = folding.fold(twin, None if traced else of(x))
    torch.testing.assert_close(twin(x.double()), module(x.double()), rtol=1e-9, atol=1e-9)
    return twin, said


@pytest.mark.parametrize("with_inputs", [True, False])
def test_every_norm_of_a_resnet_folds_and_the_answers_stay(resnet, with_inputs):
    model, inputs = resnet
    model.module.double()
    x = inputs.args[0].double()
    reference = model.module(x).logits
    changed = apply(model, None, Transforms(fold_batch_norm=True), inputs if with_inputs else None)
    assert norms(changed.module) == 0 and norms(model.module) == 12
    assert "folded 12 of 12 batch norms" in changed.notes
    torch.testing.assert_close(changed.module(x).logits, reference, rtol=1e-9, atol=1e-9)
    assert changed.num_parameters < model.num_parameters


def test_fp32_weights_are_folded_in_fp64(resnet):
    model, inputs = resnet
    reference = copy.deepcopy(model.module).double()(inputs.args[0].double()).logits
    changed = apply(model, None, Transforms(fold_batch_norm=True), inputs)
    plain, error = (
        ((m(inputs.args[0]).logits.double() - reference).norm() / reference.norm()).item() for m in (model.module, changed.module)
    )
    assert {p.dtype for p in changed.module.parameters()} == {torch.float32}
    assert error < max(3 * plain, 1e-5)


def test_folding_comes_before_the_cast(resnet):
    model, inputs = resnet
    half = inputs.map(lambda t: t.half())
    both = apply(model, Precision.FP16, Transforms(fold_batch_norm=True), half)
    apart = apply(apply(model, None, Transforms(fold_batch_norm=True), inputs), Precision.FP16, Transforms())
    assert all(torch.equal(a, b) for a, b in zip(both.module.parameters(), apart.module.parameters(), strict=True))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "strided, dilated": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=1), lambda: nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "no scale": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "large eps": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, eps=0.5), (2, 4, 9, 9)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6), (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("traced", [False, True])
def test_layers_of_every_kind_fold_exactly(name, traced, stirred):
    layer, norm, shape = LAYERS[name]
    module = nn.Sequential(layer(), norm(), nn.ReLU())
    stirred(module)
    twin, _ = folded(module, torch.randn(shape), traced=traced)
    # Without inputs nobody knows the rank of a linear layer's output.
    assert norms(twin) == (1 if traced and name.startswith("linear") else 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 1000))
def test_any_convolution_folds_exactly(channels, groups, kernel, bias, seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(groups, channels * groups, kernel, groups=groups, bias=bias), nn.BatchNorm2d(channels * groups))
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(1e-4, 3)
    module[1].weight.data.normal_()
    twin, said = folded(module, torch.randn(2, groups, 5, 5))
    assert norms(twin) == 0 and said == "folded 1 of 1 batch norms"


def test_a_transposed_convolution_in_groups_is_left(stirred):
    module = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    stirred(module)
    assert norms(folded(module, torch.randn(2, 4, 5, 5))[0]) == 1


class Skip(nn.Module):
    """The convolution's output is read twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class View(Skip):
    """Read a second time through a view."""

    def forward(self, x):
        y = self.conv(x)
        z = y[:, :1]
        return self.norm(y) * z


class Returned(Skip):
    """Returned beside the norm's output."""

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([self.norm(y).flatten(), y.flatten()])


class Twice(Skip):
    """The convolution runs twice, its norm once."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x + 1)


class OneNormForTwo(Skip):
    """One norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class Activated(Skip):
    """Something between them."""

    def forward(self, x):
        return self.norm(torch.relu(self.conv(x)))


class InPlace(Skip):
    """Changed in place between them."""

    def forward(self, x):
        y = self.conv(x)
        y += 1
        return self.norm(y)


class TiedWeights(Skip):
    """The convolution's weight is another layer's, too."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(x)


class NormFirst(Skip):
    def forward(self, x):
        return self.conv(self.norm(x))


@pytest.mark.parametrize("kind", [Skip, View, Returned, Twice, OneNormForTwo, Activated, InPlace, TiedWeights, NormFirst])
@pytest.mark.parametrize("traced", [False, True])
def test_what_would_change_the_answer_is_not_folded(kind, traced, stirred):
    module = kind()
    stirred(module)
    twin, said = folded(module, torch.randn(2, 3, 4, 4), traced=traced)
    assert norms(twin) == 1
    assert said.startswith("folded 0 of 1 batch norms; 1 stay")


def test_one_module_used_under_two_names_is_not_folded(stirred):
    conv = nn.Conv2d(3, 3, 1)
    module = nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))
    stirred(module)
    for traced in (True, False):
        assert norms(folded(module, torch.randn(2, 3, 4, 4), traced=traced)[0]) == 2


def test_a_norm_without_statistics_is_left():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert norms(folded(module, torch.randn(2, 3, 4, 4))[0]) == 1


def test_a_norm_over_positions_is_not_mistaken_for_one_over_features(stirred):
    """[N, L, C] with L == C: BatchNorm1d works on the positions."""
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    stirred(module)
    assert norms(folded(module, torch.randn(2, 6, 4))[0]) == 1


def test_a_layer_with_hooks_or_parametrised_weights_is_left(stirred):
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    hooked[0].register_forward_hook(lambda module, args, output: output * 2)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    for module in (hooked, normed):
        stirred(module)
        assert norms(folded(module, torch.randn(2, 3, 4, 4))[0]) == 1


def test_no_hook_is_left_behind(resnet):
    model, inputs = resnet
    changed = apply(model, None, Transforms(fold_batch_norm=True), inputs).module
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in [*changed.modules(), *model.module.modules()])


def test_control_flow_by_values_is_seen_by_running_and_left_alone_by_tracing(stirred):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() < 1e9 else x

    module = Branch()
    stirred(module)
    assert norms(folded(module, torch.randn(2, 3, 4, 4))[0]) == 0
    assert norms(folded(module, torch.randn(2, 3, 4, 4), traced=True)[0]) == 1


def test_a_model_without_norms_says_so(bert):
    model, inputs = bert
    assert "folded no batch norm: there is none" in apply(model, None, Transforms(fold_batch_norm=True), inputs).notes
