"""This machine -> the CPU as a device: its name, the cores and the memory this process may use, its last-level cache."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


def name(proc: Path = _PROC) -> str:
    """`model name` of /proc/cpuinfo; the architecture where there is none, as on ARM."""
    for line in _read(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "cpu"


def num_cores(cgroup: Path = _CGROUP) -> int:
    """Cores this process may use: its affinity, and the quota of its control group, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def memory_bytes(cgroup: Path = _CGROUP, proc: Path = _PROC) -> int | None:
    """The machine's memory, or the limit of the control group where that is less."""
    known = [
        limit
        for limit in (_total_memory(proc), _number(cgroup / "memory.max"), _number(cgroup / "memory" / "memory.limit_in_bytes"))
        if limit
    ]
    return min(known) if known else None


def free_bytes(cgroup: Path = _CGROUP, proc: Path = _PROC) -> int | None:
    """What programs could still take: the kernel's own estimate, or what is left in the control group where that is less; None where neither is told."""
    known = [value for value in (_meminfo(proc, "MemAvailable"), _left_in(cgroup)) if value is not None]
    return min(known) if known else None


def cache_bytes(cache: Path = _CACHE) -> int | None:
    """The largest cache of the highest level the first core sees."""
    found: list[tuple[int, int]] = []
    for index in sorted(cache.glob("index*")):
        level, size = _read(index / "level").strip(), _read(index / "size").strip()
        if level.isdigit() and size[:-1].isdigit() and size[-1:] in ("K", "M"):
            found.append((int(level), int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]))
    return max(found)[1] if found else None


def resident_bytes(proc: Path = _PROC) -> int | None:
    """Memory this process holds now."""
    fields = _read(proc / "self" / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else None


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time a period, of control groups version 2 or 1."""
    fields = _read(cgroup / "cpu.max").split()
    if len(fields) == 2 and fields[0] != "max":
        return int(fields[0]) / int(fields[1])
    quota, period = _number(cgroup / "cpu" / "cpu.cfs_quota_us"), _number(cgroup / "cpu" / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _left_in(cgroup: Path) -> int | None:
    """Its limit less what it holds; the files it has cached count as free."""
    for limit, held, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        most, now = _number(cgroup / limit), _number(cgroup / held)
        if most is not None and now is not None:
            rows = dict(line.split(None, 1) for line in _read(cgroup / stat).splitlines() if " " in line)
            return max(0, most - now + int(rows.get(cached, "0")))
    return None


def _meminfo(proc: Path, key: str) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _total_memory(proc: Path) -> int | None:
    if (told := _meminfo(proc, "MemTotal")) is not None:
        return told
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() and int(text) > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux, or hidden in a container
        return ""
