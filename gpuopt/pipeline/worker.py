"""The child: JSON requests in, one Session, JSON answers out. Started by isolate.py as `python -m gpuopt.pipeline.worker IN OUT`."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

STARTED = time.monotonic()
"""Before anything heavy is imported: cold start counts from here."""

from gpuopt.core import codec  # noqa: E402
from gpuopt.core.errors import BadInput, GateFailed, GpuoptError, OutOfMemory, ResourceError, TimedOut, Unavailable, Unsupported, UsageError  # noqa: E402
from gpuopt.core.generation import GenerateSpec  # noqa: E402
from gpuopt.core.result import Device, Status  # noqa: E402
from gpuopt.core.spec import BenchSpec, Candidate, ModelRef, Tolerance  # noqa: E402
from gpuopt.pipeline import facts, forking  # noqa: E402

PR_SET_PDEATHSIG = 1

ARGUMENTS: dict[str, Any] = {
    "candidate": Candidate,
    "spec": BenchSpec,
    "tolerance": Tolerance,
    "device": Device,
    "ref": ModelRef,
    "generate": GenerateSpec,
}
"""How arguments that are values are read back, by name; every other argument is a plain JSON type."""


def serve(requests: int, replies: int) -> None:
    """Answer until the requests end. One session a child."""
    gc.disable()  # nothing of what is imported is ever garbage: looking for it there takes a tenth of a start, and of every collection before something is timed
    from gpuopt.pipeline.session import Session

    gc.freeze()
    gc.enable()
    answer(requests, replies, lambda progress: Session(progress=progress, started=STARTED), ARGUMENTS)


def answer(requests: int, replies: int, made: Callable[[Callable[[float | None, str], None]], Any], known: Mapping[str, Any]) -> None:
    """A method of the session for each frame, until the requests end. made: the session, from what it tells its progress to. known: as ARGUMENTS."""
    out = os.fdopen(replies, "w", encoding="utf-8")

    def send(frame: dict[str, Any]) -> None:
        out.write(json.dumps(frame, allow_nan=False) + "\n")
        out.flush()

    def progress(fraction: float | None, note: str) -> None:
        send({"progress": [fraction, note]})

    session = made(progress)
    had = forking.imported()
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            frame = json.loads(line)
            verb = frame["do"]
            if verb == "close":
                break
            try:
                found = {"ok": codec.dump(_perform(session, verb, frame["args"], known))}
                now = forking.imported()
                send({**found, "imported": [name for name in now if name not in had]} if now != had else found)
                had = now
            except Exception as error:  # noqa: BLE001 - every failure of a candidate is a result; the parent decides what it means
                send({"error": codec.dump(describe(error, verb))})
    session.close()


def _perform(session: Any, verb: str, arguments: dict[str, Any], known: Mapping[str, Any] = ARGUMENTS) -> Any:
    method: Callable[..., Any] = getattr(session, verb)
    return method(**{k: codec.from_plain(known[k], v, what=k) if k in known and v is not None else v for k, v in arguments.items()})


def describe(error: Exception, verb: str) -> facts.Failure:
    """An exception -> what crosses the process, with its place in the outcome taxonomy."""
    status = classify(error, verb)
    # An allocator's own error is somebody's to act on: give it the type that carries exit code 5.
    if status in (Status.OOM_DEVICE, Status.OOM_HOST) and not isinstance(error, GpuoptError):
        error = OutOfMemory(f"{verb}: {_first_line(error)}", fix="a smaller batch, a narrower precision, or a device with more memory")
    elif status is Status.DISK_FULL and not isinstance(error, GpuoptError):
        error = ResourceError(f"{verb}: {_first_line(error)}", fix="free some disk space and try again")
    known = isinstance(error, GpuoptError)
    return facts.Failure(
        type=type(error).__name__,
        message=error.message if isinstance(error, GpuoptError) else _first_line(error),
        fix=error.fix if isinstance(error, GpuoptError) else "",
        status=status.value,
        traceback="" if known else "".join(traceback.format_exception(error))[-8000:],
    )


def classify(error: BaseException, verb: str) -> Status:
    """An exception of a step -> its status. Names are compared, not classes: torch need not be imported to say that it is missing."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    if (
        "OutOfMemoryError" in names
        or "CUDA out of memory" in text
        or "CUDA_ERROR_OUT_OF_MEMORY" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    ):
        return Status.OOM_DEVICE
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "DefaultCPUAllocator" in text:
        return Status.OOM_HOST
    if isinstance(error, OutOfMemory):
        return Status.OOM_HOST
    if isinstance(error, TimedOut):
        return Status.TIMEOUT
    if isinstance(error, Unsupported):
        return Status.UNSUPPORTED
    if isinstance(error, Unavailable):
        return Status.ENV_MISSING
    if isinstance(error, BadInput | UsageError):
        return Status.BAD_INPUT
    if isinstance(error, GateFailed):
        return Status.NAN if "NaN" in error.message or "Inf" in error.message else Status.ACCURACY_FAIL
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or "No space left on device" in text:
        return Status.DISK_FULL
    if isinstance(error, ResourceError):
        return Status.DISK_FULL if "space left" in error.message else Status.OOM_HOST
    if "ImpossibleFigure" in names:
        return Status.BUG
    if verb in ("build", "generate"):
        return Status.COMPILE_ERROR
    if verb in ("verify", "sensitivity", "measure", "block", "warm", "profile"):
        return Status.CRASH
    return Status.BUG


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text[:500] or type(error).__name__


def die_with_parent() -> None:
    """The parent's death is this process's too, however it comes (kill -9 included)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit(0)


def main(serve: Callable[[int, int], None] = serve) -> None:
    """Entry point of the child. serve: what it does with the two pipes."""
    faulthandler.enable()  # a crash in native code then says which Python line called it
    die_with_parent()
    serve(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    # Native libraries' exit handlers have been seen to hang or abort after the work was done and answered.
    os._exit(0)


if __name__ == "__main__":
    main()
