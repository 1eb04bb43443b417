"""Rules about what torch.compile gave up on, in its own words (torch 2.13), and about switches and batches as the session found them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import evidence

from gpuopt.core.result import Finding, OpRecord
from gpuopt.doctor import recast
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Compiled, Evidence
from gpuopt.doctor.rules import small_batch

BRANCH = "Data-dependent branching\nExplanation: Detected data-dependent branching (e.g. `if my_tensor.sum() > 0:`). Dynamo does not support tracing dynamic control flow.\nHint: Use `torch.cond`."
PRINT = "Failed to trace builtin operator\nExplanation: Dynamo does not know how to trace builtin operator `print` with argument types ['str'] (has_kwargs False)\nHint: Avoid calling builtin `print`"
DISABLED = "Skip calling `torch.compiler.disable()`d function\nExplanation: Skip calling function `<function off at 0x7f>` since it was wrapped with `torch.compiler.disable` (reason: None)"


def found(subject: Evidence, code: str) -> list[Finding]:
    return [f for f in diagnose(subject) if f.code == code]


def broke(*breaks: tuple[str, str, int]) -> list[Finding]:
    return found(evidence(backend="inductor", compiled=Compiled(graph_breaks=breaks, num_graphs=3)), "GPU501")


@pytest.mark.parametrize(
    ("reason", "says", "fix"),
    [
        (BRANCH, "Data-dependent branching", "torch.where or torch.cond"),
        (PRINT, "`print`", "printing out of forward()"),
        (DISABLED, "torch.compiler.disable", "take torch.compiler.disable off"),
    ],
)
def test_a_break_says_what_broke_and_what_takes_it_away(reason: str, says: str, fix: str) -> None:
    (only,) = broke((reason, "model.py:31", 2))
    assert says in only.message and "2 times" in only.message and only.line == "model.py:31" and fix in only.fix


def test_a_break_whose_whole_function_was_given_up_is_one_finding_that_says_so() -> None:
    uncompiled = BRANCH.replace("branching\n", "branching; its function runs uncompiled\n", 1)
    (only,) = broke((BRANCH, "model.py:31", 1), (uncompiled, "model.py:31", 1))
    assert only.count == 2 and "its function runs uncompiled" in only.message


def test_a_part_of_a_cuda_graph_that_was_left_out_is_told_with_its_op_and_line() -> None:
    skip = (
        'skipping cudagraphs due to cpu ops in a part of the graph: aten.mul.Tensor\n         File "/srv/app/model.py", line 31, in forward'
    )
    (only,) = found(evidence(backend="inductor", compiled=Compiled(cudagraph_skips=(skip,))), "GPU503")
    assert "cpu ops in a part of the graph: aten.mul.Tensor" in only.message and only.line == "model.py:31"
    assert "keep every tensor of forward() on the GPU" in only.fix


def test_a_counter_that_is_compiled_in_is_told_with_its_guard_and_its_line() -> None:
    guards = tuple(("forward (model.py:6)", f"self.calls == {n}, at model.py:7") for n in range(3))
    (only,) = found(evidence(backend="inductor", compiled=Compiled(recompiles=guards)), "GPU502")
    assert "self.calls == 0, at model.py:7" in only.message and only.count == 3 and only.line == "model.py:6"
    assert "make it a tensor" in only.fix


def test_the_best_measured_batch_is_what_a_small_one_is_held_against() -> None:
    assert small_batch._best({1: 1.0, 2: 1.1, 4: 3.0}, 1) == 2
    assert small_batch._best({1: 1.0, 2: 1.9}, 1) is None, "flat"
    assert small_batch._best({2: 1.0, 4: 1.0}, 1) is None, "the batch asked for was not measured"


def row(op: str, ms: float) -> OpRecord:
    return OpRecord(op=op, module="m", dtype="float32", count=1, time_ns=ms * 1e6, flops=ms * 4e10, bytes=1e6)


@pytest.mark.parametrize(
    ("own", "precision", "says"),
    [
        ({"own_cudnn_tf32": True, "own_matmul_tf32": False}, None, "2 ms of it in convolutions that your own process"),
        ({"own_cudnn_tf32": True, "own_matmul_tf32": True}, None, "all of it"),
        ({"own_cudnn_tf32": True, "own_matmul_tf32": False}, "fp32", None),
        ({"own_cudnn_tf32": False, "own_matmul_tf32": False}, None, None),
        ({}, None, None),
    ],
)
def test_what_the_users_own_process_runs_in_tf32_already_is_said(own: dict[str, bool], precision: str | None, says: str | None) -> None:
    flags = {"matmul_tf32": False, "cudnn_tf32": False, "cudnn_benchmark": True, "grad_enabled": False, **own}
    records = (row("aten.convolution", 2.0), row("aten.mm", 3.0))
    (only,) = found(evidence(records=records, wall_ms=5.5, flags=flags, precision=precision), "GPU202")
    assert ("your own process" in only.message) == (says is not None) and (says is None or says in only.message)


def test_on_a_cpu_a_record_is_worth_its_share_of_the_untraced_call() -> None:
    from builders import CPU

    records = (row("aten.mm", 6.0), row("aten.add", 4.0))  # a profiler stretched 5 ms to 10
    base = evidence(records=records, wall_ms=5.0)
    assert recast.wall_share_ms(replace(base, device=CPU), records[:1]) == pytest.approx(3.0)
    assert recast.wall_share_ms(replace(base, device=CPU), records) == pytest.approx(5.0)
    assert recast.wall_share_ms(base, records[:1]) == pytest.approx(6.0), "a kernel lasts as long as it lasts"


def test_weights_that_autocast_recasts_are_cast_once_where_the_model_was_run_as_it_is() -> None:
    """A precision that was asked for has cast them already, and what is cast then is something else."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("seed_cast_churn", Path(__file__).parents[1] / "seeds" / "cast_churn.py")
    assert spec is not None and spec.loader is not None
    seed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seed)
    (as_is,) = found(seed.bad(), "GPU205")
    assert as_is.change is not None and as_is.change.precision is not None
    assert [f.change for f in found(replace(seed.bad(), precision="fp32"), "GPU205")] == [None]
