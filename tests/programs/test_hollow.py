"""Modules built on the meta device, whatever their code says about devices; and code that reads a value, which says so."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from gpuopt import models
from gpuopt.programs.hollow import hollow


class Stubborn(nn.Module):
    """Names its devices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, device="cpu")
        self.second = nn.Linear(8, 8).to("cpu").cpu()
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(8, dtype=torch.float32).to(torch.device("cpu"), torch.bfloat16))
        self.scale = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))


def test_no_device_that_is_named_gets_memory_and_ties_dtypes_and_shapes_hold() -> None:
    found, real = hollow(lambda: Stubborn().half()), Stubborn().half()
    assert {tensor.device.type for tensor in (*found.parameters(), *found.buffers())} == {"meta"}
    assert found.second.weight is found.first.weight
    for (name, ours), (other, theirs) in zip(found.state_dict().items(), real.state_dict().items(), strict=True):
        assert name == other and ours.shape == theirs.shape and ours.dtype == theirs.dtype


def test_memory_that_is_asked_for_on_the_cpu_by_name_is_not_given() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            module = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(16)))
        return module.to(torch.bfloat16).to_empty(device="cpu")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = hollow(build)
    assert sum(p.numel() * p.element_size() for p in module.parameters()) > 2**31
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.parametrize("name", ["llama_8b_tiny", "t5_large_tiny", "bert_large_tiny", "resnet101"])
def test_factories_of_ours_are_built_so(name: str) -> None:
    build = getattr(models, name)
    state = torch.get_rng_state()
    found = hollow(build)
    assert all(parameter.is_meta for parameter in found.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    if name.endswith("tiny"):
        real = build()
        assert [(n, p.shape, p.dtype) for n, p in found.named_parameters()] == [(n, p.shape, p.dtype) for n, p in real.named_parameters()]


def test_code_that_reads_a_value_says_so_and_nothing_stays_behind() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        hollow(lambda: torch.linspace(0, 1, 4)[1].item())
    assert torch.ones(2).device.type == "cpu"
