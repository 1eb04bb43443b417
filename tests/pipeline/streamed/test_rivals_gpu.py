"""Other libraries on a GPU: the same bits within the bytes they are given, and the module back on the host afterwards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import streams

from gpuopt.core.errors import Unavailable
from gpuopt.core.streamed import RIVALS
from gpuopt.pipeline.streamed import rivals
from gpuopt.pipeline.streamed.rivals import resident
from gpuopt.streaming import anatomy

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"


def large() -> Any:
    space: dict[str, Any] = {}
    exec(streams.FACTORY, space)
    torch.manual_seed(7)
    return space["Stack"](depth=12, width=1024).half().eval()


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_gives_the_same_bits_within_its_bytes_and_the_module_back(name: str) -> None:
    try:
        rivals.require(name)
    except Unavailable as missing:
        pytest.skip(missing.message)
    module = large()
    found = anatomy.dissect(module)
    addresses = [p.data_ptr() for p in module.parameters()]
    ids = torch.arange(6, device=DEVICE)[None]

    def called() -> torch.Tensor:
        with torch.inference_mode():
            outputs: torch.Tensor = module(ids)
            return outputs.cpu()

    with resident.whole(module, DEVICE, found.weight_bytes):
        wanted = called()
    for share in (0.5, 0.8):
        given = int(share * found.weight_bytes)
        torch.cuda.reset_peak_memory_stats()
        with rivals.running(name, module, DEVICE, given, found) as setting:
            for _ in range(4):
                assert torch.equal(called(), wanted), setting
            # Activations are small here; a library may hold a block more than it says while it hands over.
            assert torch.cuda.max_memory_allocated() <= given + 2 * max(unit.num_bytes for unit in found.units) + (64 << 20), setting
        assert [p.data_ptr() for p in module.parameters()] == addresses
        assert not any(hasattr(part, left) for part in module.modules() for left in ("_hf_hook", "_mm_manager", "_diffusers_hook"))
    assert torch.get_default_device().type == "cpu"
    with resident.whole(module, DEVICE, found.weight_bytes):
        assert torch.equal(called(), wanted)
