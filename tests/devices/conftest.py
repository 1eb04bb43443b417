"""A made-up NVIDIA machine: pynvml and torch.cuda with two GPUs that torch numbers the other way round."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest
import torch

from gpuopt.devices import nvml

UUIDS = ("11111111-aaaa", "22222222-bbbb")


class FakeNvml:
    """Answers like pynvml; `missing` names functions this driver does not support, `absent` those this release of pynvml has not got."""

    NVMLError = pynvml.NVMLError
    NVML_SUCCESS = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_TEMPERATURE_GPU = 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    def __init__(self):
        self.missing: set[str] = set()
        self.absent: set[str] = set()
        self.answers = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.82.07",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 3201}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x4 | 0x40,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x1,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=999_999_999, usedGpuMemory=2**30)],
            "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [],
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=3 * 2**30),
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_345_000,
            "nvmlDeviceGetViolationStatus": lambda handle, policy: SimpleNamespace(violationTime=(5_000_000, 0)[policy]),
            "nvmlDeviceGetFieldValues": self._fields,
        }
        self.asked: list[str] = []

    def __getattr__(self, name):
        if not name.startswith("nvml") or name in self.absent or name not in self.answers:
            raise AttributeError(name)

        def call(*args):
            self.asked.append(name)
            if name in self.missing:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.answers[name](*args)

        return call

    @staticmethod
    def _by_uuid(uuid):
        known = [f"GPU-{u}" for u in UUIDS]
        if uuid not in known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"handle of {uuid}"

    @staticmethod
    def _fields(handle, ids):
        return [SimpleNamespace(nvmlReturn=0 if ids[0] != 271 else 3, value=SimpleNamespace(ullVal=ids[0] * 1_000_000))]


@pytest.fixture
def fake_nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setattr(nvml, "pynvml", fake)
    nvml._start.cache_clear()
    yield fake
    nvml._start.cache_clear()


@pytest.fixture
def fake_cuda(monkeypatch, fake_nvml):
    """Two H200s; change `properties`, `arches` or `count` to taste."""
    state = SimpleNamespace(count=2, arches=["sm_80", "sm_90", "compute_90"], capability=(9, 0), cuda="13.0")
    # CUDA_VISIBLE_DEVICES=1,0: torch's first GPU is NVML's second.
    order = tuple(reversed(UUIDS))

    def properties(device):
        index = int(str(device).partition(":")[2] or 0)
        return SimpleNamespace(
            name="NVIDIA H200",
            uuid=order[index],
            major=state.capability[0],
            minor=state.capability[1],
            multi_processor_count=132,
            total_memory=int(139.8 * 2**30),
            L2_cache_size=50 * 2**20,
        )

    monkeypatch.setattr(torch.version, "cuda", state.cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state.count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: state.capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: state.arches)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return state
