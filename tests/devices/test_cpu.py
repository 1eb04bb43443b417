"""What this process may use of a machine, read from a made-up /proc and /sys."""

from __future__ import annotations

import os

import pytest

from gpuopt.devices import cpu


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_name_is_the_models(tmp_path):
    write(tmp_path / "cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t: x\n")
    assert cpu.name(tmp_path) == "AMD EPYC 9654"


def test_a_machine_without_a_model_name_is_called_by_its_architecture(tmp_path):
    write(tmp_path / "cpuinfo", "processor\t: 0\nBogoMIPS\t: 50\n")
    assert cpu.name(tmp_path)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("max 100000", 6), ("10000000 100000", 6), ("", 6)],
)
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    if quota:
        write(tmp_path / "cpu.max", quota)
    assert cpu.num_cores(tmp_path) == cores


def test_the_older_control_groups_count_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "300000")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000")
    assert cpu.num_cores(tmp_path) == 3
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "-1")
    assert cpu.num_cores(tmp_path) == 6


def test_the_smaller_of_machine_and_container_is_the_memory(tmp_path):
    write(tmp_path / "meminfo", "MemTotal:       24682416 kB\nMemFree: 1 kB\n")
    assert cpu.memory_bytes(tmp_path / "cg", tmp_path) == 24682416 * 1024
    write(tmp_path / "cg" / "memory.max", "max")
    assert cpu.memory_bytes(tmp_path / "cg", tmp_path) == 24682416 * 1024
    write(tmp_path / "cg" / "memory.max", "4294967296")
    assert cpu.memory_bytes(tmp_path / "cg", tmp_path) == 2**32


def test_the_last_level_is_the_cache(tmp_path):
    for index, level, size in ((0, 1, "32K"), (1, 1, "32K"), (2, 2, "1024K"), (3, 3, "36M")):
        write(tmp_path / f"index{index}" / "level", f"{level}\n")
        write(tmp_path / f"index{index}" / "size", f"{size}\n")
    assert cpu.cache_bytes(tmp_path) == 36 * 2**20
    assert cpu.cache_bytes(tmp_path / "nothing") is None


def test_what_is_free_is_the_kernels_estimate_or_what_the_container_has_left(tmp_path):
    assert cpu.free_bytes(tmp_path / "cg", tmp_path) is None
    write(tmp_path / "meminfo", "MemTotal: 24682416 kB\nMemFree: 1 kB\nMemAvailable: 20000000 kB\n")
    assert cpu.free_bytes(tmp_path / "cg", tmp_path) == 20000000 * 1024
    write(tmp_path / "cg" / "memory.max", "4294967296")
    assert cpu.free_bytes(tmp_path / "cg", tmp_path) == 20000000 * 1024, "a limit without what is held says nothing"
    write(tmp_path / "cg" / "memory.current", "3221225472")
    write(tmp_path / "cg" / "memory.stat", "anon 1\ninactive_file 1073741824\n")
    assert cpu.free_bytes(tmp_path / "cg", tmp_path) == 2**31, "files it has cached can be dropped"


def test_this_process_holds_some_memory():
    assert cpu.resident_bytes() > 10 * 2**20
