"""Bytes of a call, counted without making it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.doctor import footprint

WIDE, NARROW = 4096, 1024


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(NARROW, WIDE), nn.ReLU(), nn.Linear(WIDE, NARROW)).eval()


@pytest.mark.parametrize("batch", [8, 64])
def test_the_peak_is_two_wide_activations_at_once(batch: int) -> None:
    found = footprint.measure(model(), Inputs(args=(torch.ones(batch, NARROW),)))
    assert found is not None
    assert found.weight_bytes == 4 * (2 * NARROW * WIDE + WIDE + NARROW)
    assert found.activation_bytes == 4 * 2 * batch * WIDE
    assert found.input_bytes == 4 * batch * NARROW


def test_a_deeper_model_needs_no_more_unless_gradients_keep_every_layer() -> None:
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(NARROW, NARROW), nn.Tanh()) for _ in range(6)))
    inputs = Inputs(args=(torch.ones(16, NARROW),))
    inference, training = footprint.measure(deep, inputs), footprint.measure(deep, inputs, grad=True)
    assert inference is not None and training is not None
    # The block's input, which its caller still holds, what the layer made of it, and what tanh made of that.
    assert inference.activation_bytes == 4 * 3 * 16 * NARROW
    assert training.activation_bytes >= 4 * 6 * 16 * NARROW


def test_the_largest_batch_is_what_the_room_holds_beside_the_weights() -> None:
    found = footprint.Footprint(weight_bytes=100, input_bytes=10, activation_bytes=30)
    assert found.largest_batch(4, 100) == 0 and found.largest_batch(4, 109) == 0 and found.largest_batch(4, 200) == 10
    batch = 24
    exact = footprint.measure(model(), Inputs(args=(torch.ones(batch, NARROW),)))
    assert exact is not None
    assert exact.largest_batch(batch, exact.weight_bytes + exact.input_bytes + exact.activation_bytes) == batch


def test_a_model_that_asks_for_values_has_no_footprint_and_is_left_as_it_was() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum().item() > 0 else x

    asks = Asks()
    before = asks.fc.weight
    assert footprint.measure(asks, Inputs(args=(torch.ones(2, 4),))) is None
    assert asks.fc.weight is before and type(asks.fc.weight) is nn.Parameter


def test_tied_weights_count_once() -> None:
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert footprint.weight_bytes(tied) == 4 * 64
