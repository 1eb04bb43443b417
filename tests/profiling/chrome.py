"""Chrome traces as production jobs write them, as plain dicts: a few steps of a model on an H100, a CPU, an MI300."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

H100 = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85017493504, "computeMajor": 9, "computeMinor": 0, "numSms": 132}


def gpu_events(
    steps: int = 3, *, has_shapes: bool = True, has_steps: bool = True, launch: str = "cudaLaunchKernel"
) -> list[dict[str, Any]]:
    """Each step of 1000 µs: a pageable copy of 1 MB (100 µs), two products of 200 µs launched one after the other."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
    correlation = 0
    for step in range(steps):
        base = 7.0e12 + step * 1000.0
        if has_steps:
            events.append(
                {"ph": "X", "cat": "user_annotation", "name": f"ProfilerStep#{step + 5}", "pid": 1, "tid": 1, "ts": base, "dur": 999.0}
            )
            events.append(
                {"ph": "X", "cat": "gpu_user_annotation", "name": f"ProfilerStep#{step + 5}", "pid": 0, "tid": 7, "ts": base, "dur": 999.0}
            )
        correlation += 1
        events.append(
            {
                "ph": "X",
                "cat": "cpu_op",
                "name": "aten::copy_",
                "pid": 1,
                "tid": 1,
                "ts": base + 5,
                "dur": 120.0,
                "args": {"External id": correlation},
            }
        )
        events.append(
            {
                "ph": "X",
                "cat": "cuda_runtime",
                "name": "cudaMemcpyAsync",
                "pid": 1,
                "tid": 1,
                "ts": base + 8,
                "dur": 110.0,
                "args": {"correlation": correlation},
            }
        )
        events.append(
            {
                "ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "pid": 0, "tid": 7, "ts": base + 15, "dur": 100.0,
                "args": {"correlation": correlation, "stream": 7, "bytes": 1_000_000, "device": 0},
            }
        )  # fmt: skip
        for number in range(2):
            correlation += 1
            at = base + 200 + 300 * number
            shapes = {"Input Dims": [[64, 1024], [1024, 4096]], "Input type": ["c10::Half", "c10::Half"]} if has_shapes else {}
            events.append(
                {
                    "ph": "X",
                    "cat": "cpu_op",
                    "name": "aten::mm",
                    "pid": 1,
                    "tid": 1,
                    "ts": at,
                    "dur": 50.0,
                    "args": {"External id": correlation, **shapes},
                }
            )
            events.append(
                {
                    "ph": "X",
                    "cat": "cuda_runtime",
                    "name": launch,
                    "pid": 1,
                    "tid": 1,
                    "ts": at + 10,
                    "dur": 5.0,
                    "args": {"correlation": correlation},
                }
            )
            events.append({"ph": "s", "cat": "ac2g", "name": "ac2g", "id": correlation, "pid": 1, "tid": 1, "ts": at + 10})
            events.append(
                {
                    "ph": "X", "cat": "kernel", "name": "nvjet_hsh_64x64_TNT", "pid": 0, "tid": 7, "ts": at + 20, "dur": 200.0,
                    "args": {"correlation": correlation, "stream": 7, "device": 0, "grid": [64, 1, 1], "block": [128, 1, 1]},
                }
            )  # fmt: skip
    return events


def document(events: list[dict[str, Any]], *properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As Kineto orders it."""
    return {"schemaVersion": 1, "deviceProperties": list(properties), **more, "traceEvents": events, "traceName": "trace.json"}


def written(path: Path, data: Any) -> Path:
    """JSON text or a document -> a file, gzip where its name says so."""
    text = data if isinstance(data, str) else json.dumps(data)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
