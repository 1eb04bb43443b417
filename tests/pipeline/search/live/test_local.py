"""Workers in the caller's own process answer and fail as a child does, and leave its switches alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.converters import precision as precisions
from gpuopt.core.errors import Unsupported
from gpuopt.core.result import Status
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, ModelRef, Precision, Tolerance
from gpuopt.pipeline import facts, hostmemory, livemodel
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.search.live.local import LocalChild
from gpuopt.pipeline.traits import Traits

QUICK = BenchSpec(
    min_time_s=0.01, max_time_s=0.1, min_iterations=3, warmup_s=0.0, max_warmup_s=0.02, block_ms=1.0, num_pairs=6, energy_s=0.0
)


def worker(module: nn.Module | None = None, **more: Any) -> LocalChild:
    return LocalChild(*livemodel.handles(module or nn.Linear(4, 4).eval(), torch.ones(2, 4)), **more)


def candidate(backend: str = "eager", precision: Precision | None = None) -> Candidate:
    return Candidate(model=ModelRef(text=""), backend=BackendSpec.parse(backend), precision=precision)


def test_it_loads_builds_verifies_and_times_the_live_module() -> None:
    with worker() as child:
        loaded = child.call("load", facts.Loaded, timeout_s=1, candidate=candidate(precision=Precision.BF16))
        assert loaded.name == "Linear" and loaded.precision == "bf16" and loaded.dims == {"N": 2}
        assert child.call("build", facts.Built, timeout_s=1).host_peak_bytes is None, "this process is its caller's too"
        assert child.call("verify", facts.Verified, timeout_s=1, tolerance=Tolerance()).accuracy.passed
        child.call("warm", facts.Measured, timeout_s=1, spec=QUICK)
        assert child.call("block", facts.Measured, timeout_s=1, spec=QUICK).samples.samples_ns
        assert child.call("traits", Traits, timeout_s=1, ref=ModelRef(text="")).has_products
        cells = child.call("matrix", facts.Matrix, timeout_s=1, device_id="cpu", candidate=None).cells
        assert next(c for c in cells if c.backend == "eager").route == "direct"
        assert child.alive
    assert not child.alive
    with pytest.raises(AssertionError, match="had ended"):
        child.call("build", facts.Built, timeout_s=1)


@pytest.mark.parametrize(
    ("backend", "verb", "status"),
    [
        ("null:fail=compile", "build", Status.COMPILE_ERROR),
        ("null:fail=unsupported", "build", Status.UNSUPPORTED),
        ("null:fail=oom_device,at=build", "build", Status.OOM_DEVICE),
        ("null:fail=run_error,after=1", "warm", Status.CRASH),
    ],
)
def test_a_failure_is_what_it_would_be_of_a_child(backend: str, verb: str, status: Status) -> None:
    with worker() as child:
        child.call("load", facts.Loaded, timeout_s=1, candidate=candidate(backend))
        with pytest.raises(ChildFailed) as failed:
            if verb != "build":
                child.call("build", facts.Built, timeout_s=1)
            child.call(verb, facts.Built, timeout_s=1, **({} if verb == "build" else {"spec": QUICK}))
        assert failed.value.status is status
        if status is Status.UNSUPPORTED:
            assert isinstance(failed.value.error, Unsupported) and failed.value.fix


@pytest.mark.parametrize("num_calls", [1, 2])
def test_every_recorded_call_is_verified(num_calls: int) -> None:
    """Honest on the call that a search saw (built on, verified, verified again), and wrong on the next."""
    more = tuple(livemodel.of_call(torch.full((2, 4), 0.3)) for _ in range(num_calls - 1))
    with worker(more=more) as child:
        child.call("load", facts.Loaded, timeout_s=1, candidate=candidate("null:fail=wrong,after=3"))
        child.call("build", facts.Built, timeout_s=1)
        verdict = child.call("verify", facts.Verified, timeout_s=1, tolerance=Tolerance(), mode="precision").accuracy
    assert verdict.passed is (num_calls == 1)
    assert {seed for stage in verdict.stages for seed in stage.seeds} == set(range(num_calls))


def test_candidates_in_turns_keep_their_own_switches_and_the_callers() -> None:
    """Ended in the order in which they were built: what each put back would be the other's."""

    def state() -> tuple[str, str]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]

    seen: list[tuple[str, str]] = []

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(state())
            return super().forward(x)

    with precisions.switches_kept():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as many programs have it
        callers = state()
        one, other = worker(Looks(4, 4).eval()), worker(Looks(4, 4).eval())
        for child, precision in ((one, Precision.FP32), (other, Precision.BF16)):
            child.call("load", facts.Loaded, timeout_s=1, candidate=candidate(precision=precision))
            child.call("build", facts.Built, timeout_s=1)
            assert state() == callers
        seen.clear()
        one.call("verify", facts.Verified, timeout_s=1, tolerance=Tolerance(), mode="precision")
        assert callers not in seen and {first for first, _ in seen} == {"highest"}, "fp32 is fp32"
        one.close()
        other.close()
        assert state() == callers


def test_host_memory_is_that_of_the_process_and_of_those_it_started() -> None:
    import subprocess
    import sys

    alone = hostmemory.peak_bytes()
    assert alone > 2**26, "torch is in here"
    text = "data = bytearray(300 * 2**20); data[::4096] = b'x' * len(data[::4096]); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "held\n"
        assert hostmemory.peak_bytes() >= alone + 300 * 2**20
        started.communicate("\n")
