"""Host memory is of the size asked, is unlocked before it is freed, and how much there is comes from the control group too."""

import gc
import os

import pytest
import torch

from gpuopt.core.errors import OutOfMemory, UsageError
from gpuopt.streaming import hostpages
from gpuopt.streaming.hostpages import Pages, available_bytes, cpus_of, near, node_of

GIB = 1 << 30


class Runtime:
    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple] = []

    def cudaHostRegister(self, address, num_bytes, flags):
        self.calls.append(("register", address, num_bytes))
        return self.code

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


def test_pages_are_zeros_of_the_size_asked_on_a_page_of_their_own():
    pages = Pages(5000)
    assert pages.bytes.dtype is torch.uint8 and pages.bytes.numel() == 5000
    assert pages.bytes.data_ptr() % 4096 == 0 and not pages.bytes.any() and not pages.pinned


def test_views_outlive_closed_pages():
    pages = Pages(4 << 20)
    view = pages.bytes[4096:]
    view.fill_(3)
    pages.close()
    pages.close()
    gc.collect()
    assert view.eq(3).all()
    with pytest.raises(ValueError, match="after it was closed"):
        _ = pages.bytes


def test_locking_registers_what_was_asked_and_closing_unregisters_it_once():
    runtime, pages = Runtime(), Pages(5000)
    address = pages.bytes.data_ptr()
    told = []
    assert pages.pin(runtime, lambda: told.append("error"), lambda: told.append("unpinned")) == 0 and pages.pinned
    pages.close()
    pages.close()
    assert runtime.calls == [("register", address, 5000), ("unregister", address)] and told == ["unpinned"] and not pages.pinned


def test_pages_that_are_dropped_are_unregistered():
    runtime, pages = Runtime(), Pages(5000)
    pages.pin(runtime, lambda: None)
    del pages
    gc.collect()
    assert [call[0] for call in runtime.calls] == ["register", "unregister"]


def test_a_refused_lock_clears_the_error_and_keeps_the_bytes():
    runtime, pages, cleared = Runtime(code=2), Pages(5000), []
    pages.bytes.fill_(9)
    assert pages.pin(runtime, lambda: cleared.append(1)) == 2
    assert cleared == [1] and not pages.pinned and pages.bytes.eq(9).all()
    pages.close()
    assert [call[0] for call in runtime.calls] == ["register"], "what was not registered is not unregistered"


def test_memory_that_cannot_be_is_an_error_with_a_way_out():
    with pytest.raises(UsageError):
        Pages(0)
    with pytest.raises(OutOfMemory, match="no 4,611,686,018,427,387,904 bytes") as caught:
        Pages(1 << 62)
    assert "--disk" in caught.value.fix


def machine(tmp_path, available=64 * GIB, cgroup="0::/\n", **files):
    """A made-up /proc and /sys: `files` are path -> text, with `__` for `/`."""
    written = {"proc/meminfo": f"MemTotal: 999 kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n", "proc/self/cgroup": cgroup}
    written |= {name.replace("__", "/"): text for name, text in files.items()}
    for name, text in written.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


def group(folder, limit, usage, stat="", version=2):
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{usage}\n", f"{folder}/memory.stat": stat}


def test_without_a_group_the_system_says_what_is_free(tmp_path):
    assert available_bytes(machine(tmp_path)) == 64 * GIB


def test_a_group_of_version_2_counts_and_its_page_cache_is_free(tmp_path):
    files = group("sys/fs/cgroup", 10 * GIB, 7 * GIB, f"anon 5\ninactive_file {2 * GIB}\n")
    assert available_bytes(machine(tmp_path, **files)) == 5 * GIB


def test_the_tightest_of_a_groups_ancestors_counts(tmp_path):
    files = group("sys/fs/cgroup/a/b", 40 * GIB, 0) | group("sys/fs/cgroup/a", 9 * GIB, 3 * GIB)
    assert available_bytes(machine(tmp_path, cgroup="0::/a/b\n", **files)) == 6 * GIB


def test_a_group_without_a_limit_does_not(tmp_path):
    assert available_bytes(machine(tmp_path, **group("sys/fs/cgroup", "max", 7 * GIB))) == 64 * GIB
    one = group("sys/fs/cgroup/memory", 9223372036854771712, 7 * GIB, version=1)
    assert available_bytes(machine(tmp_path, cgroup="3:memory:/\n", **one)) == 64 * GIB


def test_version_1_within_a_container_is_read_at_the_top(tmp_path):
    files = group("sys/fs/cgroup/memory", 8 * GIB, 5 * GIB, f"total_inactive_file {GIB}\n", version=1)
    text = "12:cpu,cpuacct:/docker/f00\n4:hugetlb,memory:/docker/f00\n0::/\n"
    assert available_bytes(machine(tmp_path, cgroup=text, **files)) == 4 * GIB


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    assert available_bytes(machine(tmp_path, **group("sys/fs/cgroup", 5 * GIB, 6 * GIB))) == 0


def test_this_machine_has_memory():
    assert available_bytes() > 0


def test_a_device_hangs_on_a_node_or_the_system_does_not_say(tmp_path):
    root = machine(tmp_path, sys__bus__pci__devices__placeholder="")
    device = tmp_path / "sys/bus/pci/devices/0000:1a:00.0"
    assert node_of("0000:1A:00.0", root) is None
    device.mkdir(parents=True)
    (device / "numa_node").write_text("-1\n")
    assert node_of("0000:1A:00.0", root) is None
    (device / "numa_node").write_text("1\n")
    assert node_of("0000:1A:00.0", root) == 1


def test_lists_of_cpus_are_read(tmp_path):
    folder = tmp_path / "sys/devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text("0-2,8,10-11\n")
    assert cpus_of(1, str(tmp_path)) == {0, 1, 2, 8, 10, 11}
    assert cpus_of(2, str(tmp_path)) == frozenset()


@pytest.mark.parametrize("cpus", ["first", "foreign"])
def test_near_a_device_the_thread_stays_on_its_cpus_and_returns(tmp_path, monkeypatch, cpus):
    before = os.sched_getaffinity(0)
    mine = {min(before)} if cpus == "first" else {4095}
    monkeypatch.setattr(hostpages, "node_of", lambda address, root: 0)
    monkeypatch.setattr(hostpages, "cpus_of", lambda node, root: frozenset(mine))
    with near("0000:1a:00.0") as node:
        assert os.sched_getaffinity(0) == (mine if cpus == "first" else before)
        assert node == (0 if cpus == "first" else None)
    assert os.sched_getaffinity(0) == before


def test_near_nothing_known_changes_nothing(tmp_path):
    before = os.sched_getaffinity(0)
    for address in (None, "0000:1a:00.0"):
        with near(address, str(tmp_path)) as node:
            assert node is None and os.sched_getaffinity(0) == before


def test_what_a_process_could_give_back_is_told_apart_from_what_files_stand_behind(tmp_path):
    status = tmp_path / "proc/self/status"
    status.parent.mkdir(parents=True)
    status.write_text("Name:\tpython\nVmRSS:\t 3000 kB\nRssAnon:\t 2000 kB\nRssFile:\t 1000 kB\n")
    assert hostpages.anonymous_bytes(str(tmp_path)) == 2000 * 1024
    status.write_text("VmRSS:\t 3000 kB\n")
    assert hostpages.anonymous_bytes(str(tmp_path)) == 3000 * 1024
    status.unlink()
    assert hostpages.anonymous_bytes(str(tmp_path)) == 0
    assert hostpages.anonymous_bytes() > 2**20
