"""A process that has imported what every child imports, and forks a child when it is asked for one. Started by forking.py as `python -m gpuopt.pipeline.zygote SOCKET`.

torch, its compiler and transformers take 4 to 15 seconds to import; a fork takes hundredths. The fork is safe only while this process has one thread of Python, has never
initialised CUDA and has run no operator: so it imports, forks and waits, and does nothing else. Where an import did more than that, it says so and forks no child.

Requests are one JSON line each with file descriptors beside it: {"fork": module, "number": n, "environment": {...}, "folder": cwd} with (requests, replies, stderr), or
{"import": [names]}. Answers: {"pid": n} or {"cannot": why} with the number of each request of a child, and {"ended": [pid, exit code]} for each that ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from gpuopt.pipeline import forking

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Makes `torch.cuda.is_available()`, which libraries ask while they are imported, ask the driver's management library: the runtime could not be used after a fork."""
NOT_INITIALISED = 3
"""CUDA_ERROR_NOT_INITIALIZED: what the driver answers before anybody has initialised it."""
FRAME_BYTES = 1 << 20


def main() -> None:
    """Entry point: serve until the other end is closed."""
    began = time.monotonic()
    from gpuopt.pipeline import worker

    worker.die_with_parent()
    os.environ.setdefault(NVML_CHECK, "1")
    gc.disable()
    from gpuopt.pipeline import session  # noqa: F401 - what every child needs

    gc.freeze()
    link = socket.socket(fileno=int(sys.argv[1]))
    _Zygote(link, imports_s=time.monotonic() - began).serve()


class _Zygote:
    def __init__(self, link: socket.socket, *, imports_s: float) -> None:
        self._link = link
        self._imports_s = imports_s
        """What every child would have spent on the same imports: counted into its cold start."""
        self._spared: dict[str, float] = {}
        """The same of what only some children would import."""
        self._children: set[int] = set()

    def serve(self) -> None:
        """Returns when the parent is gone or wants no more children."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        buffer, fds = b"", list[int]()
        while True:
            ready = select.select([self._link.fileno(), woken], [], [])[0]
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                self._reap()
            if self._link.fileno() not in ready:
                continue
            data, more, _, _ = socket.recv_fds(self._link, FRAME_BYTES, 16)
            fds += more
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                request = json.loads(line)
                if "import" in request:
                    self._import(request["import"])
                    continue
                mine, fds = fds[:3], fds[3:]
                try:
                    self._answer(request, mine, (woken, wake))
                finally:
                    for fd in mine:
                        os.close(fd)

    def _import(self, names: Sequence[str]) -> None:
        """Beforehand, so that no child needs to; a module that cannot be imported is the business of the child that asks for it."""
        for name in names:
            if name in sys.modules:
                continue
            began = time.monotonic()
            # Whatever a library raises while it is imported: the child that wants it meets the same and tells the user.
            with contextlib.suppress(Exception, SystemExit), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
            self._spared[name] = time.monotonic() - began
        gc.freeze()

    def _answer(self, request: Mapping[str, Any], fds: Sequence[int], others: Sequence[int]) -> None:
        number = request["number"]
        why = unsafe() or ("too few descriptors are left for its pipes" if len(fds) < 3 else "")
        if why:
            self._send({"cannot": why, "number": number})
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 warns of threads: numpy's BLAS has some, and parks them for a fork
                pid = os.fork()
        except OSError as error:  # no memory, or as many processes as there may be: the children that run must not end for it, as they would with this process
            self._send({"cannot": f"a process cannot be copied: {error.strerror}", "number": number})
            return
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for fd in others:
                os.close(fd)
            self._link.close()
            forking.SPARED.update(self._spared)
            become(
                request["fork"],
                request["environment"],
                fds,
                imports_s=self._imports_s,
                folder=request["folder"],
            )
        self._children.add(pid)
        self._send({"pid": pid, "number": number})

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._children.discard(pid)
            self._send({"ended": [pid, os.waitstatus_to_exitcode(status)]})

    def _send(self, frame: Mapping[str, Any]) -> None:
        try:
            self._link.sendall(json.dumps(frame).encode() + b"\n")
        except OSError:
            sys.exit(0)  # nobody is there any more


def unsafe() -> str:
    """Why a copy of this process would not be as good as a new one; empty where it would."""
    if threading.active_count() > 1:
        return "a library that was imported has started a thread"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "a library that was imported has initialised CUDA"
    if _driver_is_initialised():
        return "a library that was imported has initialised the CUDA driver"
    return ""


def _driver_is_initialised() -> bool:
    """The driver's own word: open device files say nothing, NVML opens the same ones."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False  # nobody has loaded it
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != NOT_INITIALISED


def become(module: str, environment: Mapping[str, str], fds: Sequence[int], *, imports_s: float, folder: str) -> NoReturn:
    """What exec would have done, in the copy: a session, streams and variables of its own, then `module.main()`. Never returns."""
    code = 1
    try:
        os.setsid()
        requests, replies, says = fds
        nothing = os.open(os.devnull, os.O_RDWR)
        for mine, wanted in ((nothing, 0), (nothing, 1), (says, 2)):
            os.dup2(mine, wanted)
        os.close(nothing)
        os.close(says)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        _adopt(environment)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed()  # Python draws anew after a fork and numpy does not: every child would draw the same "random" weights
        gc.enable()
        sys.argv = [module, str(requests), str(replies)]
        from gpuopt.pipeline import worker

        worker.STARTED = time.monotonic() - imports_s
        importlib.import_module(module).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter does with what reaches the end of a process
        sys.excepthook(*sys.exc_info())  # the tail of stderr is what the parent tells
    finally:
        sys.stderr.flush()
        os._exit(code)


def _adopt(environment: Mapping[str, str]) -> None:
    """The child's variables, also those that were read while modules were imported."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    os.environ.update(environment)
    for entry in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(1, entry)
    torch = sys.modules["torch"]
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and threads != before.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    inductor: Any = sys.modules.get("torch._inductor.config")
    if inductor is not None:
        inductor.compile_threads = inductor.decide_compile_threads()


if __name__ == "__main__":
    main()
