"""The gate catches seeded bugs that rounding hides, and passes better-than-eager results (measuring.md D.2 and D.3)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.accuracy import compare, gate, tolerance
from gpuopt.core import codec
from gpuopt.core.live import Inputs
from gpuopt.core.result import Accuracy, OutputError, Stage, Status
from gpuopt.core.spec import Precision, Tolerance

SEEDS = (0, 1)


class Block(nn.Module):
    """Pre-norm transformer block; LayerNorm first, so that depth does not drown the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = nn.GELU()
        self.scale = (width // heads) ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(b, s, w))
        return x + self.down(self.gelu(self.up(self.norm2(x))))


def transformer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(64, 4) for _ in range(6)), nn.LayerNorm(64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0) if p.ndim > 1 else p.add_(0.02 * torch.randn_like(p))
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed))


def outputs(model: Callable[[torch.Tensor], Any], dtype: torch.dtype) -> list[list[tuple[str, torch.Tensor]]]:
    with torch.no_grad():
        return [compare.flatten(model(batch(seed).to(dtype))) for seed in SEEDS]


def stages(change: Callable[[nn.Sequential], None], precision: Precision = Precision.BF16) -> tuple[Stage, Stage]:
    """Both stages of a candidate made by changing a copy of the model."""
    model, dtype = transformer(), getattr(torch, precision.dtype)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        change(wrong)
    reference = outputs(copy.deepcopy(model).double(), torch.float64)
    limits = tolerance.default(precision)
    return (
        gate.judge_stage("structure", reference, outputs(wrong, torch.float32), outputs(model, torch.float32), limits, SEEDS),
        gate.judge_stage(
            "precision",
            reference,
            outputs(copy.deepcopy(wrong).to(dtype), dtype),
            outputs(copy.deepcopy(model).to(dtype), dtype),
            limits,
            SEEDS,
        ),
    )


def drop_a_bias(model: nn.Sequential) -> None:
    model[3].down.bias.zero_()  # type: ignore[union-attr, operator]


def wrong_eps(model: nn.Sequential) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def wrong_scale(model: nn.Sequential) -> None:
    model[2].scale = 0.2  # type: ignore[assignment]


def tanh_gelu(model: nn.Sequential) -> None:
    for block in list(model)[:-1]:
        block.gelu = nn.GELU(approximate="tanh")


@pytest.mark.parametrize("bug", [drop_a_bias, wrong_eps, wrong_scale])
def test_a_seeded_bug_is_caught_by_the_structure_stage(bug: Callable[[nn.Sequential], None]) -> None:
    structure, _ = stages(bug)
    assert not structure.passed
    assert structure.outputs[0].ratio is not None and structure.outputs[0].ratio > 30
    assert structure.outputs[0].cosine is not None and structure.outputs[0].cosine > 0.99  # a cosine gate would have passed it


@pytest.mark.parametrize("bug", [drop_a_bias, wrong_eps])
def test_the_same_bug_hides_under_bf16_rounding_which_is_why_there_are_two_stages(bug: Callable[[nn.Sequential], None]) -> None:
    _, precision = stages(bug)
    assert precision.passed
    accuracy = gate.verdict(stages(bug), "fp64", True)
    assert not accuracy.passed and accuracy.reason.startswith("structure: output")


def test_an_unchanged_model_passes_both_stages_at_ratio_one() -> None:
    both = stages(lambda model: None)
    assert all(stage.passed for stage in both)
    assert all(row.ratio == pytest.approx(1.0) for stage in both for row in stage.outputs)
    assert gate.verdict(both, "fp64", True).passed


def test_a_declared_approximation_passes_with_a_raised_floor_alone() -> None:
    structure, _ = stages(tanh_gelu)
    assert not structure.passed
    rows = {0: structure.outputs}
    fresh = {0: tuple(replace(row, passed=True, reason="", limit_rmse=None) for row in rows[0])}
    assert gate.judge_rows("structure", fresh, tolerance.default(Precision.BF16, approximate=True)).passed


def test_autocast_which_is_better_than_eager_bf16_is_accepted_where_allclose_refuses_it() -> None:
    model = transformer()
    reference = outputs(copy.deepcopy(model).double(), torch.float64)
    twin = outputs(copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16)

    def autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: torch.Tensor = model(x.float())
        return result.to(torch.bfloat16)

    candidate = outputs(autocast, torch.bfloat16)
    stage = gate.judge_stage("precision", reference, candidate, twin, tolerance.default(Precision.BF16), SEEDS)
    assert stage.passed and stage.outputs[0].ratio is not None and stage.outputs[0].ratio < 1.2
    close = torch.isclose(candidate[0][0][1], twin[0][0][1], rtol=1.6e-2, atol=1e-5)
    assert float(close.float().mean()) < 0.9


def test_a_bug_on_one_seed_only_fails_and_is_the_row_shown() -> None:
    reference = [[("y", torch.ones(50, dtype=torch.float64))] for _ in range(2)]
    twin = [[("y", torch.ones(50) + 1e-6)] for _ in range(2)]
    candidate = [[("y", torch.ones(50) + 1e-6)], [("y", torch.ones(50) + 1e-2)]]
    stage = gate.judge_stage("precision", reference, candidate, twin, tolerance.default(Precision.FP32), SEEDS)
    assert not stage.passed and stage.seeds == SEEDS
    assert stage.outputs[0].rmse == pytest.approx(1e-2, rel=1e-3)


def test_the_worst_of_several_outputs_is_named() -> None:
    ref = torch.ones(50, dtype=torch.float64)
    reference = [[("good", ref), ("bad", ref), ("fair", ref)]]
    twin = [[(name, value.float() + 1e-6) for name, value in reference[0]]]
    candidate = [[("good", ref.float()), ("bad", ref.float() + 0.5), ("fair", ref.float() + 1e-5)]]
    stage = gate.judge_stage("precision", reference, candidate, twin, tolerance.default(Precision.FP32))
    assert stage.worst == "bad" and "bad" in stage.reason
    assert [row.passed for row in stage.outputs] == [True, False, False]
    accuracy = gate.verdict([stage], "fp64", True)
    assert accuracy.worst_output == "bad" and accuracy.relative_rmse == pytest.approx(0.5)
    codec.to_json(accuracy)


def error(**changes: Any) -> OutputError:
    plain = {
        "name": "y",
        "shape": (100,),
        "dtype": "float16",
        "rmse": 0.01,
        "rms_reference": 1.0,
        "relative_rmse": 0.01,
        "max_abs": 0.1,
        "cosine": 0.9,
        "snr_db": 40.0,
        "twin_rmse": 0.01,
        "ratio": 1.0,
    }
    return OutputError(**{**plain, **changes})


@pytest.mark.parametrize(
    ("precision", "ratio", "passed"),
    [("fp32", 1.9, True), ("fp32", 2.1, False), ("fp16", 2.9, True), ("fp16", 3.2, False), ("tf32", 2.9, True)],
)
def test_the_ratio_allowed_is_2_in_fp32_and_3_below(precision: str, ratio: float, passed: bool) -> None:
    stage = gate.judge_rows("precision", {0: [error(rmse=0.01 * ratio, ratio=ratio)]}, tolerance.default(Precision(precision)))
    assert stage.passed is passed
    assert stage.outputs[0].limit_rmse == pytest.approx(0.01 * (2 if precision == "fp32" else 3), rel=0.03)


def test_an_output_of_few_elements_gets_a_wider_ratio_as_its_errors_are_small_samples() -> None:
    limits = tolerance.default(Precision.FP16)
    assert gate.judge_rows("precision", {0: [error(rmse=0.05, shape=(1, 2))]}, limits).passed
    assert not gate.judge_rows("precision", {0: [error(rmse=0.05, shape=(5, 2))]}, limits).passed
    assert not gate.judge_rows("precision", {0: [error(rmse=0.2, shape=(1, 2))]}, limits).passed


def test_a_lucky_twin_on_one_seed_is_evened_out_by_the_others() -> None:
    rows = {0: [error(rmse=0.01, twin_rmse=0.001)], 1: [error(rmse=0.01, twin_rmse=0.01)]}
    assert gate.judge_rows("precision", rows, tolerance.default(Precision.FP16)).passed


@pytest.mark.parametrize(
    ("precision", "snr", "passed"), [("int8", 21.0, True), ("int8", 19.0, False), ("fp8", 18.0, True), ("fp8", 16.0, False)]
)
def test_quantised_candidates_are_gated_by_signal_to_noise(precision: str, snr: float, passed: bool) -> None:
    rmse = 10 ** (-snr / 20)
    found = gate.judge_rows(
        "precision", {0: [error(rmse=rmse, snr_db=snr, twin_rmse=None, ratio=None)]}, tolerance.default(Precision(precision))
    )
    assert found.passed is passed
    assert passed or "dB" in found.reason


def test_an_exact_quantised_output_passes_without_a_signal_to_noise_figure() -> None:
    rows = {0: [error(rmse=0.0, snr_db=None, twin_rmse=None, rms_reference=0.0)]}
    assert gate.judge_rows("precision", rows, tolerance.default(Precision.INT8)).passed


def test_the_users_own_limit_holds_on_top() -> None:
    limits = tolerance.merged(Precision.FP16, Tolerance(max_error=0.005))
    found = gate.judge_rows("precision", {0: [error()]}, limits)
    assert not found.passed and "asked for" in found.reason
    assert gate.judge_rows("precision", {0: [error()]}, tolerance.merged(Precision.FP16, Tolerance(max_error=0.02))).passed


def test_noise_between_calls_joins_the_limit_and_at_most_doubles_it() -> None:
    limits = tolerance.default(Precision.FP16)
    over = {0: [error(rmse=0.045)]}
    assert not gate.judge_rows("precision", over, limits).passed
    assert gate.judge_rows("precision", over, limits, spread={"y": 0.02}).passed
    assert not gate.judge_rows("precision", {0: [error(rmse=0.5)]}, limits, spread={"y": 0.5}).passed


def test_dropout_left_on_does_not_excuse_itself_by_its_own_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1))
    given = [Inputs(args=(batch(seed),)) for seed in SEEDS]
    reference = outputs(copy.deepcopy(model).double().eval(), torch.float64)
    twin = outputs(copy.deepcopy(model).eval(), torch.float32)
    candidate = outputs(model.train(), torch.float32)
    with torch.no_grad():
        spread = gate.spread_of(model, given, torch.float32, "cpu", candidate)
    assert spread["output"] > 0.01
    assert not gate.judge_stage("precision", reference, candidate, twin, tolerance.default(Precision.FP32), SEEDS, spread=spread).passed


@pytest.mark.parametrize(
    ("precision", "relative", "passed"),
    [
        ("fp32", 5e-5, True),
        ("fp32", 2e-4, False),
        ("tf32", 2e-3, True),
        ("fp16", 5e-3, True),
        ("fp16", 0.05, False),
        ("bf16", 0.05, True),
        ("bf16", 0.2, False),
    ],
)
def test_without_a_yardstick_the_limit_depends_on_the_precision(precision: str, relative: float, passed: bool) -> None:
    for twin_rmse in (None, 0.0):
        rows = {0: [error(rmse=relative, relative_rmse=relative, twin_rmse=twin_rmse, ratio=None)]}
        assert gate.judge_rows("precision", rows, tolerance.default(Precision(precision))).passed is passed
        assert gate.judge_rows("structure", rows, tolerance.default(Precision(precision))).passed is (relative < 1e-4)


def test_a_stage_without_outputs_or_a_verdict_without_stages_is_a_failure() -> None:
    assert not gate.judge_rows("precision", {}, Tolerance()).passed
    assert not gate.judge_rows("precision", {0: []}, Tolerance()).passed
    assert not gate.judge_stage("precision", [[]], [[]], [[]], Tolerance()).passed
    nothing = gate.verdict([], "fp64", None)
    assert not nothing.passed and nothing.reason


def passing() -> Stage:
    return gate.judge_rows("precision", {0: [error()]}, tolerance.default(Precision.FP16))


def test_a_candidate_that_writes_into_its_inputs_fails_unless_the_model_does() -> None:
    assert not gate.verdict([passing()], "fp64", True, mutates_inputs=True).passed
    assert gate.verdict([passing()], "fp64", True, mutates_inputs=True, reference_mutates_inputs=True).passed


def test_what_a_reader_should_know_is_noted() -> None:
    near = gate.judge_rows("precision", {0: [error(rmse=0.02, ratio=2.0)]}, tolerance.default(Precision.FP16))
    found = gate.verdict([near], "fp32: no fp64 kernel", False, notes=["given"])
    assert found.passed and not found.deterministic
    text = " / ".join(found.notes)
    assert "given" in text and "2.00 times" in text and "fp32: no fp64 kernel" in text and "different bits" in text


def test_nan_in_the_candidate_alone_is_told_from_inaccuracy() -> None:
    ref = torch.ones(20, dtype=torch.float64)
    bad = ref.float().clone()
    bad[3] = float("nan")

    def judged(candidate: torch.Tensor) -> Accuracy:
        stage = gate.judge_stage("precision", [[("y", ref)]], [[("y", candidate)]], [[("y", ref.float())]], Tolerance())
        return gate.verdict([stage], "fp64", True)

    assert judged(bad).status is Status.NAN
    assert judged(ref.float() + 1).status is Status.ACCURACY_FAIL
    assert judged(ref.float()).status is Status.OK


def test_asked_fields_go_over_the_defaults_of_the_precision() -> None:
    found = tolerance.merged(Precision.BF16, Tolerance(structure_floor=1e-3))
    assert found.structure_floor == 1e-3
    assert found.precision_floor == tolerance.default(Precision.BF16).precision_floor
    assert tolerance.merged(None, Tolerance()) == tolerance.default(Precision.FP32)
