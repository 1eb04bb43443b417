"""Names -> a process each, as many at a time as there are GPUs, until a deadline: what the runners of this folder that take long do."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from gpuopt.core.errors import UsageError

T = TypeVar("T")

ROOT = Path(__file__).parent.parent


def lanes(
    names: Sequence[str],
    output: Path,
    one: Callable[[str, int, float], T],
    line: Callable[[T], str],
    *,
    gpus: int,
    deadline_s: float,
    grace_s: float,
) -> list[T]:
    """`one(name, gpu, seconds left)` of every name, `gpus` at a time; `line` of each is printed. Nothing is begun shortly before the deadline. Raises UsageError where the
    folder cannot be made."""
    began = time.monotonic()
    try:
        (output / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output.name} cannot be made: {error.strerror}", fix="--output DIR") from error
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    found: list[T] = []
    guard = threading.Lock()

    def work(gpu: int) -> None:
        while True:
            left = deadline_s - (time.monotonic() - began)
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            if left < 3 * grace_s:
                with guard:
                    print(f"{name}: not begun, the {deadline_s:.0f} s were over", flush=True)
                continue
            ended = one(name, gpu, left - grace_s)
            with guard:
                found.append(ended)
                print(line(ended), flush=True)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in range(gpus)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


def environment(gpu: int, *, on_gpu: bool) -> dict[str, str]:
    """Of a process on this GPU of those that are visible, with the recipes in its path."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if on_gpu:
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        found["CUDA_VISIBLE_DEVICES"] = visible[gpu] if gpu < len(visible) else str(gpu)
    return found


def ended(command: Sequence[str], surroundings: Mapping[str, str], log: Path, *, limit_s: float, grace_s: float) -> tuple[str, int]:
    """Run it with its children, at most this long and `grace_s` more to write what it has: (why it was ended, or ""; its exit code)."""
    reason = ""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            reason = f"ended after {limit_s:.0f} s"
            process.send_signal(signal.SIGINT)  # its own way out: what was measured is written, its children are ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return reason, process.returncode
