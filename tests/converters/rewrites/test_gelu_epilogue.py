"""gelu_epilogue: which layers, which form of GELU, and how far from fp64 the approximation is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import gpuopt.models
from gpuopt.converters import rewrites
from gpuopt.converters.rewrites import gelu_epilogue
from gpuopt.converters.rewrites.gelu_epilogue import LinearGELU
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import artifact


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Mlp(nn.Module):
    """As timm writes it, with any activation."""

    def __init__(self, act, bias=True):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(8, 16, bias=bias), act, nn.Dropout(0.5), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.drop(self.fc1(x)))))


class Functional(nn.Module):
    def __init__(self, approximate):
        super().__init__()
        self.up, self.down, self.approximate = nn.Linear(8, 16), nn.Linear(16, 8), approximate

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def rewritten(module, limit):
    module.double().eval()
    x = torch.randn(4, 5, 8, dtype=torch.float64) * 2
    ref = module(x)
    assert gelu_epilogue.applies(module) is None
    note = gelu_epilogue.apply(module, "tanh", None)
    assert (module(x) - ref).abs().max() < limit
    assert sum(isinstance(part, LinearGELU) for part in module.modules()) == 1
    return note


@pytest.mark.parametrize(
    "act",
    [nn.GELU(approximate="tanh"), ACT2FN["gelu_new"], ACT2FN["gelu_fast"], ACT2FN["gelu_pytorch_tanh"]],
    ids=lambda a: type(a).__name__,
)
def test_the_tanh_form_stays_exact(act):
    assert "1 of them had the tanh form before" in rewritten(Mlp(act), 1e-6)


@pytest.mark.parametrize("act", [nn.GELU(), ACT2FN["gelu"]], ids=lambda a: type(a).__name__)
def test_the_erf_form_is_approximated(act):
    assert "an approximation" in rewritten(Mlp(act), 16**0.5 * 4.8e-4)


@pytest.mark.parametrize(("approximate", "limit"), [("tanh", 1e-12), ("none", 16**0.5 * 4.8e-4)])
def test_functional_code_is_written_anew(approximate, limit):
    module = Functional(approximate)
    rewritten(module, limit)
    assert isinstance(module, Functional) and type(module).__name__ == "Functional"


def test_a_layer_without_bias_gets_a_zero_one():
    rewritten(Mlp(nn.GELU("tanh"), bias=False), 1e-12)


def test_berts_intermediate_layers_are_found():
    module = gpuopt.models.bert_large_tiny().eval()
    ids = torch.randint(99, (2, 7))
    ref = copy.deepcopy(module).double()(ids).last_hidden_state
    note = gelu_epilogue.apply(module, "tanh", None)
    assert note.startswith("2 linear layers")
    error = (module(ids).last_hidden_state - ref).norm() / ref.norm()
    assert error < 1e-3


class OfTwo(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(8, 8), nn.Linear(8, 8), forward

    def forward(self, x):
        return self.run(self, x)


LEFT_ALONE = {
    "read twice": lambda m, x: (lambda y: F.gelu(y) + y)(m.a(x)),
    "called twice": lambda m, x: F.gelu(m.a(m.a(x))),
    "another activation": lambda m, x: F.silu(m.a(x)),
    "something between": lambda m, x: F.gelu(m.a(x) + 1),
    "no linear layer before": lambda m, x: m.a(F.gelu(x)),
}


@pytest.mark.parametrize("how", LEFT_ALONE)
def test_it_is_left_alone_when(how):
    module = OfTwo(LEFT_ALONE[how])
    assert gelu_epilogue.applies(module) is not None
    with pytest.raises(Unsupported, match="nothing to fuse"):
        gelu_epilogue.apply(module, "tanh", None)
    assert type(module.a) is nn.Linear


def test_quick_gelu_is_another_function():
    assert gelu_epilogue.applies(Mlp(ACT2FN["quick_gelu"])) is not None


def test_it_says_that_it_approximates_and_how():
    assert rewrites.is_approximate(("gelu_epilogue:tanh",))
    with pytest.raises(UsageError, match="needs a word"):
        rewrites.resolve("gelu_epilogue")


def test_it_can_be_asked_without_weights():
    with torch.device("meta"):
        assert gelu_epilogue.applies(Mlp(nn.GELU())) is None
    assert gelu_epilogue.applies(nn.Conv2d(3, 3, 1)) == "there is no linear layer"


def test_it_survives_a_copy_a_bundle_and_a_compiler(tmp_path):
    module = nn.Sequential(Mlp(nn.GELU("tanh")), Functional("tanh")).eval()
    inputs = Inputs(args=(torch.randn(2, 5, 8),), specs=(TensorSpec.parse("x:float32[N,S,8]"),), dims={"N": 2, "S": 5})
    ref = copy.deepcopy(module).double()(inputs.args[0].double())
    gelu_epilogue.apply(module, "tanh", inputs)
    module = copy.deepcopy(module)
    files = artifact.save(module, inputs, {"N": (1, 8)}, tmp_path)
    loaded, _ = artifact.load(tmp_path, files, {"signed_by_us": True})
    with torch.no_grad():
        for run in (module, loaded, torch.compile(module, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(run(*inputs.args).double(), ref, rtol=1e-4, atol=1e-5)
