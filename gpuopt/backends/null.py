"""Model + inputs -> Runner that sleeps, fails, crashes or lies exactly as its options say: the pipeline's own test bench.

Without options it is eager in disguise: it runs the module and returns the real outputs.

    sleep_ms=5            every call takes 5 ms of wall time (the module runs inside them)
    compile_ms=200        the build takes that long
    fail=KIND             one of FAILURES or LIES
    at=build|run|audit|save|load    where a failure strikes; lies are told at run
    after=3               the first three calls are honest
    flood_mb=64           how much `stderr_flood` writes
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unavailable, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.programs import artifact
from gpuopt.programs.plain import plain

FORMS = frozenset({"module", "torchscript", "exported"})
PRESETS: dict[str, dict[str, Any]] = {}

_OWN = frozenset({"preset", "precision", "dynamic", "sleep_ms", "compile_ms", "fail", "at", "after", "flood_mb", "trust", "signed_by_us"})
_STAGES = ("build", "run", "audit", "save", "load")


def available(device: str) -> str | None:
    """It can run anywhere."""
    return None


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Any precision; PyTorch forms alone, because it runs the module."""
    return None if form in FORMS else f"the null backend runs PyTorch modules, not {form}"


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> NullRunner:
    """Sleep `compile_ms`, then fail or return a runner. Raises UsageError for an option it does not know."""
    _checked(options)
    _sleep_until(time.perf_counter_ns() + round(float(options.get("compile_ms", 0)) * 1e6))
    _strike(options, "build")
    return NullRunner(module=model.module, inputs=inputs, options=options)


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> NullRunner:
    """The saved module under the saved options; `options` on top of them."""
    saved = json.loads((folder / files["null"]).read_text(encoding="utf-8"))
    merged = {**saved, **{k: v for k, v in options.items() if v is not None}}
    _checked(merged)
    _strike(merged, "load")
    module, accepts = artifact.load(folder, files, options)
    return NullRunner(module=module, inputs=None, options=merged, accepts=accepts)


class NullRunner:
    """Runs the module, then does to the result what it was told."""

    def __init__(self, *, module: Any, inputs: Inputs | None, options: Mapping[str, Any], accepts: Accepts | None = None) -> None:
        bound = [*inputs.args, *inputs.kwargs.values()] if inputs else []
        self.device = next((str(t.device) for t in bound if isinstance(t, torch.Tensor)), "cpu")
        self.notes: list[str] = []
        self.num_calls = 0
        self._module = module
        self._inputs = inputs
        self._options = dict(options)
        self._accepts = accepts
        self._sleep_ns = round(float(options.get("sleep_ms", 0)) * 1e6)
        self._after = int(options.get("after", 0))
        self._lie = LIES.get(str(options.get("fail")))
        self._broken = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs, or a lie about them; returns `sleep_ms` after it was entered, unless the module itself takes longer."""
        entered = time.perf_counter_ns()
        if self._accepts is not None:
            self._accepts.check(args, kwargs)
        self.num_calls += 1
        if self.num_calls > self._after or self._broken:
            self._broken = self._options.get("fail") == "illegal_access" and self._at() == "run"  # such errors stick to a process
            _strike(self._options, "run")
        with torch.no_grad():
            out = self._module(*args, **kwargs)
            if self._lie is not None and self.num_calls > self._after:
                out = self._lie(plain(out), [*args, *kwargs.values()], self.num_calls)
        _sleep_until(entered + self._sleep_ns)
        return out

    def audit(self) -> PrecisionAudit | None:
        """Whatever was asked for, all of it; under `fail=dtype_lie` the opposite."""
        _strike(self._options, "audit")
        requested = self._options.get("precision")
        lies = self._options.get("fail") == "dtype_lie"
        dtype = Precision(requested).dtype if requested else "float32"
        if lies:
            dtype = "float64" if dtype == "float32" else "float32"
        reason = f"0% of FLOPs run in {requested}" if lies else ""
        return PrecisionAudit(shares={dtype: 1.0}, method="null: as told", honoured=not lies, requested=requested, reason=reason)

    def save(self, folder: Path) -> Mapping[str, str]:
        """The exported module and the options it ran under."""
        _strike(self._options, "save")
        if self._inputs is None or isinstance(self._module, torch.jit.ScriptModule):
            raise Unsupported("this null runner has nothing to ship", fix="build it from a module")
        kept = {k: v for k, v in self._options.items() if k not in ("trust", "signed_by_us", "dynamic")}
        (folder / "null.json").write_text(json.dumps(kept, sort_keys=True), encoding="utf-8")
        return {**artifact.save(self._module, self._inputs, self._options.get("dynamic"), folder), "null": "null.json"}

    def close(self) -> None:
        """Let go of the module."""
        self._module = None

    def _at(self) -> str:
        return str(self._options.get("at", "run"))


def _checked(options: Mapping[str, Any]) -> None:
    for key in options:
        if key not in _OWN:
            raise UsageError(f"null has no option {key!r}", fix="one of: " + ", ".join(sorted(_OWN)))
    kind = options.get("fail")
    if kind is not None and kind not in FAILURES and kind not in LIES:
        raise UsageError(f"null cannot fail by {kind!r}", fix="one of: " + ", ".join([*FAILURES, *LIES]))
    if options.get("at", "run") not in _STAGES:
        raise UsageError(f"null has no stage {options['at']!r}", fix="one of: " + ", ".join(_STAGES))


def _strike(options: Mapping[str, Any], stage: str) -> None:
    failure = FAILURES.get(str(options.get("fail")))
    if failure is not None and options.get("at", "build" if options.get("fail") in _BUILD_KINDS else "run") == stage:
        failure(options)


def _sleep_until(deadline_ns: int) -> None:
    """Sleep most of it and spin the last millisecond: time.sleep alone wakes late by as much as a scheduler tick."""
    while (left := deadline_ns - time.perf_counter_ns()) > 0:
        if left > 2_000_000:
            time.sleep((left - 1_000_000) / 1e9)


def _raise(error: BaseException) -> None:
    raise error


def _hang(options: Mapping[str, Any]) -> None:
    while True:
        time.sleep(3600)


def _ignore_sigterm(options: Mapping[str, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _hang(options)


def _grandchild(options: Mapping[str, Any]) -> None:
    """Leaves a process of the same group behind, then hangs: killing the child alone would not end it."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    _hang(options)


def _flood(options: Mapping[str, Any]) -> None:
    line = b"null backend: told to flood stderr\n" * 1000
    left = round(float(options.get("flood_mb", 64)) * 1e6)
    while left > 0:
        left -= os.write(2, line)


FAILURES: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "compile": lambda _: _raise(RuntimeError("null backend: told to fail in the compiler")),
    "unsupported": lambda _: _raise(Unsupported("null backend: told to be unsupported", fix="tell it something else")),
    "unavailable": lambda _: _raise(Unavailable("null backend: told to be unavailable", fix="tell it something else")),
    "oom_device": lambda _: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB (null backend: told to)")),
    "memory_error": lambda _: _raise(MemoryError("null backend: told to")),
    "oom_host": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "disk_full": lambda _: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "run_error": lambda _: _raise(RuntimeError("null backend: told to fail in a call")),
    "illegal_access": lambda _: _raise(RuntimeError("CUDA error: an illegal memory access was encountered (null backend: told to)")),
    "segv": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda _: os.abort(),
    "exit0": lambda _: os._exit(0),
    "hang": _hang,
    "ignore_sigterm": _ignore_sigterm,
    "grandchild": _grandchild,
    "stderr_flood": _flood,
}
"""Ends or disturbs the process. `oom_host` is what the kernel's OOM killer does: SIGKILL, no last words."""

_BUILD_KINDS = frozenset({"compile", "unsupported", "unavailable"})
"""Strike at build when `at` is not given; everything else at run."""


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Every floating tensor of plain containers, changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _each(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, change) for v in value)
    return value


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[:1] = float("nan")
    return changed


def _mutate(out: Any, inputs: list[Any], call: int) -> Any:
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor):
            tensor.add_(1)
    return out


LIES: dict[str, Callable[[Any, list[Any], int], Any]] = {
    "nan": lambda out, _i, _n: _each(out, _with_nan),
    "wrong": lambda out, _i, _n: _each(out, lambda t: t * 1.25 + 0.125),
    "slightly_wrong": lambda out, _i, _n: _each(out, lambda t: t + 1e-3 * t.abs().mean()),
    "wrong_shape": lambda out, _i, _n: _each(out, lambda t: t.unsqueeze(0)),
    "wrong_dtype": lambda out, _i, _n: _each(out, lambda t: t.double()),
    "missing_output": lambda out, _i, _n: (
        next(iter(out.values())) if isinstance(out, dict) else () if isinstance(out, torch.Tensor) else out[1:]
    ),
    "extra_output": lambda out, _i, _n: {"a": out, "b": torch.zeros(1)},
    "nondeterministic": lambda out, _i, n: _each(out, lambda t: t * (1 + n * 1e-2)),
    "mutate_inputs": _mutate,
    "dtype_lie": lambda out, _i, _n: out,
}
"""Changes what a call returns (or its inputs); `dtype_lie` is told by audit() alone."""
