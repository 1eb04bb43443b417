"""A search with real children on a GPU, killed at random instants, the whole process at once, and resumed: the same trials, the same outcomes, the same winner.

Each has a GPU to itself: two searches on one would time each other, and another winner would be no fault of theirs.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

KILLS = 5


def command(folder: Path, name: str, device: str, backend: str) -> list[str]:
    options = [
        "--device",
        device,
        "--backend",
        backend,
        "--precision",
        "fp32",
        "--rewrite",
        "none",
        "--batch",
        "1",
        "--max-time",
        "0.5s",
        "--pairs",
        "15",
    ]
    options += ["-o", str(folder / name), "--json", str(folder / f"{name}.json"), "--quiet", "--force"]
    return [sys.executable, "-m", "gpuopt", "optimize", "gpuopt.models:bert_large_tiny", *options]


def started(folder: Path, name: str, device: str, backend: str, *more: str, gpu: str | None = None) -> subprocess.Popen[bytes]:
    surroundings = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})}
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([*command(folder, name, device, backend), *more], stdout=log, stderr=log, env=surroundings)


def told(path: Path) -> Any:
    """What of a report is no measurement."""
    search = json.loads(path.read_text())["search"]
    choice = search["choice"]
    return [(t["key"], t["origin"], t["outcome"]) for t in search["trials"]], choice["key"], choice["keeps_input"]


def killed_and_resumed(folder: Path, number: int, after_s: float, device: str, backend: str, gpus: queue.SimpleQueue[str | None]) -> Any:
    name, gpu = f"k{number}", gpus.get()
    try:
        process = started(folder, name, device, backend, gpu=gpu)
        time.sleep(after_s)
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = folder / f"{name}.search.jsonl"
        print(
            f"{name}: killed after {after_s:.1f} s, {'running' if was_running else 'over'}, {len(journal.read_bytes().splitlines()) if journal.exists() else 0} lines of journal"
        )
        more = ["--resume"] if journal.exists() else []
        again = started(folder, name, device, backend, *more, gpu=gpu)
        assert again.wait(timeout=400) == 0, (folder / f"{name}.log").read_text()[-2000:]
    finally:
        gpus.put(gpu)
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(f".{name}")) == []
    return was_running, told(folder / f"{name}.json")


def compare(folder: Path, device: str, backend: str, gpus: Sequence[str | None]) -> None:
    # The first one measures the machine's ceilings, which are kept: the second takes as long as those that are killed.
    for name in ("first", "whole"):
        began = time.monotonic()
        assert started(folder, name, device, backend, gpu=gpus[0]).wait(timeout=400) == 0, (folder / f"{name}.log").read_text()[-2000:]
        took = time.monotonic() - began
    wanted = told(folder / "whole.json")
    assert wanted[1] and not wanted[2], "something faster was found, so there is a winner to lose"
    draw = random.Random(KILLS)
    instants = [draw.uniform(0.1 * took, took) for _ in range(KILLS)]
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)
    with ThreadPoolExecutor(max_workers=len(gpus)) as pool:
        found = list(pool.map(lambda n: killed_and_resumed(folder, n, instants[n], device, backend, free), range(KILLS)))
    assert sum(was_running for was_running, _ in found) >= KILLS - 1, "the instants lie within a search"
    assert [report for _, report in found] == [wanted] * KILLS
    time.sleep(1.0)
    # Whoever is left would have the folder of this test in its command line, or be a worker of a killed command.
    assert str(folder) not in " ".join(Path(p, "cmdline").read_text() for p in map(Path, _processes()))


def _processes() -> list[str]:
    return [f"/proc/{entry}" for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid() and _readable(entry)]


def _readable(entry: str) -> bool:
    try:
        return bool(Path("/proc", entry, "cmdline").read_text())
    except OSError:
        return False


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_five_kills_on_a_gpu(tmp_path: Path) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    compare(tmp_path, "cuda", "cudagraphs", visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())])
