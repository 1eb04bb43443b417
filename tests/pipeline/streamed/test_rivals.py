"""Other libraries run a module their way, on a CPU here: the same bits, and afterwards the module is as it was."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import streams

from gpuopt.core.errors import Unavailable, Unsupported, UsageError
from gpuopt.core.streamed import RIVALS, StreamArm, StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline import isolate
from gpuopt.pipeline.streamed import bench, command, rivals
from gpuopt.pipeline.streamed.facts import Meters, Ready
from gpuopt.pipeline.streamed.rivals import dispatched, groups, putback, resident, shuttle
from gpuopt.streaming import anatomy


def stack() -> Any:
    space: dict[str, Any] = {}
    exec(streams.FACTORY, space)
    return space["build"]()


IDS = torch.arange(6)[None]


def state(module: nn.Module) -> Any:
    """All that a library could leave behind: attributes, identities, addresses."""
    return [
        (
            name,
            sorted(vars(part)),
            [(n, id(p), p.data_ptr(), p.requires_grad) for n, p in part._parameters.items() if p is not None],
            len(part._forward_pre_hooks),
        )
        for name, part in module.named_modules()
    ]


@contextmanager
def unharmed(module: nn.Module) -> Iterator[torch.Tensor]:
    """The module's outputs; after the block it gives them again and is the same in all its parts."""
    before = state(module)
    with torch.inference_mode():
        wanted = module(IDS)
    yield wanted
    assert state(module) == before
    with torch.inference_mode():
        assert torch.equal(module(IDS), wanted)


def test_whatever_is_hung_on_a_module_is_gone_afterwards() -> None:
    module = stack()
    module.head.weight = module.embed.weight  # tied
    with unharmed(module), pytest.raises(RuntimeError, match="half way"), putback.put_back(module):
        for part in module.modules():
            part.forward = lambda *_: None
            part.left_over = True
            part.register_forward_pre_hook(lambda *_: None)
        module.layers[0].up.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        module.head.weight.data = torch.zeros(3)
        module.head.weight.requires_grad_(False)
        del module.layers[1]
        raise RuntimeError("half way")
    assert module.head.weight is module.embed.weight


def test_everything_on_the_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stack()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    for available in (0, 1 << 40, None):
        monkeypatch.setattr(resident.hostpages, "available_bytes", lambda found=available: found)
        with unharmed(module), resident.whole(module, "cpu", 1000):
            pass
    with pytest.raises(Exception, match="do not fit"), resident.whole(module, "cpu", 1 << 30):
        pass


def test_locked_memory_is_given_back_by_whichever_name_torch_has_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: called.append("old"), raising=False)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: called.append("new"), raising=False)
    putback.let_go("cuda:0")
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    putback.let_go("cuda:0")
    putback.let_go("cpu")
    assert called == ["new", "old"]


def test_blocks_stay_as_long_as_the_bytes_last_beside_the_largest_layer_that_moves() -> None:
    module = stack()
    found = anatomy.dissect(module)
    fixed = sum(found.fixed.values())
    block = sum(place.num_bytes for place in found.units[0].places)
    layer = sum(p.nbytes for p in module.layers[0].up.parameters())
    for count in range(len(found.units)):
        assert len(dispatched.fitting(module, fixed + layer + count * block, found)) == count
        assert len(dispatched.fitting(module, fixed + layer + count * block - 1, found)) == max(0, count - 1)
    assert dispatched.fitting(module, 0, found) == frozenset()


def test_a_map_covers_everything_with_the_fewest_names() -> None:
    module = stack()
    module.scale = nn.Parameter(torch.ones(1))
    stays = {f"layers.{i}": i < 3 for i in range(8)}
    found = dispatched.placed(module, stays, "cuda:0")
    here = torch.device("cuda:0")
    assert found == {"embed": here, "head": here, "scale": here, **{name: here if stay else "cpu" for name, stay in stays.items()}}


@pytest.mark.parametrize("name", ["accelerate", "accelerate-pinned"])
@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_accelerate_gives_the_same_bits_and_the_module_back(name: str, share: float) -> None:
    pytest.importorskip("accelerate")
    module = stack()
    found = anatomy.dissect(module)
    with unharmed(module) as wanted:
        with rivals.running(name, module, "cpu", int(share * found.weight_bytes), found) as setting, torch.inference_mode():
            assert torch.equal(module(IDS), wanted) and torch.equal(module(IDS), wanted)
            moved = sum(next(layer.parameters()).is_meta for layer in module.layers)
            assert moved == (0 if share > 1 else 8 - int(setting.split()[0])) and (share > 1 or moved > 2)
            assert name == "accelerate" or not module.embed.weight.is_meta


def test_accelerate_as_shipped_is_given_the_bytes_and_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = stack(), {}

    def infer(given: Any, max_memory: Any, no_split_module_classes: Any) -> dict[str, Any]:
        asked.update(memory=max_memory, whole=no_split_module_classes)
        return {"embed": 0, **{f"layers.{i}": 0 if i < 3 else "cpu" for i in range(8)}, "head": "cpu"}

    package = SimpleNamespace(infer_auto_device_map=infer, dispatch_model=lambda given, **how: asked.update(how))
    monkeypatch.setattr(dispatched.importlib, "import_module", lambda name: package)
    with unharmed(module), dispatched.shipped(module, "cpu", 12345, anatomy.dissect(module)) as setting:
        assert asked["memory"][0] == 12345 and asked["whole"] == ["Block"] and asked["state_dict"] is None
    assert setting.startswith("3 of 8 blocks stay")


def test_diffusers_gives_the_same_bits_and_the_module_back() -> None:
    pytest.importorskip("diffusers.hooks")
    module = stack()
    found = anatomy.dissect(module)
    with unharmed(module) as wanted:
        with rivals.running("diffusers", module, "cpu", 1, found) as setting, torch.inference_mode():
            hook = module._diffusers_hook.get_hook(groups.HOOK)
            assert hook.group.modules == [] and all(hasattr(layer, "_diffusers_hook") for layer in module.layers)
            assert torch.equal(module(IDS), wanted) and torch.equal(module(IDS), wanted)
    assert "cannot be told a budget" in setting


def test_lists_of_blocks_belong_to_the_module_that_holds_them() -> None:
    outer = nn.Module()
    outer.model = stack()
    found = anatomy.dissect(outer)
    assert groups.owners_of(outer, found) == ["model"]
    with pytest.raises(Unsupported, match="ModuleList"):
        groups.owners_of(outer, anatomy.Anatomy(units=(), fixed={}))


class Manager:
    """mmgp's, as far as it is touched."""

    def __init__(self, module: Any) -> None:
        self.preloaded_blocks_per_model = {shuttle.MODEL: {"layers.1": 1, "layers.5": 1}}
        self.released = False
        for part in module.modules():
            part._mm_manager = self
            part._hf_hook = object()

    def release(self) -> None:
        self.released = True


def test_mmgp_is_given_its_fastest_setting_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked, made = stack(), {}, []

    def all_(models: Any, **how: Any) -> Manager:
        print("a banner")
        asked.update(how)
        torch.set_default_device("meta")
        made.append(Manager(models[shuttle.MODEL]))
        return made[0]

    monkeypatch.setattr(shuttle.importlib, "import_module", lambda name: SimpleNamespace(all=all_, physical_memory=1 << 20))
    found = anatomy.dissect(module)
    said = io.StringIO()
    with unharmed(module), redirect_stdout(said), shuttle.shuttled(module, "cpu", 7 << 20, found) as setting:
        assert torch.empty(1).device.type == "cpu"
        assert asked["budgets"] == {shuttle.MODEL: 7} and asked["pinnedMemory"] is True and asked["quantizeTransformer"] is False
        assert asked["perc_reserved_mem_max"] * (1 << 20) >= found.weight_bytes
    assert setting.startswith("2 of 8 blocks stay") and made[0].released and said.getvalue() == ""
    module.head.double()
    with pytest.raises(Unsupported, match="one dtype"), shuttle.shuttled(module, "cpu", 7 << 20, found):
        pass


def test_a_missing_package_names_its_pip_line_and_a_name_there_is_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"accelerate": object()}

    def find(name: str) -> object:
        if "." in name:
            raise ModuleNotFoundError(name)
        return there.get(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    rivals.require("accelerate-pinned")
    with pytest.raises(Unavailable, match="mmgp and optimum-quanto are not installed") as caught:
        rivals.require("mmgp")
    assert caught.value.fix == "pip install mmgp optimum-quanto"
    with pytest.raises(UsageError, match="no rival"):
        rivals.require("airllm")
    assert command.rivals_of(("none",)) == () and command.rivals_of(None) == ("accelerate",)
    with pytest.raises(UsageError):
        command.rivals_of(("none", "mmgp"))


@pytest.mark.parametrize(
    ("generate", "call_s", "forwards"),
    [(None, 0.01, 20), (None, 1.0, 8), (None, 60.0, 3), (8, 0.1, 3 * 8), (8, 60.0, 2 * 8)],
)
def test_a_slow_rival_gets_few_calls_and_never_too_few(generate: int | None, call_s: float, forwards: int) -> None:
    request = StreamRequest(action="bench", generate=generate, calls=20)
    turns = bench.turns_of(request, call_s)
    assert sum(turns) * (generate or 1) == forwards
    assert len(turns) >= 2 and max(turns) <= bench.BLOCK_CALLS and min(turns) >= 1


class Paper(streams.Inline):
    """A child whose rivals run everything resident, on paper."""

    refused: tuple[str, ...] = ()

    def call(self, verb: str, result: Any, **arguments: Any) -> Any:
        if verb == "rival":
            if arguments["name"] in self.refused:
                raise isolate.ChildFailed(isolate.Status.UNSUPPORTED, "it does not run this")
            found = super().call("resident", Ready, timeout_s=9, spec=arguments["spec"])
            return Ready(setup_s=found.setup_s, notes=(f"{arguments['weight_bytes']} bytes",))
        if verb == "meters" and "resident" in streams.Inline.asked[-3:]:
            return Meters(peak_reserved_bytes=1000)
        return super().call(verb, result, **arguments)


def test_rivals_run_beside_each_budget_and_the_one_without_a_budget_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_command import did, job

    monkeypatch.setattr(isolate, "Child", Paper)
    monkeypatch.setattr(bench, "device", SimpleNamespace(parse=lambda text: SimpleNamespace(is_simulated=False)))
    monkeypatch.setattr(Paper, "refused", ("mmgp",))
    specs = (StreamSpec(budget_share=0.5), StreamSpec(budget_share=0.8))
    asked = job(
        streams.factory(tmp_path), "bench", *specs, device="simulated:link=1e8,block=0.05ms", rivals=("diffusers", "accelerate", "mmgp")
    )
    told = did(command.stream(asked))
    resident_arm, *rows = told.arms
    assert [(arm.rival, arm.row, arm.budgeted) for arm in rows] == [
        ("diffusers", 0, False), ("accelerate", 0, True), ("mmgp", 0, True), ("accelerate", 1, True), ("mmgp", 1, True),
    ]  # fmt: skip
    for arm in rows:
        if arm.rival == "mmgp":
            assert arm.median_ms is None and arm.reason == "it does not run this"
            continue
        assert arm.exact and arm.speedup == pytest.approx(arm.median_ms / told.rows[arm.row].measured.median_ms, rel=0.01)
        assert arm.name == RIVALS[arm.rival].title and arm.num_calls >= bench.RIVAL_CALLS
    assert all(row.measured.exact for row in told.rows) and resident_arm.rival is None


def test_a_speedup_is_counted_from_the_same_turns() -> None:
    assert StreamArm(name="a", median_ms=6.0, streamed_ms=2.0).speedup == 3.0
    assert StreamArm(name="a", median_ms=6.0).speedup is None and StreamArm(name="a").speedup is None
