"""Every product dispatched inside the block is weighed, by the dtype it runs in."""

from __future__ import annotations

import pytest
import torch

from gpuopt.programs import cuda, weigh


def test_products_are_weighed_and_everything_else_is_not() -> None:
    with torch.no_grad(), weigh.Weigh(weigh.tally_for("cpu")) as found:
        (torch.ones(3, 4) @ torch.ones(4, 5)).relu()
        torch.ones(2, 4, dtype=torch.float64) @ torch.ones(4, 5, dtype=torch.float64)
    assert found.tally.flops == {"float32": 2.0 * 3 * 4 * 5, "float64": 2.0 * 2 * 4 * 5}


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:0", "tf32")])
def test_tf32_switches_count_on_a_gpu_alone(device: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        tally = weigh.tally_for(device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    tally.add("aten.mm.default", [torch.ones(2, 2), torch.ones(2, 2)], {}, torch.ones(2, 2))
    assert list(tally.flops) == [dtype]


def test_a_cpu_has_nothing_to_wait_for_and_no_capability() -> None:
    cuda.synchronize("cpu")
    assert cuda.capability("cpu") is None
