"""A number of events -> a trace file with about as many, in Kineto's own layout: a transformer's layers on an H100, ops with shapes and strides, launches, arrows, kernels.

`python tests/profiling/kineto.py 1000000 /tmp/million.json`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

HEAD = """{
  "schemaVersion": 1,
  "deviceProperties": [
  {
    "id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85017493504,
    "computeMajor": 9, "computeMinor": 0, "maxThreadsPerBlock": 1024, "numSms": 132
  }
  ],
  "record_shapes": 1,
  "cuda_runtime_version": 12080,
  "displayTimeUnit": "ms",
  "baseTimeNanoseconds": 1759320000000000000,
  "traceEvents": [
"""
TAIL = """  {
    "name": "Record Window End", "ph": "i", "s": "g", "pid": "", "tid": "", "ts": 1.0
  }
  ],
  "traceName": "million.json"
}
"""
STEP = """  {{
    "ph": "X", "cat": "user_annotation", "name": "ProfilerStep#{number}", "pid": 1189, "tid": 1189,
    "ts": {ts:.3f}, "dur": {dur:.3f},
    "args": {{
      "External id": {number},"Record function id": 0, "Ev Idx": 0
    }}
  }},
"""
OP = """  {{
    "ph": "X", "cat": "cpu_op", "name": "{name}", "pid": 1189, "tid": 1189,
    "ts": {ts:.3f}, "dur": {dur:.3f},
    "args": {{
      "External id": {external},"Record function id": 0, "Concrete Inputs": ["", "", ""], "Input type": [{types}], "Input Strides": [[1024, 1], [1, 1024], []], "Input Dims": [{dims}], "Ev Idx": {external}
    }}
  }},
"""
KERNEL = """  {{
    "ph": "X", "cat": "kernel", "name": "{name}", "pid": 0, "tid": 7,
    "ts": {ts:.3f}, "dur": {dur:.3f},
    "args": {{
      "External id": {external},      "queued": 0, "device": 0, "context": 1,      "stream": 7, "correlation": {correlation},      "registers per thread": 32,      "shared memory": 0,      "blocks per SM": 31.030304,      "warps per SM": 124.121216,      "grid": [4096, 1, 1],      "block": [128, 1, 1],      "est. achieved occupancy %": 100
    }}
  }},
  {{
    "ph": "f", "id": {correlation}, "pid": 0, "tid": 7, "ts": {ts:.3f},
    "cat": "ac2g", "name": "ac2g", "bp": "e"
  }},
"""
LAUNCH = """  {{
    "ph": "X", "cat": "{category}", "name": "{name}", "pid": 1189, "tid": 1189,
    "ts": {ts:.3f}, "dur": 4.125,
    "args": {{
      "External id": {external},      "cbid": 211, "correlation": {correlation}
    }}
  }},
  {{
    "ph": "s", "id": {correlation}, "pid": 1189, "tid": 1189, "ts": {ts:.3f},
    "cat": "ac2g", "name": "ac2g"
  }},
"""
_HALF = '"c10::Half", "c10::Half", "c10::Half"'
_ADD = (
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >"
    "(int, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul>)"
)
_NORM = (
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float, false>"
    "(int, float, c10::Half const*, c10::Half const*, c10::Half const*, float*, float*, c10::Half*)"
)
# (ops from the outside in, operands of each, kernel, its µs, the call that launches it)
LAYER = (
    (("aten::linear", "aten::t", "aten::addmm"), "[3072], [512, 1024], [1024, 3072]", "nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_TNT", 31.0, "cuLaunchKernelEx"),
    (("aten::add",), "[1, 512, 1024], [1, 512, 1024], []", _ADD, 5.0, "cudaLaunchKernel"),
    (("aten::layer_norm", "aten::native_layer_norm", "aten::empty"), "[1, 512, 1024], [], [1024]", _NORM, 11.0, "cudaLaunchKernel"),
    (("aten::linear", "aten::t", "aten::transpose", "aten::addmm"), "[1024], [512, 4096], [4096, 1024]", "nvjet_sm90_hsh_64x64_64x13_2x1_v_bz_TNT", 27.0, "cuLaunchKernelEx"),
    (("aten::contiguous", "aten::clone", "aten::copy_"), "[1, 16, 512, 64], [1, 16, 512, 64], []", _ADD.replace("CUDAFunctor_add", "direct_copy_kernel_cuda"), 6.0, "cudaLaunchKernel"),
)  # fmt: skip
STEP_LAYERS = 120


def pieces(num_events: int) -> Iterator[str]:
    """The file's text in pieces, of `num_events` entries of traceEvents or a few more."""
    yield HEAD
    written, step, correlation, ts = 2, 0, 0, 4426275440000.0
    while written < num_events:
        began, kept = ts, []
        for _ in range(STEP_LAYERS):
            for names, dims, kernel, dur, launch in LAYER:
                correlation += 1
                length = 8.0 * len(names) + 8.0
                for depth, name in enumerate(names):
                    kept.append(
                        OP.format(name=name, ts=ts + depth * 2.0, dur=length - depth * 4.0, external=correlation * 8 + depth, types=_HALF, dims=dims)
                    )  # fmt: skip
                category = "cuda_driver" if launch.startswith("cu") and not launch.startswith("cuda") else "cuda_runtime"
                external, at = correlation * 8 + len(names) - 1, ts + len(names) * 2.0
                kept.append(LAUNCH.format(category=category, name=launch, ts=at, external=external, correlation=correlation))
                kept.append(KERNEL.format(name=kernel, ts=at + 6.5, dur=dur, external=external, correlation=correlation))
                written += len(names) + 4
                ts += length + 3.0
            if written >= num_events:
                break
        written += 1
        yield STEP.format(number=step, ts=began, dur=ts - began)
        yield from kept
        step += 1
    yield TAIL


def write(path: Path, num_events: int) -> Path:
    """Write such a file."""
    with path.open("w") as file:
        file.writelines(pieces(num_events))
    return path


if __name__ == "__main__":
    write(Path(sys.argv[2]), int(sys.argv[1]))
