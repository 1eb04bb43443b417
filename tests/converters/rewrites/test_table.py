"""Names typed -> rewrites; where they stand among the other changes; what does not fit is told early."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.converters import apply, rewrites
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, Change, ModelRef, Precision, Tolerance, Transforms
from gpuopt.pipeline import figures, recipe
from gpuopt.pipeline.asked import describe_transforms


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A rewrite `widen[:twice]` that says what it saw, and declares an approximation."""
    seen: list[str] = []

    def apply_(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
        norms = sum(isinstance(part, nn.BatchNorm1d) for part in module.modules())
        weight: Any = module.get_submodule("0").weight
        seen.append(f"{setting} norms={norms} {weight.dtype} training={module.training} {inputs.args[0].dtype if inputs else None}")
        return "done"

    fake = types.ModuleType("made_up_rewrite")
    vars(fake).update(WHAT="", APPROXIMATE=True, SETTINGS=("twice",), applies=lambda module: None, apply=apply_)
    monkeypatch.setitem(sys.modules, "made_up_rewrite", fake)
    monkeypatch.setitem(rewrites.REWRITES, "widen", "made_up_rewrite")
    return seen


@pytest.mark.parametrize("name", sorted(rewrites.REWRITES))
def test_every_row_offers_what_the_table_promises(name: str) -> None:
    import importlib

    found = importlib.import_module(rewrites.REWRITES[name])
    assert found.WHAT and "\n" not in found.WHAT
    assert isinstance(found.APPROXIMATE, bool) and isinstance(found.SETTINGS, tuple)
    assert set(getattr(found, "HALF_ONLY", ())) <= set(found.SETTINGS)
    assert found.applies(nn.ReLU()) is not None
    with torch.device("meta"):
        assert found.applies(nn.Sequential(nn.ReLU())) is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no_maks", "did you mean 'no_mask'"),
        ("no_mask:x", "^no_mask$"),
        ("attention", "attention:flash or"),
        ("attention:cudn", "did you mean attention:cudnn"),
        ("attention:", "one of: flash"),
        ("", "one of: no_mask"),
    ],
)
def test_a_name_or_setting_that_there_is_none_of_is_refused_with_what_there_is(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        rewrites.resolve(text)
    import re

    assert re.search(told, caught.value.fix)


def test_each_may_be_given_once() -> None:
    with pytest.raises(UsageError, match="given twice: attention:flash and attention:math"):
        rewrites.checked(["attention:flash", "no_mask", "attention:math"])
    assert rewrites.checked(["no_mask", "attention:flash"]) == ("no_mask", "attention:flash")


def test_rewrites_come_after_eval_and_folding_and_before_the_cast(made_up: list[str]) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model = Model(form="module", name="m", module=module, dtype="float32")
    inputs = Inputs(args=(torch.randn(2, 3, dtype=torch.float16),))
    transforms = Transforms(fold_batch_norm=True, rewrites=("widen:twice",))
    changed = apply(model, Precision.FP16, transforms, inputs)
    assert made_up == ["twice norms=0 torch.float32 training=False torch.float32"]
    assert changed.module[0].weight.dtype == torch.float16 and "widen:twice: done" in changed.notes
    assert len(module) == 2 and isinstance(module[1], nn.BatchNorm1d) and module.training


def test_what_cannot_be_changed_says_why() -> None:
    model = Model(form="module", name="net", module=nn.Linear(2, 2), dtype="float32")
    with pytest.raises(Unsupported, match="^no_mask: nothing to change in net: it is no transformers model") as caught:
        apply(model, None, Transforms(rewrites=("no_mask",)))
    assert caught.value.fix == "leave --rewrite no_mask out"


def test_of_several_the_one_that_cannot_be_made_is_named(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
        raise Unsupported("it cannot be seen", fix="give it inputs")

    monkeypatch.setattr(sys.modules["made_up_rewrite"], "apply", refuses)
    model = Model(form="module", name="net", module=nn.Sequential(nn.Linear(2, 2)), dtype="float32")
    with pytest.raises(Unsupported, match="^widen:twice: it cannot be seen$") as caught:
        apply(model, None, Transforms(rewrites=("widen:twice", "no_mask")))
    assert caught.value.fix == "give it inputs"


@pytest.mark.parametrize("form", ["torchscript", "exported", "onnx"])
def test_a_form_whose_graph_is_fixed_is_refused(form: str) -> None:
    module = torch.jit.script(nn.Linear(2, 2)) if form == "torchscript" else nn.Linear(2, 2)
    model = Model(form=form, name="net", module=module, dtype="float32")
    with pytest.raises(Unsupported):
        apply(model, None, Transforms(rewrites=("no_mask",)))


def test_reports_and_reproducers_name_them_in_order() -> None:
    transforms = Transforms(channels_last=True, rewrites=("no_mask", "attention:flash"), keep_fp32=("head",))
    assert describe_transforms(transforms) == ("channels_last", "no_mask", "attention:flash", "keep_fp32:head")
    line = figures.reproducer(Candidate(model=ModelRef(text="m.pt"), transforms=transforms))
    assert "--rewrite no_mask --rewrite attention:flash" in line


def test_a_recipe_says_them_and_a_wrong_one_has_its_line() -> None:
    job = recipe.parse("model: m\nrewrites: no_mask\ncandidates:\n- {}\n- {rewrites: [no_mask, 'attention:flash']}\n")
    assert [c.transforms.rewrites for c in job.candidates] == [("no_mask",), ("no_mask", "attention:flash")]
    with pytest.raises(UsageError, match=r"line 2: rewrites: no rewrite is called 'no_maks'"):
        recipe.parse("model: m\nrewrites: no_maks\n")


def test_a_change_adds_rewrites_and_replaces_settings() -> None:
    candidate = Candidate(model=ModelRef(text="m"), transforms=Transforms(rewrites=("attention:flash", "no_mask")))
    changed = Change(rewrites=("attention:cudnn", "fuse_linears")).applied(candidate)
    assert changed.transforms.rewrites == ("attention:cudnn", "no_mask", "fuse_linears")
    assert Change().applied(candidate) == candidate


def test_an_approximation_is_declared_by_name_alone(made_up: list[str]) -> None:
    assert rewrites.is_approximate(("widen",)) and rewrites.is_approximate(("channels_last", "widen:gone"))
    assert not rewrites.is_approximate(("no_mask", "channels_last", "keep_fp32:head", "never_heard_of"))


def test_what_a_gpu_has_no_fp32_form_of_is_left_out_of_the_structure_stage_there_alone() -> None:
    texts = ("no_mask", "attention:flash", "fuse_linears")
    assert rewrites.in_fp32(texts, "cuda:0") == (("no_mask", "fuse_linears"), ("attention:flash",))
    assert rewrites.in_fp32(texts, "cpu") == (texts, ())
    assert rewrites.in_fp32(("attention:math",), "cuda") == (("attention:math",), ())


def test_in_fp32_an_approximation_has_room_in_both_stages_and_elsewhere_no_more_than_before() -> None:
    from gpuopt.accuracy import tolerance

    plain, wide = (tolerance.merged(Precision.FP32, Tolerance(), approximate=word) for word in (False, True))
    assert (wide.structure_floor, wide.precision_floor) == (tolerance.APPROXIMATION_FLOOR, tolerance.APPROXIMATION_FLOOR)
    assert (plain.structure_floor, plain.precision_floor) == (1e-4, 1e-6)
    half = tolerance.merged(Precision.FP16, Tolerance(), approximate=True)
    assert half.precision_floor == tolerance.default(Precision.FP16).precision_floor
    assert tolerance.merged(Precision.FP32, Tolerance(structure_floor=0.5), approximate=True).structure_floor == 0.5


def test_naming_the_table_imports_no_torch() -> None:
    code = "import sys; import gpuopt.converters.rewrites, gpuopt.cli.options; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
