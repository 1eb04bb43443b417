"""Which device is meant, whether it can be used, what it is and what it counts; a made-up NVIDIA machine stands in for the real one."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest
import torch

from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.result import Device
from gpuopt.core.spec import Precision
from gpuopt.devices import info, null, nvml


def test_auto_is_the_first_gpu_where_there_is_one(fake_cuda):
    assert info.resolve(None) == info.resolve("auto") == info.resolve("cuda") == info.resolve("cuda:0") == "cuda:0"
    assert info.resolve("CUDA:1") == "cuda:1"


def test_auto_is_the_cpu_where_there_is_none(fake_cuda):
    fake_cuda.count = 0
    assert info.resolve("auto") == "cpu"
    assert info.resolve("cpu") == "cpu" and info.resolve("null") == "null"


def test_auto_is_the_cpu_where_torch_was_not_built_for_the_gpu(fake_cuda):
    fake_cuda.capability = (12, 0)
    fake_cuda.arches = ["sm_80", "sm_90"]
    assert info.resolve("auto") == "cpu"


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:1,2", "cuda:x", "mps", "cpu:0 "])
def test_a_text_that_is_no_device_is_a_usage_error(text):
    with pytest.raises(UsageError, match="not a device"):
        info.resolve(text)


def refused(text):
    with pytest.raises(Unavailable) as caught:
        info.resolve(text)
    assert caught.value.exit_code == 4 and caught.value.fix
    return caught.value.message


def test_a_cpu_build_of_torch_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in refused("cuda")


def test_a_machine_without_a_driver_says_so(fake_cuda, fake_nvml):
    fake_cuda.count = 0
    fake_nvml.missing.add("nvmlInit")
    assert "no NVIDIA driver answers" in refused("cuda")


def test_a_driver_without_a_gpu_says_so(fake_cuda, fake_nvml):
    fake_cuda.count = 0
    fake_nvml.answers["nvmlDeviceGetCount"] = lambda: 0
    assert "finds no GPU" in refused("cuda")


WRONG = [
    ("", "empty"),
    (" , ", "empty"),
    ("-1", "hides every GPU"),
    ("-1,0", "hides every GPU"),
    ("0,0", "twice"),
    ("1, 01", "twice"),
    ("GPU-22222222-bbbb,GPU-22222222-bbbb", "twice"),
    ("7", "names no GPU of this machine (2 there)"),
    ("2,0", "names no GPU of this machine (2 there)"),
    ("all", "names no GPU"),
    ("GPU-33333333", "names no GPU"),
]


@pytest.mark.parametrize(("value", "said"), WRONG)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_wrong_cuda_visible_devices_is_named_with_its_value(fake_cuda, monkeypatch, value, said, device):
    fake_cuda.count = 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(Unavailable) as caught:
        info.resolve(device)
    assert f"CUDA_VISIBLE_DEVICES={value!r}" in caught.value.message and said in caught.value.message
    assert "CUDA_VISIBLE_DEVICES" in caught.value.fix and "0 to 1" in caught.value.fix


@pytest.mark.parametrize("value", ["0", "1,0", "0,9,1", "0,-1"])
def test_a_variable_that_is_right_is_not_blamed_for_what_torch_cannot_do(fake_cuda, fake_nvml, monkeypatch, value):
    """Schedulers set it for every job: a GPU that does not start for another reason must not send anyone to look for the error there."""
    fake_cuda.count = 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)

    def init():
        raise RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu.\nmore")

    monkeypatch.setattr(torch.cuda, "init", init)
    message = refused("cuda")
    assert "CUDA_VISIBLE_DEVICES" not in message and message.endswith("CUDA driver initialization failed, you might not have a CUDA gpu.")
    fake_nvml.answers["nvmlSystemGetCudaDriverVersion_v2"] = lambda: 12080
    assert "12.8" in refused("cuda") and "CUDA_VISIBLE_DEVICES" not in refused("cuda")


@pytest.mark.parametrize(("value", "shown"), [("1", 1), ("0,9,1", 1), ("1,0", 2)])
def test_an_index_beyond_what_the_variable_shows_names_the_variable(fake_cuda, monkeypatch, value, shown):
    fake_cuda.count = shown
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(Unavailable) as caught:
        info.resolve("cuda:7")
    assert f"CUDA_VISIBLE_DEVICES={value!r} shows {shown} GPU" in caught.value.message and "of 2" in caught.value.message
    assert "--device cuda:0" in caught.value.fix and "CUDA_VISIBLE_DEVICES" in caught.value.fix


def test_auto_on_the_cpu_of_a_machine_with_a_gpu_says_why(fake_cuda, fake_nvml, monkeypatch):
    fake_cuda.count = 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    (note,) = info.describe(info.resolve("auto")).notes
    assert "GPU that is not used" in note and "CUDA_VISIBLE_DEVICES='9'" in note
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert info.describe("cpu").notes == (), "somebody wanted it so"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in info.describe("cpu").notes[0]
    fake_nvml.answers["nvmlDeviceGetCount"] = lambda: 0
    assert info.describe("cpu").notes == ()


def test_a_gpu_that_could_be_used_is_no_note_on_the_cpu(fake_cuda):
    assert info.describe("cpu").notes == ()


@pytest.mark.parametrize("visible", [None, "0", "9"])
def test_a_driver_too_old_for_this_torch_is_named_with_both_versions(fake_cuda, fake_nvml, monkeypatch, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    fake_cuda.count = 0
    fake_nvml.answers["nvmlSystemGetCudaDriverVersion_v2"] = lambda: 11040
    with pytest.raises(Unavailable) as caught:
        info.resolve("cuda")
    message = caught.value.message
    assert "11.4" in message and "13.0" in message and "580.82.07" in message and torch.__version__ in message
    assert "CUDA 13" in caught.value.fix and "CUDA 11" in caught.value.fix


def test_a_driver_too_old_is_found_without_nvml_too(fake_cuda, fake_nvml, monkeypatch):
    """A container without the driver's tools: the driver itself is asked."""
    fake_cuda.count = 0
    fake_nvml.missing.add("nvmlInit")
    monkeypatch.setattr(info, "_version_in", lambda library: (12, 4))
    assert "CUDA up to 12.4" in refused("cuda") and "13.0" in refused("cuda")
    monkeypatch.setattr(info, "_version_in", lambda library: None)
    assert "no NVIDIA driver answers" in refused("cuda")


def test_the_drivers_library_is_asked_for_its_version_alone(monkeypatch):
    def answering(code, number):
        def version(pointer):
            pointer._obj.value = number
            return code

        return lambda library: SimpleNamespace(cuDriverGetVersion=version)

    for code, number, wanted in ((0, 12040, (12, 4)), (0, 13000, (13, 0)), (0, 0, None), (3, 12040, None)):
        monkeypatch.setattr(info.ctypes, "CDLL", answering(code, number))
        assert info._version_in("libcuda.so.1") == wanted
    monkeypatch.undo()
    assert info._version_in("libnothing-of-this-name.so.1") is None
    assert info._version_in("libc.so.6") is None, "a library without that function"


def test_an_older_minor_version_of_the_same_cuda_is_no_reason(fake_cuda, fake_nvml, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert info.resolve("cuda") == "cuda:0"


def test_an_index_that_is_not_there_is_refused(fake_cuda):
    assert "there are 2 GPUs, numbered from 0" in refused("cuda:2")
    fake_cuda.count = 1
    assert "there is 1 GPU," in refused("cuda:1")


def test_a_gpu_that_torch_was_not_built_for_is_refused_before_a_kernel_fails(fake_cuda):
    fake_cuda.capability = (7, 0)
    with pytest.raises(Unavailable) as caught:
        info.resolve("cuda:1")
    assert "sm_70" in caught.value.message and "sm_80" in caught.value.message and "NVIDIA H200" in caught.value.message
    assert torch.__version__ in caught.value.message
    assert "an older torch" in caught.value.fix and "sm_70" in caught.value.fix
    fake_cuda.capability = (12, 0)
    fake_cuda.arches = ["sm_80", "sm_90"]
    with pytest.raises(Unavailable) as caught:
        info.resolve("cuda:1")
    assert "a newer torch" in caught.value.fix and "sm_120" in caught.value.fix


def test_ptx_alone_needs_a_driver_whose_compiler_knows_it(fake_cuda, fake_nvml):
    fake_cuda.capability, fake_cuda.arches = (12, 0), ["sm_90", "compute_90"]
    assert info.resolve("cuda") == "cuda:0"
    fake_nvml.answers["nvmlSystemGetCudaDriverVersion_v2"] = lambda: 12080
    message = refused("cuda")
    assert "sm_120" in message and "12.8" in message and "13.0" in message
    fake_cuda.capability = (9, 0)
    assert info.resolve("cuda") == "cuda:0", "machine code needs no compiler"


def test_nothing_runs_on_a_gpu_to_find_out(fake_cuda, monkeypatch):
    def launched(*_, **__):
        raise AssertionError("something ran on the GPU")

    for name in ("init", "_lazy_init", "synchronize", "current_stream", "set_device"):
        monkeypatch.setattr(torch.cuda, name, launched)
    assert info.resolve("cuda") == "cuda:0"
    fake_cuda.capability = (7, 0)
    assert "sm_70" in refused("cuda")


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        (["compute_90a"], (10, 0), False),
        (["compute_90a"], (9, 0), True),
        (["sm_80"], (8, 7), False),
        (["sm_87"], (8, 9), False),
        (["sm_87"], (8, 7), True),
        (["compute_80"], (8, 7), True),
        (["sm_120"], (12, 0), True),
        (["compute_120"], (9, 0), False),
        (["gfx942"], (9, 4), False),
    ],
)
def test_machine_code_runs_within_its_major_version_and_ptx_on_anything_later(arches, capability, runs):
    assert any(info._runs_as_built(a, capability) or info._is_compiled_on(a, capability) for a in arches) is runs


def test_a_gpu_is_described_by_the_handle_of_its_uuid_not_of_its_index(fake_cuda, fake_nvml):
    handles = []
    original = fake_nvml.answers["nvmlDeviceGetTemperature"]
    fake_nvml.answers["nvmlDeviceGetTemperature"] = lambda handle, sensor: handles.append(handle) or original(handle, sensor)
    device = info.describe("cuda:0")
    assert handles == ["handle of GPU-22222222-bbbb"]
    assert device.uuid == "GPU-22222222-bbbb"
    assert (device.name, device.capability, device.num_sms, device.cache_bytes) == ("NVIDIA H200", "9.0", 132, 50 * 2**20)
    assert device.clocks_mhz == {"sm": 1755, "sm_max": 1980, "memory": 3201, "memory_max": 3201}
    assert (device.power_limit_w, device.temperature_c, device.driver) == (700.0, 41, "580.82.07")
    assert device.throttle_reasons == ("power cap", "hardware thermal")
    assert device.other_processes == 1
    assert device.notes == ()


def test_older_names_of_the_event_reasons_are_read_too(fake_cuda, fake_nvml):
    fake_nvml.absent.add("nvmlDeviceGetCurrentClocksEventReasons")
    assert info.describe("cuda:0").throttle_reasons == ("idle",)


def test_a_driver_that_tells_nothing_leaves_everything_unknown(fake_cuda, fake_nvml):
    fake_nvml.missing = {name for name in fake_nvml.answers if name.startswith("nvmlDeviceGet") and "UUID" not in name}
    device = info.describe("cuda:0")
    assert device.clocks_mhz == {} and device.throttle_reasons == ()
    assert device.power_limit_w is device.temperature_c is device.other_processes is None
    assert info.throttle_counters("cuda:0") == {} and info.energy_counter("cuda:0")() is None and info.memory_used("cuda:0") is None


def test_without_nvml_the_gpu_is_still_described_and_the_note_says_what_is_missing(fake_cuda, fake_nvml):
    fake_nvml.missing.add("nvmlInit")
    device = info.describe("cuda:1")
    assert device.name == "NVIDIA H200" and device.driver is None and device.other_processes is None
    assert "NVML does not answer" in device.notes[0]
    assert info.throttle_counters("cuda:1") == {} and info.energy_counter("cuda:1")() is None and info.memory_used("cuda:1") is None


def test_a_gpu_without_a_data_sheet_carries_the_note(fake_cuda):
    fake_cuda.capability = (9, 9)
    fake_cuda.arches = ["compute_90"]
    assert "no data sheet" in info.describe("cuda:0").notes[0]


def test_counters_are_joules_and_milliseconds(fake_cuda, fake_nvml):
    assert info.energy_counter("cuda:0")() == 12_345.0
    counted = info.throttle_counters("cuda:0")
    # The driver does not know field 271: absent, not zero.
    assert counted == {"power": 5.0, "thermal": 0.0, "software thermal": 269.0, "hardware thermal": 270.0}


def test_our_own_processes_are_not_others(fake_cuda, fake_nvml):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        pids = [os.getpid(), child.pid, 1]
        fake_nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = lambda handle: [
            SimpleNamespace(pid=p, usedGpuMemory=None) for p in pids
        ]
        assert info.describe("cuda:0").other_processes == 1
    finally:
        child.communicate(b"\n")


def test_memory_is_our_own_where_the_driver_knows_us_and_everybodys_else(fake_cuda, fake_nvml):
    assert info.memory_used("cuda:0") == 3 * 2**30
    fake_nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = lambda handle: [SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**20)]
    assert info.memory_used("cuda:0") == 2**20


def test_what_the_driver_keeps_for_itself_is_held_by_nobody(fake_cuda, fake_nvml):
    total = torch.cuda.get_device_properties("cuda:0").total_memory
    fake_nvml.answers["nvmlDeviceGetMemoryInfo"] = lambda handle: SimpleNamespace(
        total=total + 2**29, used=2**29 + 2**20, free=total - 2**20
    )
    assert info.memory_held("cuda:0") == 2**20
    assert info.memory_held("cpu") is None


def test_a_cpu_and_the_null_device_count_nothing():
    for device in ("cpu", "null"):
        assert info.energy_counter(device)() is None and info.throttle_counters(device) == {}
    assert info.memory_used("cpu") > 0 and info.memory_used("null") is None


def test_the_cpu_is_described():
    device = info.describe("cpu")
    assert device.kind == "cpu" and device.name and device.num_cores >= 1 and device.memory_bytes > 2**28
    assert info.describe("null") is null.DEVICE


@pytest.mark.parametrize(
    ("capability", "lacking"),
    [
        ("7.0", {"tf32", "bf16", "fp8", "int8", "w8", "w4"}),
        ("7.5", {"tf32", "bf16", "fp8", "w8", "w4"}),
        ("8.0", {"fp8"}),
        ("8.6", {"fp8"}),
        ("8.9", set()),
        ("9.0", set()),
        ("10.0", set()),
    ],
)
def test_a_gpu_says_which_precisions_it_lacks(capability, lacking):
    device = Device(id="cuda:0", name="Some GPU", kind="cuda", capability=capability)
    found = {p.value: info.supports(device, p) for p in Precision}
    assert {p for p, reason in found.items() if reason} == lacking
    assert all(capability in reason and "Some GPU" in reason for reason in found.values() if reason)


def test_a_cpu_computes_in_everything_but_tf32_and_says_what_it_emulates():
    device = Device(id="cpu", name="x", kind="cpu")
    assert {p.value for p in Precision if info.supports(device, p)} == {"tf32"}
    assert {p.value for p in Precision if info.emulates(device, p)} == {"fp8", "int8", "w8", "w4"}
    assert not any(info.emulates(Device(id="cuda:0", name="x", kind="cuda", capability="9.0"), p) for p in Precision)
    assert not any(info.supports(null.DEVICE, p) for p in Precision)


def test_every_nvml_function_asked_for_exists_in_the_installed_release():
    """`ask` forgives a missing function, so a misspelt one would go unnoticed."""
    asked = set(re.findall(r'"(nvml\w+)"', inspect.getsource(nvml)))
    assert len(asked) > 10
    assert [name for name in sorted(asked) if not hasattr(pynvml, name)] == []


def test_field_ids_are_those_of_the_installed_release():
    for reason, name in nvml._FIELDS.items():
        assert getattr(pynvml, name) == nvml._DEFAULT_FIELD_IDS[reason]
    assert all(hasattr(pynvml, name) for name in nvml._VIOLATIONS.values())
    for bit, name in (
        (0x4, "SwPowerCap"),
        (0x8, "HwSlowdown"),
        (0x20, "SwThermalSlowdown"),
        (0x40, "HwThermalSlowdown"),
        (0x80, "HwPowerBrakeSlowdown"),
    ):
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") == bit
        assert bit in nvml.EVENT_REASONS


@pytest.mark.gpu
def test_a_real_gpu_tells_what_it_is():
    device = info.describe("cuda")
    assert device.kind == "cuda" and device.uuid.startswith("GPU-") and device.driver and device.clocks_mhz["sm_max"] > 500
    assert info.energy_counter("cuda:0")() > 0
    assert info.memory_used("cuda:0") > 0
    assert "power" in info.throttle_counters("cuda:0")
