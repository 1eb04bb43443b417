"""Which kernels a rewrite declares for GPUs alone is what they say themselves when a CPU asks for them: a search tries none of those there."""

from __future__ import annotations

import pytest
import torch

from gpuopt.converters import rewrites
from gpuopt.converters.rewrites import attention, implementations
from gpuopt.core.errors import Unsupported


@pytest.mark.parametrize("kernel", implementations.KERNELS)
def test_a_cpu_is_offered_the_kernels_it_has(kernel: str) -> None:
    query = torch.ones(1, 2, 8, 16)
    refused = False
    try:
        implementations._refuse(kernel, "cpu", query, query, None)
    except Unsupported as error:
        refused = "on GPUs alone" in error.message
    assert refused == (kernel in attention.GPU_ONLY) == bool(rewrites.lacks_kernel(f"attention:{kernel}", "cpu"))
    assert not rewrites.lacks_kernel(f"attention:{kernel}", "cuda")


def test_a_rewrite_without_settings_runs_anywhere() -> None:
    assert not rewrites.lacks_kernel("no_mask", "cpu")
