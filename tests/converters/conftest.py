"""Small models and their inputs, as the loaders would hand them on."""

from __future__ import annotations

import pytest
import torch

import gpuopt.models
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def as_model(module, name="model", **more):
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = str(max(set(floats), key=floats.count)).removeprefix("torch.") if floats else None
    return Model(form="module", name=name, module=module, dtype=dtype, num_parameters=sum(p.numel() for p in module.parameters()), **more)


def as_inputs(*specs, dims, positional=1, high=99, dtype=torch.float32):
    parsed = tuple(TensorSpec.parse(s) for s in specs)
    tensors = []
    for spec in parsed:
        shape = spec.bind(dims).shape
        tensors.append(torch.randn(shape).to(dtype) if spec.dtype.startswith("float") else torch.randint(high, shape))
    kwargs = {spec.name: tensor for spec, tensor in zip(parsed[positional:], tensors[positional:], strict=True)}
    return Inputs(args=tuple(tensors[:positional]), kwargs=kwargs, specs=parsed, dims=dims, source="test")


@pytest.fixture
def make():
    """`make(module)` -> Model."""
    return as_model


@pytest.fixture
def inputs():
    """`inputs("x:float32[N,3]", dims={"N": 2})` -> Inputs."""
    return as_inputs


@pytest.fixture
def resnet():
    """(Model, Inputs) with batch norms that are far from doing nothing."""
    module = gpuopt.models.resnet101_tiny()
    stir(module)
    return as_model(module, "resnet101_tiny"), as_inputs("pixel_values:float32[N,3,32,32]", dims={"N": 2})


@pytest.fixture
def bert():
    return as_model(gpuopt.models.bert_large_tiny(), "bert_large_tiny"), as_inputs("input_ids:int64[N,S]", dims={"N": 2, "S": 7})


@pytest.fixture
def t5():
    return as_model(gpuopt.models.t5_large_tiny(), "t5_large_tiny"), as_inputs(
        "input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]", dims={"N": 2, "S": 7, "T": 5}
    )


def stir(module):
    """Random statistics and scales, negative and near-zero variances among them, for every batch norm."""
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(1e-3, 2.0)
            if part.affine:
                part.weight.data.normal_()
                part.bias.data.normal_()


@pytest.fixture
def stirred():
    return stir
