"""The cores of this process -> what each of several children that build at the same time gets of them."""

from __future__ import annotations

import os

from gpuopt.core.result import Device
from gpuopt.devices import cpu


def cores() -> int:
    """Of this process: its affinity and the quota of its container."""
    return cpu.num_cores()


def share_of_cores(device: Device, jobs: int) -> dict[str, str]:
    """Their share of the cores for candidates of a GPU that are built at once: eight processes with a thread a core each took five times as long as one after the other.

    A CPU's candidates keep them all: they are what is timed.
    """
    if jobs < 2 or device.kind == "cpu":
        return {}
    mine = str(max(1, cores() // jobs))
    wanted = {"OMP_NUM_THREADS": mine, "TORCHINDUCTOR_COMPILE_THREADS": mine}
    return {name: value for name, value in wanted.items() if name not in os.environ}
