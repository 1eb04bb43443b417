"""Tests of the rules that read the module alone, on real models and on odd ones."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import CPU, GPU, evidence
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from gpuopt.converters import apply
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import Finding
from gpuopt.core.spec import Precision, Transforms
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Evidence
from gpuopt.profiling.count import count

NAMES = (
    "buffer_on_cpu", "float64_anywhere", "fp32_without_tf32", "no_half", "mixed_dtypes", "nonfinite_in_half", "train_mode", "grad_on", "nchw_half_conv", "batch_norm_unfolded",
    "manual_attention", "mha_fastpath", "data_parallel", "rebuilt_weights", "padding_waste", "left_on_cpu", "unaligned_dim", "cudnn_benchmark_off",
)  # fmt: skip
TABLE = {rule.code: rule for rule in (importlib.import_module(f"gpuopt.doctor.rules.{name}").RULE for name in NAMES)}


def found(given: Evidence, code: str | None = None) -> list[Finding]:
    return [f for f in diagnose(given, table=TABLE) if code is None or f.code == code]


@pytest.mark.parametrize("name", ["bert_large_tiny", "resnet101_tiny", "t5_large_tiny", "llama_8b_tiny"])
def test_a_clean_fp16_build_of_a_reference_model_gives_nothing(name: str) -> None:
    module = getattr(importlib.import_module("gpuopt.models"), name)()
    is_conv = name == "resnet101_tiny"
    model = apply(
        Model(form="module", name=name, module=module), Precision.FP16, Transforms(channels_last=is_conv, fold_batch_norm=is_conv)
    )
    assert found(evidence(module=model.module)) == []


def test_the_same_findings_before_and_without_the_transforms() -> None:
    module = importlib.import_module("gpuopt.models").resnet101_tiny()
    assert [f.code for f in found(evidence(module=module, precision="fp16"))] == ["GPU303", "GPU304"]
    assert found(evidence(module=module, precision="fp16", transforms=("channels_last", "fold_batch_norm"))) == []


class Raising(nn.Module):
    def __getattr__(self, name: str) -> Any:
        if name == "config":
            raise AttributeError("no configuration here")
        return super().__getattr__(name)


@pytest.mark.parametrize(
    "odd",
    [
        nn.Module(),
        nn.LazyLinear(3),
        nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval(),
        nn.Linear(3, 3, device="meta"),
        nn.Linear(3, 3, dtype=torch.complex64),
        nn.GRU(4, 4),
        torch.jit.script(nn.Linear(3, 3)),
        Raising(),
        torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),)).module(),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize(
    "device", [GPU, CPU, replace(GPU, ceilings=replace(GPU.ceilings, rows=())), None], ids=["gpu", "cpu", "no ceilings", "none"]
)
def test_no_rule_fails_on_an_unusual_module(odd: nn.Module, device: Any) -> None:
    given = evidence(
        module=odd, device=device, inputs=Inputs(args=(torch.ones(2, 3), None, 3)), outputs=(None, torch.ones(2), {"a": 1}), flags={}
    )
    assert found(given) == []


# -- what lies where --------------------------------------------------------------------------------------------------------------


def test_a_parameter_on_the_cpu_of_a_model_on_the_gpu_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half().eval()
    with FakeTensorMode():
        for part in (model[0], model[1]):
            part._parameters["weight"] = torch.empty(2, 2, device="cuda", dtype=torch.float16)  # type: ignore[assignment]
        model[0]._parameters["bias"] = torch.empty(2, device="cuda", dtype=torch.float16)  # type: ignore[assignment]
    (only,) = found(evidence(module=model), "GPU103")
    assert only.severity == "error" and only.module == "1" and "bias lies on cpu, 3 other tensors on cuda" in only.message


def test_a_model_spread_by_accelerate_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")).half().eval()
    assert len(found(evidence(module=model), "GPU103")) == 2
    model.hf_device_map = {"0": "cpu", "1": "disk"}
    assert found(evidence(module=model), "GPU103") == []


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4).half() for _ in range(4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_modules_in_a_plain_list_are_found_and_the_rest_is_summed() -> None:
    findings = found(evidence(module=Listed().eval()), "GPU103")
    assert len(findings) == 6 and "nn.ModuleList" in findings[0].fix and any("3 more tensors" in f.message for f in findings)
    assert findings[0].line is not None and findings[0].line.startswith("test_static_rules.py:")
    assert found(evidence(module=Listed().eval(), device=CPU), "GPU103") == []


# -- number formats ---------------------------------------------------------------------------------------------------------------


def test_a_float64_input_is_named() -> None:
    given = evidence(module=nn.Linear(4, 4).half().eval(), inputs=Inputs(kwargs={"x": torch.ones(2, 4, dtype=torch.float64)}))
    (only,) = found(given, "GPU201")
    assert "x; the model is float16" in only.message and "x.to(torch.float16)" in only.fix


def test_a_float64_model_asked_to_run_in_fp16_is_no_finding() -> None:
    model = nn.Linear(4, 4).double().eval()
    assert found(evidence(module=model), "GPU201") and not found(evidence(module=model, precision="fp16"), "GPU201")


def test_tf32_is_told_of_before_anything_was_timed() -> None:
    flags = {"matmul_tf32": False, "cudnn_tf32": True}
    (only,) = found(evidence(module=nn.Linear(4, 4).eval(), flags=flags), "GPU202")
    assert only.gain_low_ms is None and only.change is not None and only.change.precision is Precision.TF32
    assert found(evidence(module=nn.Linear(4, 4).eval(), flags=flags, precision="fp16"), "GPU202") == []
    assert found(evidence(module=nn.Conv2d(4, 4, 1).eval(), flags=flags), "GPU202") == []


def test_a_layer_kept_in_fp32_on_purpose_is_not_mixed() -> None:
    model = nn.Sequential(nn.Linear(4, 4).half(), nn.Linear(4, 4).half(), nn.Linear(4, 2))
    given = evidence(module=model.eval())
    (only,) = found(given, "GPU204")
    assert only.severity == "error" and "2 is float32" in only.message and "next to layer 1 in float16" in only.message
    assert found(replace(given, transforms=("keep_fp32:2",)), "GPU204") == []
    assert found(replace(given, flags={"autocast": True}), "GPU204") == []
    model._keep_in_fp32_modules = ["2"]  # type: ignore[assignment]
    assert found(given, "GPU204") == []


def test_a_mixed_model_that_ran_casts_by_itself() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4).half() for _ in range(9)), *(nn.Linear(4, 4) for _ in range(7)))
    findings = found(evidence(module=model.eval(), wall_ms=1.0), "GPU204")
    assert len(findings) == 6 and {f.severity for f in findings} == {"warning"} and any("2 more layers" in f.message for f in findings)


def test_infinity_in_fp32_outputs_of_an_fp32_model_is_not_halfs_fault() -> None:
    outputs = (torch.full((2,), float("inf")),)
    assert found(evidence(module=nn.Linear(2, 2).eval(), outputs=outputs), "GPU206") == []
    (only,) = found(evidence(module=nn.Linear(2, 2).eval(), outputs=outputs, precision="fp16"), "GPU206")
    assert "0 NaN and 2 Inf of 2" in only.message and only.change is not None and only.change.precision is Precision.BF16


# -- how the model is written -----------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.1


@pytest.mark.parametrize(
    "part",
    [
        Functional(),
        nn.Dropout2d(0.5),
        nn.LSTM(2, 2, num_layers=2, dropout=0.5),
        nn.BatchNorm1d(2),
        nn.InstanceNorm1d(2, track_running_stats=True),
    ],
)
def test_whatever_behaves_differently_in_training_is_seen(part: nn.Module) -> None:
    root = nn.Sequential(part).eval()
    assert found(evidence(module=root), "GPU301") == []
    part.train()
    (only,) = found(evidence(module=root), "GPU301")
    assert only.severity == "error" and "part of the model" in only.message and only.module == "0"


@pytest.mark.parametrize(
    "part", [nn.Linear(2, 2), nn.Dropout(0.0), nn.LSTM(2, 2, dropout=0.0), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2)]
)
def test_a_training_flag_that_changes_nothing_is_no_finding(part: nn.Module) -> None:
    assert found(evidence(module=part.train()), "GPU301") == []


def test_a_graph_is_weighed_by_the_activations_it_keeps() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 3)).eval()
    x = torch.ones(4, 8)
    (only,) = found(evidence(module=model, outputs=model(x), flags={"grad_enabled": True}), "GPU302")
    assert only.count is not None and only.count >= 3
    assert only.bytes == 4 * 16 * 4  # the sigmoid's output; the input, the weights and their transposes are there anyway


def test_old_and_new_parametrizations_are_found_and_told_how_to_go(recwarn: Any) -> None:
    model = nn.ModuleList(
        [weight_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4)), parametrizations.orthogonal(nn.Linear(4, 4))]
    ).eval()
    (only,) = found(evidence(module=model), "GPU309")
    assert "3 weights" in only.message and "remove_weight_norm" in only.fix and only.bytes == 3 * 4 * 4 * 4


def attention(need_weights: bool) -> Evidence:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(32, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.mha(x, x, x, need_weights=need_weights)[0]

    module = Uses().eval()
    inputs = Inputs(args=(torch.ones(24, 2, 32),))
    return evidence(module=module, inputs=inputs, count=count(module, inputs), flags={})


def test_multihead_attention_that_returns_its_weights_is_attention_written_out() -> None:
    (only,) = found(attention(True), "GPU305")
    assert "need_weights=False" in only.fix and "24x24" in only.message and only.bytes == 2 * 4 * 24 * 24 * 4
    assert found(attention(False), "GPU305") == []


def test_transformers_eager_attention_is_found_with_and_without_a_count() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, attn_implementation="eager"
    )
    model = BertModel(config).eval()
    inputs = Inputs(args=(torch.ones(2, 16, dtype=torch.long),))
    for given in (evidence(module=model), evidence(module=model, count=count(model, inputs))):
        (only,) = found(given, "GPU305")
        assert "sdpa" in only.fix


@pytest.mark.parametrize("name", ["attention_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_on_either_side_and_in_either_sense(name: str, side: str) -> None:
    real = torch.arange(8)[None] < torch.tensor([2, 4])[:, None]
    real = real.flip(1) if side == "left" else real
    mask = ~real if "key_padding" in name else real.long()
    (only,) = found(evidence(inputs=Inputs(kwargs={name: mask})), "GPU313")
    assert "62% of the tokens" in only.message and "the longest row has 4 of 8" in only.message


def test_a_random_mask_a_full_one_and_an_empty_one_are_no_padding() -> None:
    torch.manual_seed(0)
    for mask in (
        torch.randint(0, 2, (4, 64)),
        torch.ones(4, 64),
        torch.zeros(4, 64),
        torch.ones(0, 64),
        torch.ones(4, 0),
        torch.ones(2, 2, 8, 8),
    ):
        assert found(evidence(inputs=Inputs(kwargs={"attention_mask": mask})), "GPU313") == []


def test_a_model_that_loading_switched_to_eval_is_told_of_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).half().eval()
    (only,) = found(evidence(module=model, flags={"was_training": True}))
    assert only.code == "GPU301" and only.severity == "warning" and "switched to eval" in only.message
    assert found(evidence(module=nn.Linear(2, 2).half().eval(), flags={"was_training": True})) == []
