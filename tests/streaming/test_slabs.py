"""A unit's tensors lie in one buffer and come out of it bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpuopt.core.errors import BadInput
from gpuopt.core.streaming import Place, Unit
from gpuopt.streaming.anatomy import dissect
from gpuopt.streaming.hostpages import Pages
from gpuopt.streaming.slabs import Slab, bits_of, checksum, checksum_tensor, fill_from_module, moved

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int64", "bool", "complex64", "float64"]


class Mixed(nn.Module):
    """Blocks of tensors of every dtype, one turned, one of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ParameterDict() for _ in range(3))
        for index, block in enumerate(self.blocks):
            for dtype in DTYPES:
                value = torch.randn(5, 7).to(getattr(torch, dtype)) if dtype != "bool" else torch.rand(5, 7) > 0.5
                block["of_" + dtype] = nn.Parameter(value, requires_grad=False)
            block["turned"] = nn.Parameter(torch.randn(6, 4).t(), requires_grad=False)
            block["channels"] = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), requires_grad=False)
            block["scalar"] = nn.Parameter(torch.tensor(float(index)), requires_grad=False)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_of_any_dtype_and_stride_come_back_bit_for_bit():
    torch.manual_seed(0)
    module = Mixed()
    named = dict(module.named_parameters())
    for unit in dissect(module, small_bytes=1).units:
        pages = Pages(unit.num_bytes)
        total = fill_from_module(unit, module, pages.bytes)
        assert len(unit.places) == len(DTYPES) + 3 and total == checksum(pages.bytes)
        for place in unit.places:
            view, true = Slab(unit, pages.bytes).view(place), named[place.name]
            assert view.dtype is true.dtype and view.shape == true.shape and view.stride() == true.stride()
            assert bits(view) == bits(true) and view.data_ptr() % 512 == 0


def test_a_slot_longer_than_the_unit_is_cut():
    unit = dissect(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), small_bytes=1).units[0]
    assert Slab(unit, torch.zeros(10_000, dtype=torch.uint8)).bytes.numel() == unit.num_bytes


def test_views_made_in_inference_mode_are_ordinary():
    unit = dissect(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), small_bytes=1).units[0]
    with torch.inference_mode(False):
        buffer = torch.zeros(unit.num_bytes, dtype=torch.uint8)
    with torch.inference_mode():
        assert not Slab(unit, buffer).view(unit.places[0]).is_inference()


@pytest.mark.parametrize(("dtype", "said"), [("float7", "does not know"), ("Tensor", "does not know"), ("float64", "which is not float64")])
def test_a_plan_whose_bytes_and_dtype_do_not_go_together_is_refused(dtype, said):
    place = Place(name="w", dtype=dtype, shape=(4,), stride=(1,), offset=0, num_bytes=16)
    unit = Unit(name="u", ring="r", order=0, num_bytes=512, places=(place,))
    with pytest.raises(BadInput, match=said):
        Slab(unit, torch.zeros(512, dtype=torch.uint8)).view(place)


@given(st.binary(min_size=1, max_size=64))
def test_the_checksum_is_the_wrapped_sum_of_signed_words_and_the_bytes_left_over(raw):
    whole = len(raw) // 8 * 8
    expected = sum(int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, whole, 8)) + sum(raw[whole:])
    assert checksum(torch.frombuffer(bytearray(raw), dtype=torch.uint8)) == (expected + 2**63) % 2**64 - 2**63


def test_a_checksum_takes_next_to_no_memory_of_the_device_the_slab_is_on():
    """Within a budget there is no room for a second slab: what `sum(dtype=int64)` of narrower words would allocate."""
    slab = torch.ones(8 * 2**20 + 5, dtype=torch.uint8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        checksum_tensor(slab)
    taken = sum(max(0, event.self_device_memory_usage, event.self_cpu_memory_usage) for event in seen.key_averages())
    assert taken < 2**10


@given(st.binary(min_size=8, max_size=64), st.integers(0, 63), st.integers(0, 7))
def test_the_checksum_sees_any_bit(raw, index, bit):
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    before = checksum(tensor)
    tensor[index % len(raw)] ^= 1 << bit
    assert checksum(tensor) != before


def test_bits_at_odd_bytes_of_a_storage_are_summed_too():
    storage = torch.arange(64, dtype=torch.int8)
    assert bits_of(storage[3:40]) == bits_of(storage[3:40].clone()) != bits_of(storage[4:41])


def test_what_shares_memory_shares_it_after_moving_and_the_rest_of_the_storage_stays():
    storage = torch.arange(1000.0)
    tensors = [
        storage[10:20],
        storage[15:25],
        storage[10:20],
        storage[900:910].view(2, 5).t(),
        torch.ones(3, dtype=torch.int8),
        storage[:0],
    ]
    taken = []

    def take(raw):
        taken.append(raw.numel())
        return raw.clone()

    there = moved(tensors, take)
    assert all(torch.equal(a, b) and a.stride() == b.stride() and a.dtype is b.dtype for a, b in zip(tensors, there, strict=True))
    assert sorted(taken) == [0, 3, 40, 60]
    there[0][5] = -1
    assert there[1][0] == -1 and there[2][5] == -1 and storage[15] == 15
