"""The fake does exactly what it is told: the faults the pipeline is tested with must be real ones."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import null
from gpuopt.core.errors import Unavailable, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def build(**options: Any) -> null.NullRunner:
    torch.manual_seed(0)
    return null.build(Model(form="module", name="m", module=torch.nn.Linear(8, 4).eval()), Inputs(args=(X,)), options)


def truth() -> torch.Tensor:
    out: torch.Tensor = build()(X)
    return out


def test_untold_it_is_the_module() -> None:
    runner = build()
    assert isinstance(runner, Runner)
    assert torch.equal(runner(X), runner._module(X))


def test_it_takes_the_time_it_is_told_to_the_microsecond() -> None:
    runner = build(sleep_ms=8)
    spent = []
    for _ in range(10):
        began = time.perf_counter_ns()
        runner(X)
        spent.append(time.perf_counter_ns() - began)
    assert min(spent) >= 8_000_000
    assert sorted(spent)[2] < 8_200_000  # a busy machine may delay some of them


def test_the_build_takes_the_time_it_is_told() -> None:
    began = time.perf_counter()
    build(compile_ms=30)
    assert time.perf_counter() - began >= 0.03


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("compile", RuntimeError, "compiler"),
        ("unsupported", Unsupported, "unsupported"),
        ("unavailable", Unavailable, "unavailable"),
        ("oom_device", torch.OutOfMemoryError, "CUDA out of memory"),
        ("memory_error", MemoryError, "told"),
        ("disk_full", OSError, "No space left"),
        ("illegal_access", RuntimeError, "illegal memory access"),
    ],
)
def test_it_fails_at_build_as_told(kind: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(fail=kind, at="build")


def test_a_failing_call_comes_after_the_honest_ones_it_was_told() -> None:
    runner = build(fail="run_error", after=2)
    runner(X)
    runner(X)
    with pytest.raises(RuntimeError, match="told to fail in a call"):
        runner(X)


def test_an_illegal_access_sticks() -> None:
    runner = build(fail="illegal_access")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            runner(X)


def test_disk_full_at_save_has_the_real_errno(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="space") as caught:
        build(fail="disk_full", at="save").save(tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_each_lie_is_visible_in_the_output() -> None:
    right = truth()
    assert build(fail="nan")(X).isnan().sum() == 1
    assert not torch.allclose(build(fail="wrong")(X), right, atol=1e-2)
    slightly = build(fail="slightly_wrong")(X)
    assert not torch.equal(slightly, right) and torch.allclose(slightly, right, atol=1e-2)
    assert build(fail="wrong_shape")(X).shape == (1, *right.shape)
    assert build(fail="wrong_dtype")(X).dtype == torch.float64
    assert build(fail="missing_output")(X) == ()
    assert set(build(fail="extra_output")(X)) == {"a", "b"}
    runner = build(fail="nondeterministic")
    assert not torch.equal(runner(X), runner(X))


def test_it_mutates_its_inputs_when_told() -> None:
    given = X.clone()
    build(fail="mutate_inputs")(given)
    assert torch.equal(given, X + 1)


def test_a_lie_can_wait() -> None:
    runner = build(fail="nan", after=1)
    assert not runner(X).isnan().any()
    assert runner(X).isnan().any()


def test_its_audit_lies_when_told() -> None:
    honest, lie = build(precision="fp16").audit(), build(precision="fp16", fail="dtype_lie").audit()
    assert honest is not None and honest.honoured and honest.shares == {"float16": 1.0}
    assert lie is not None and not lie.honoured and lie.shares == {"float32": 1.0}


@pytest.mark.parametrize("options", [{"slep_ms": 3}, {"fail": "sometimes"}, {"fail": "hang", "at": "lunch"}])
def test_what_it_does_not_know_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build(**options)


SCRIPT = """
import sys, torch
from gpuopt.backends import null
from gpuopt.core.live import Inputs, Model
x = torch.zeros(2, 8)
runner = null.build(Model(form="module", name="m", module=torch.nn.Linear(8, 4)), Inputs(args=(x,)), dict(fail=sys.argv[1], flood_mb=1))
print("built", flush=True)
runner(x)
print("called", flush=True)
"""


def spawn(kind: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={"OMP_NUM_THREADS": "1"},
    )


def test_crashes_are_real_signals() -> None:
    """In copies of one process that has imported torch, which is what takes long."""
    wanted = {"segv": -signal.SIGSEGV, "abort": -signal.SIGABRT, "oom_host": -signal.SIGKILL, "exit0": 0}
    copies = """
import os, sys
import torch
from gpuopt.backends import null
for kind in sys.argv[2:]:
    says, told = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(told, 1)
        sys.argv[1] = kind
        exec(sys.argv[0])
        os._exit(9)
    os.close(told)
    print(kind, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), open(says).read().split(), flush=True)
""".replace("exec(sys.argv[0])", f"exec({SCRIPT!r})")
    command = [sys.executable, "-c", copies, "kind", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"OMP_NUM_THREADS": "1"}, check=False)
    assert done.stdout.splitlines() == [f"{kind} {code} ['built']" for kind, code in wanted.items()], done.stderr


def test_a_flood_of_stderr_does_not_end_the_call() -> None:
    out, err = spawn("stderr_flood").communicate(timeout=120)
    assert out == b"built\ncalled\n"
    assert len(err) >= 1_000_000


def test_it_outlives_sigterm_when_told() -> None:
    child = spawn("ignore_sigterm")
    assert child.stdout is not None and child.stdout.readline() == b"built\n"
    time.sleep(0.5)
    child.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.5)
    child.kill()
    assert child.wait(timeout=10) == -signal.SIGKILL
    child.communicate()


def test_what_it_saves_loads_with_the_same_orders(tmp_path: Path) -> None:
    files = build(sleep_ms=5).save(tmp_path)
    runner = null.load(tmp_path, files, {"signed_by_us": True}, "cpu")
    began = time.perf_counter()
    assert torch.equal(runner(X), truth())
    assert time.perf_counter() - began >= 0.005
