"""`python -m gpuopt.script.run OUT [--trace] [--save-inputs DIR] -- infer.py args`: runs a program as python would, recorded; writes what was seen to OUT/script.json.

The program sees its own sys.argv, sys.path[0] and __main__, its output goes where it would, and the exit code is its own. What was seen is written every second, so that a
program that is killed, or leaves by os._exit, has told what it did until then.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.machinery
import io
import json
import os
import resource
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from gpuopt.script import patches
from gpuopt.script.recorder import Recording
from gpuopt.script.window import Window

RESULT = "script.json"
TRACE = "trace.json"
SNAPSHOT_S = 1.0


def execute(
    program: Sequence[str],
    out: Path,
    *,
    traced: bool = False,
    save_inputs: Path | None = None,
    on_failure: Callable[[BaseException], list[dict[str, Any]]] | None = None,
) -> int:
    """Run `infer.py args` or `-m package args` to its end, and return its exit code.

    on_failure: what to say about an exception that came out of a model; called while its frames are alive, its answer is written with the rest.
    """
    told: dict[str, Any] = {"state": "running", "exit_code": None, "error": None, "failed_in_model": False, "findings": []}
    pid, forks = os.getpid(), [0]
    recording = Recording(save_inputs=save_inputs)
    window = Window(recording, out / TRACE) if traced else None

    def forked() -> None:
        forks[0] += 1

    def write() -> None:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        told["forks"] = forks[0]
        told["children_cpu_s"] = children.ru_utime + children.ru_stime
        told["trace"] = TRACE if window is not None and window.is_written else None
        _write(out / RESULT, {**told, "script": asdict(recording.script)})

    def finish() -> None:
        """After the program's own exit handlers and threads, which may still call models: registered first, run last."""
        if os.getpid() != pid:  # a fork of the program ends here too: it is not the one that is watched
            return
        ended.set()
        watcher.join()
        if window is not None:
            window.close()
        patches.stop(recording)
        recording.ended = time.perf_counter()
        if told["exit_code"] is not None:
            told["state"] = "ended"
        write()

    os.register_at_fork(after_in_parent=forked)
    atexit.register(finish)
    ended = threading.Event()
    watcher = threading.Thread(target=_snapshots, args=(ended, write), daemon=True, name="gpuopt-snapshots")
    patches.start(recording)
    write()
    watcher.start()
    try:
        _run(program)
        told["exit_code"] = 0
    except SystemExit as exit_:
        told["exit_code"] = _exit_code(exit_)
    except BaseException as error:  # noqa: BLE001 - whatever a program dies of is told, then shown as python would
        told["exit_code"] = 130 if isinstance(error, KeyboardInterrupt) else 1
        failed_in_model, error.__traceback__ = _came_from_model(error.__traceback__), _own(error.__traceback__)
        if os.getpid() == pid:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            told["error"] = f"{type(error).__name__}: {first}"[:500]
            told["failed_in_model"] = failed_in_model
            if failed_in_model and on_failure is not None:
                told["findings"] = on_failure(error)
        _show(error)
    return int(told["exit_code"])


def _run(program: Sequence[str]) -> None:
    """As `python program…` would."""
    if program[0] == "-m":
        sys.argv = [program[1], *program[2:]]
        if not sys.flags.safe_path:
            sys.path[0] = os.getcwd()
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        return
    path = program[0]
    sys.argv = list(program)
    if os.path.isdir(path) or path.endswith((".pyc", ".zip", ".pyz")):
        if not sys.flags.safe_path:
            del sys.path[0]  # run_path puts the folder or archive there
        runpy.run_path(path, run_name="__main__")
        return
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    with io.open_code(os.path.abspath(path)) as source:
        code = compile(source.read(), path, "exec", dont_inherit=True)
    # A module that stays, unlike runpy's: threads and exit handlers of the program outlive this call, and pickle looks its classes up by name.
    main = ModuleType("__main__")
    main.__dict__.update(
        __file__=path,
        __builtins__=builtins,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
        __spec__=None,
        __cached__=None,
    )
    sys.modules["__main__"] = main
    exec(code, main.__dict__)  # noqa: S102 - the program the user asked to run


def _exit_code(exit_: SystemExit) -> int:
    """As python takes it; a text goes to stderr."""
    if exit_.code is None:
        return 0
    if isinstance(exit_.code, int):
        return exit_.code & 0xFF
    sys.stderr.write(f"{exit_.code}\n")
    return 1


def _show(error: BaseException) -> None:
    """As python itself does."""
    sys.stdout.flush()
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()


def _own(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of whoever runs and watches the program: what python alone would show."""
    if trace is None:
        return None
    rest = _own(trace.tb_next)
    file = trace.tb_frame.f_code.co_filename
    if file.startswith("<frozen runpy") or os.path.dirname(file) == os.path.dirname(__file__):
        return rest
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def _came_from_model(frame: TracebackType | None) -> bool:
    while frame is not None:
        if patches.is_call(frame.tb_frame.f_code):
            return True
        frame = frame.tb_next
    return False


def _snapshots(ended: threading.Event, write: Callable[[], None]) -> None:
    while not ended.wait(SNAPSHOT_S):
        with contextlib.suppress(OSError, RuntimeError):  # a full disk, a table that grows meanwhile: the next one, or the last, will do
            write()


def _write(path: Path, data: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data), encoding="utf-8")
    part.replace(path)


def arguments(argv: Sequence[str]) -> tuple[Path, bool, Path | None, list[str]]:
    """(OUT, traced, folder for inputs, program) of this command's own line."""
    split = list(argv).index("--")
    own, program = list(argv[:split]), list(argv[split + 1 :])
    folder = Path(own[own.index("--save-inputs") + 1]) if "--save-inputs" in own else None
    return Path(own[0]), "--trace" in own, folder, program


def main(argv: Sequence[str] | None = None) -> int:
    """Without the doctor: what it says about a failure needs more than torch."""
    out, traced, folder, program = arguments(sys.argv[1:] if argv is None else argv)
    return execute(program, out, traced=traced, save_inputs=folder)


if __name__ == "__main__":
    sys.exit(main())
