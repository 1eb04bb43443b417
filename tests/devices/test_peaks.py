"""peaks.toml against arithmetic, and device names against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuopt.core.result import Device
from gpuopt.devices import null, peaks

GIB = 2**30

# (name as NVML and torch give it, SMs, capability, GiB as reported, row)
REAL = [
    ("Tesla V100-SXM2-16GB", 80, "7.0", 15.77, "V100 SXM2 16GB"),
    ("Tesla V100-SXM2-32GB", 80, "7.0", 31.74, "V100 SXM2 32GB"),
    ("Tesla V100-PCIE-16GB", 80, "7.0", 15.77, "V100 PCIe 16GB"),
    ("Tesla V100S-PCIE-32GB", 80, "7.0", 31.74, "V100S PCIe"),
    ("Tesla T4", 40, "7.5", 14.58, "T4"),
    ("NVIDIA A10", 72, "8.6", 22.5, "A10"),
    ("NVIDIA A10G", 80, "8.6", 22.03, "A10G"),
    ("NVIDIA A30", 56, "8.0", 23.6, "A30"),
    ("NVIDIA A100-PCIE-40GB", 108, "8.0", 39.4, "A100 40GB PCIe"),
    ("A100-SXM4-40GB", 108, "8.0", 39.59, "A100 40GB SXM"),
    ("NVIDIA A100 80GB PCIe", 108, "8.0", 79.15, "A100 80GB PCIe"),
    ("NVIDIA A100-SXM4-80GB", 108, "8.0", 79.15, "A100 80GB SXM"),
    ("NVIDIA L4", 58, "8.9", 22.03, "L4"),
    ("NVIDIA L40S", 142, "8.9", 44.4, "L40S"),
    ("NVIDIA GeForce RTX 3090", 82, "8.6", 23.68, "RTX 3090"),
    ("NVIDIA GeForce RTX 4090", 128, "8.9", 23.5, "RTX 4090"),
    ("NVIDIA GeForce RTX 5090", 170, "12.0", 31.36, "RTX 5090"),
    ("NVIDIA H100 PCIe", 114, "9.0", 79.1, "H100 PCIe"),
    ("NVIDIA H100 NVL", 132, "9.0", 93.1, "H100 NVL"),
    ("NVIDIA H100 80GB HBM3", 132, "9.0", 79.1, "H100 SXM"),
    ("NVIDIA H200", 132, "9.0", 139.8, "H200 SXM"),
    ("NVIDIA H200 NVL", 132, "9.0", 139.8, "H200 NVL"),
    ("NVIDIA GH200 480GB", 132, "9.0", 94.5, "GH200 96GB"),
    ("NVIDIA GH200 144G HBM3e", 132, "9.0", 140.6, "GH200 144GB"),
    ("NVIDIA B200", 148, "10.0", 178.4, "B200"),
    ("NVIDIA GB200", 148, "10.0", 184.0, "GB200"),
    ("NVIDIA B300 SXM6 AC", 148, "10.3", 267.7, "B300"),
]

# Cards that are not in the table but whose names begin like one that is.
STRANGERS = [
    ("NVIDIA L40", 142, "8.9", 44.4),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 42, "8.0", 19.5),
    ("NVIDIA A100-SXM-64GB", 124, "8.0", 63.4),
    ("NVIDIA GeForce RTX 4090 D", 114, "8.9", 23.5),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, "8.9", 15.6),
    ("NVIDIA GeForce RTX 3090 Ti", 84, "8.6", 23.6),
    ("NVIDIA H20", 78, "9.0", 95.0),
    ("NVIDIA H800", 132, "9.0", 79.1),
    ("NVIDIA T400", 6, "7.5", 3.8),
    ("Tesla V100-FHHL-16GB", 80, "7.0", 15.8),
    ("AMD Instinct MI300X", 304, "9.4", 191.0),
    ("NVIDIA H200 MIG 1g.18gb", 16, "9.0", 16.0),
]


def device(name, num_sms=None, capability=None, gib=None):
    return Device(id="cuda:0", name=name, kind="cuda", num_sms=num_sms, capability=capability, memory_bytes=int(gib * GIB) if gib else None)


@pytest.mark.parametrize("peak", [p for p in peaks.table() if p.is_clock_independent], ids=lambda p: p.key)
def test_the_fp16_column_is_what_sms_rate_and_clock_give(peak):
    assert peak.num_sms * peak.flop_per_clk_sm * peak.boost_mhz * 1e6 == pytest.approx(peak.flops["fp16"], rel=0.02)


def test_only_rows_known_to_be_solved_from_their_peak_escape_that_check():
    assert {p.key for p in peaks.table() if not p.is_clock_independent} == {"A10G", "H100 PCIe", "H100 NVL", "H200 NVL", "B200", "B300"}


@pytest.mark.parametrize("peak", peaks.table(), ids=lambda p: p.key)
def test_the_other_columns_follow_from_the_architecture(peak):
    """measuring.md B.2: fp8 and int8 twice fp16 (GeForce int8 four times), tf32 half (GeForce: the fp32 rate), bf16 the same or absent, CUDA-core fp32 per SM and clock."""
    fp16, major = peak.flops["fp16"], float(peak.capability)
    geforce = "GeForce" in peak.name
    assert peak.flops.get("bf16", fp16) == fp16
    assert ("bf16" in peak.flops) == ("tf32" in peak.flops) == (major >= 8.0)
    assert ("fp8" in peak.flops) == (major >= 8.9)
    if "fp8" in peak.flops:
        assert peak.flops["fp8"] == pytest.approx(2 * fp16, rel=0.02)
    if "int8" in peak.flops:
        assert peak.flops["int8"] == pytest.approx((4 if geforce else 2) * fp16, rel=0.02)
    if "tf32" in peak.flops:
        assert peak.flops["tf32"] == pytest.approx(peak.flops["fp32"] if geforce else fp16 / 2, rel=0.02)
    if (
        not peak.is_clock_independent or peak.capability == "9.0"
    ):  # Hopper's sheet counts CUDA cores with 1980 MHz and tensor cores with 1830
        return
    per_clk = peak.flops["fp32"] / (peak.num_sms * peak.boost_mhz * 1e6)
    assert per_clk == pytest.approx(256 if major >= 8.6 else 128, rel=0.03)
    assert peak.source


@pytest.mark.parametrize(("name", "num_sms", "capability", "gib", "key"), REAL, ids=[r[0] for r in REAL])
def test_a_real_card_fits_exactly_its_own_row(name, num_sms, capability, gib, key):
    found = [p.key for p in peaks.table() if p.matches(device(name, num_sms, capability, gib))]
    assert found == [key]
    spec = peaks.spec_ceilings(device(name, num_sms, capability, gib))
    assert spec.flops("float16", "spec") == peaks.find(device(name, num_sms, capability, gib)).flops["fp16"]
    assert not spec.notes and all(row.kind == "spec" and row.source for row in spec.rows)


def test_every_row_is_reached_by_some_real_card():
    assert {p.key for p in peaks.table()} - {row[-1] for row in REAL} == {"V100 PCIe 32GB"}


@pytest.mark.parametrize(("name", "num_sms", "capability", "gib"), STRANGERS, ids=[r[0] for r in STRANGERS])
def test_a_card_that_only_sounds_alike_stays_unknown_and_says_so(name, num_sms, capability, gib):
    spec = peaks.spec_ceilings(device(name, num_sms, capability, gib))
    assert spec.rows == ()
    assert name in spec.notes[0]
    assert spec.flops("float16", "spec") is None and spec.bandwidth("spec") is None


def test_a_name_that_two_rows_share_is_not_guessed():
    assert peaks.find(device("NVIDIA GH200 480GB", 132, "9.0")) is None
    assert "GH200 96GB or GH200 144GB" in peaks.spec_ceilings(device("NVIDIA GH200 480GB", 132, "9.0")).notes[0]


def test_the_h200_has_the_figures_of_its_sheet():
    spec = peaks.spec_ceilings(device("NVIDIA H200", 132, "9.0", 139.8))
    wanted = {"fp64": 67, "fp32": 67, "tf32": 494, "fp16": 989, "bf16": 989, "fp8": 1979, "int8": 1979}
    assert {q: spec.flops(q, "spec") / 1e12 for q in wanted} == wanted
    assert spec.bandwidth("spec") == 4.8e12


def test_what_a_gpu_lacks_is_absent():
    t4 = peaks.spec_ceilings(device("Tesla T4", 40, "7.5", 14.58))
    assert t4.flops("bfloat16", "spec") is None and t4.flops("tf32", "spec") is None and t4.flops("fp8", "spec") is None
    assert peaks.spec_ceilings(device("NVIDIA B300 SXM6 AC", 148, "10.3", 267.7)).flops("int8", "spec") is None


def test_only_cards_that_boost_by_themselves_have_a_soft_limit():
    geforce = peaks.find(device("NVIDIA GeForce RTX 4090", 128, "8.9", 23.5))
    h200 = peaks.find(device("NVIDIA H200", 132, "9.0", 139.8))
    assert geforce.limit("fp16", 165e12, 3105) == pytest.approx(165e12 * 3105 / 2520)
    assert geforce.limit("fp16", 165e12, None) == geforce.limit("fp16", 165e12, 2000) == 165e12
    assert h200.limit("fp16", 989e12, 1980) == 989e12


def test_a_cpu_has_no_data_sheet_and_the_null_device_its_own():
    assert peaks.spec_ceilings(Device(id="cpu", name="x", kind="cpu")).rows == ()
    spec = peaks.spec_ceilings(null.DEVICE)
    assert {row.kind for row in spec.rows} == {"spec"} and spec.flops("float16", "spec") == 125e12


def test_the_null_device_promises_more_than_it_measures():
    for row in null.CEILINGS.rows:
        spec = null.CEILINGS.find(row.quantity, "spec")
        assert spec is None or spec.value >= row.value
    assert replace(null.DEVICE, name="x").ceilings.flops("float16", "measured") == 100e12
