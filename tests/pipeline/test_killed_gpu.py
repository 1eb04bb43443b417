"""A search with real children on a GPU, killed at random instants, the whole process at once, and resumed: the same trials, the same outcomes, the same winner."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

KILLS = 5


def command(folder: Path, name: str, device: str, backend: str) -> list[str]:
    options = ["--device", device, "--backend", backend, "--precision", "fp32", "--rewrite", "none", "--batch", "1", "--max-time", "0.3s"]
    options += ["-o", str(folder / name), "--json", str(folder / f"{name}.json"), "--quiet", "--force"]
    return [sys.executable, "-m", "gpuopt", "optimize", "gpuopt.models:bert_large_tiny", *options]


def started(folder: Path, name: str, device: str, backend: str, *more: str) -> subprocess.Popen[bytes]:
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen([*command(folder, name, device, backend), *more], stdout=log, stderr=log)


def told(path: Path) -> Any:
    """What of a report is no measurement."""
    search = json.loads(path.read_text())["search"]
    choice = search["choice"]
    return [(t["key"], t["origin"], t["outcome"]) for t in search["trials"]], choice["key"], choice["keeps_input"]


def killed_and_resumed(folder: Path, number: int, after_s: float, device: str, backend: str) -> Any:
    name = f"k{number}"
    process = started(folder, name, device, backend)
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    more = ["--resume"] if (folder / f"{name}.search.jsonl").exists() else []
    again = started(folder, name, device, backend, *more)
    assert again.wait(timeout=400) == 0, (folder / f"{name}.log").read_text()[-2000:]
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(f".{name}")) == []
    return told(folder / f"{name}.json")


def compare(folder: Path, device: str, backend: str) -> None:
    began = time.monotonic()
    assert started(folder, "whole", device, backend).wait(timeout=400) == 0, (folder / "whole.log").read_text()[-2000:]
    took = time.monotonic() - began
    wanted = told(folder / "whole.json")
    assert wanted[1] and not wanted[2], "something faster was found, so there is a winner to lose"
    draw = random.Random(KILLS)
    instants = [draw.uniform(0.1 * took, took) for _ in range(KILLS)]
    print(f"killed after {', '.join(f'{s:.1f}' for s in instants)} s of {took:.1f} s")
    with ThreadPoolExecutor(max_workers=KILLS) as pool:
        found = list(pool.map(lambda n: killed_and_resumed(folder, n, instants[n], device, backend), range(KILLS)))
    assert found == [wanted] * KILLS
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
    compare(tmp_path, "cuda", "cudagraphs")
