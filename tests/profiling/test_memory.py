"""Peak memory on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch

from gpuopt.profiling.memory import peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_the_peak_is_what_the_call_held_at_once_not_what_it_kept():
    def call():
        held = torch.ones(64 << 20, dtype=torch.uint8)
        held += 1
        del held

    found = peak(call, "cpu")
    if found is None:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    idle = peak(lambda: None, "cpu")
    assert idle is not None and idle > 0
    assert 60 << 20 <= found - idle <= 140 << 20


def test_a_machine_without_a_high_water_mark_says_none(monkeypatch, tmp_path):
    from gpuopt.profiling import memory

    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    assert peak(lambda: None, "cpu") is None
