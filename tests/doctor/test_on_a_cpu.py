"""What is wrong on a CPU too is found there, and what only a GPU minds is not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from builders import CPU

from gpuopt.doctor.diagnose import diagnose

ANYWHERE = ("float64_anywhere", "mixed_dtypes", "nonfinite_in_half", "train_mode", "grad_on", "batch_norm_unfolded", "manual_attention", "rebuilt_weights", "padding_waste")  # fmt: skip
GPU_ALONE = ("buffer_on_cpu", "fp32_without_tf32", "no_half", "nchw_half_conv", "tensor_cores_unused", "unaligned_dim", "small_batch", "gather_bound", "cudnn_benchmark_off")  # fmt: skip
PRICED = ("batch_norm_unfolded", "manual_attention", "rebuilt_weights", "padding_waste")


def seed(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"seed_{name}", Path(__file__).parent / "seeds" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*ANYWHERE, *GPU_ALONE])
def test_a_rule_holds_on_a_cpu_if_and_only_if_its_defect_costs_something_there(name: str) -> None:
    made = seed(name)
    found = [f for f in diagnose(replace(made.bad(), device=CPU)) if f.code == made.CODE]
    assert bool(found) == (name in ANYWHERE)
    if name in PRICED:
        assert found[0].gain_high_ms is not None


def test_a_folded_batch_norm_leaves_a_pass_on_a_gpu_which_a_compiler_fuses_and_nothing_on_a_cpu() -> None:
    bad = seed("batch_norm_unfolded").bad()
    (gpu,), (cpu,) = ([f for f in diagnose(e) if f.code == "GPU304"] for e in (bad, replace(bad, device=CPU)))
    assert gpu.time_ms == cpu.time_ms and cpu.gain_high_ms is not None and cpu.gain_high_ms >= cpu.time_ms
    assert gpu.gain_high_ms is not None and gpu.gain_high_ms < 0.7 * gpu.time_ms
    assert cpu.change is not None and cpu.change.fold_batch_norm and cpu.safe
    assert gpu.change is not None and not gpu.change.fold_batch_norm and str(gpu.change.backend) == "inductor:freezing"
