"""A module without its weights: that everything else of it is as it would be, and that filling it takes no more memory than the weights."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from gpuopt.core.errors import BadInput, Unsupported
from gpuopt.core.streaming import Place, Unit
from gpuopt.streaming import meta, shards, slabs
from gpuopt.streaming.anatomy import dissect
from gpuopt.streaming.owned import Owned


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.randn(width))
        self.register_buffer("table", torch.arange(width) / width, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.linear(self.norm(x)) * self.gain * self.table
        return y


class Model(nn.Module):
    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width, padding_idx=0)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.steps = torch.linspace(0, 1, depth)  # no buffer: moved by nobody

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, step in zip(self.layers, self.steps, strict=True):
            x = layer(x) * (1 + step)
        y: torch.Tensor = self.head(self.norm(x))
        return y


IDS = torch.tensor([1, 2, 3, 4, 5])


def trained(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model().eval()
    model.norm.running_mean.uniform_()  # type: ignore[union-attr]
    return model


def saved(model: nn.Module, path: Path, **changes: torch.Tensor | None) -> shards.Shards:
    """Its state dict, one copy of what is tied, with some tensors changed or left out (None)."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items() if name != "head.weight"}
    for name, value in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    safetensors.torch.save_file(tensors, path)
    return shards.opened(path)


def test_only_parameters_are_on_the_meta_device_and_ties_hold(tmp_path: Path) -> None:
    model = trained()
    with saved(model, tmp_path / "m.safetensors") as files:
        empty = meta.of_shards(Model, files, where="m")
        assert all(parameter.is_meta for parameter in empty.module.parameters())
        assert empty.module.head.weight is empty.module.embed.weight
        for (name, ours), (other, theirs) in zip(empty.module.named_buffers(), model.named_buffers(), strict=True):
            assert name == other and torch.equal(ours, theirs), name
        assert torch.equal(empty.module.steps, model.steps)
        assert empty.notes == []


def test_a_filled_module_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    model = trained()
    with saved(model, tmp_path / "m.safetensors") as files:
        empty = meta.empty(Model, files)
        assert isinstance(empty, meta.Empty)
        empty.module.eval()
        assert empty.fingerprint() == Owned(model, free=False).fingerprint()
        empty.materialize(["head.weight"])
        assert empty.module.head.weight is empty.module.embed.weight and not empty.module.embed.weight.is_meta
        assert empty.module.layers[0].linear.weight.is_meta
        empty.materialize()
        with torch.no_grad():
            assert torch.equal(empty.module(IDS), model(IDS))


def test_a_unit_from_files_and_one_from_memory_are_the_same_bytes(tmp_path: Path) -> None:
    model = trained()
    with saved(model, tmp_path / "m.safetensors") as files:
        empty = meta.empty(Model, files)
        ours, theirs = dissect(empty.module, small_bytes=1), dissect(model, small_bytes=1)
        assert ours.units == theirs.units and len(ours.units) == 3
        for unit in theirs.units:
            wanted = torch.zeros(unit.num_bytes, dtype=torch.uint8)
            slabs.fill_from_module(unit, model, wanted)
            for source in (empty, Owned(model, free=False)):
                dirty = torch.full((unit.num_bytes,), 0xEE, dtype=torch.uint8)
                source.fill_unit(unit, dirty)
                assert torch.equal(dirty, wanted), "gaps are zeros"
            filled = torch.zeros(unit.num_bytes, dtype=torch.uint8)
            assert slabs.fill(unit, filled, empty.fill) == slabs.checksum(wanted)


def test_a_transposed_place_is_filled_by_values_not_by_bytes(tmp_path: Path) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.empty(4, 6).t())

    values = torch.randn(6, 4)
    safetensors.torch.save_file({"w": values}, tmp_path / "m.safetensors")
    place = Place(name="w", dtype="float32", shape=(6, 4), stride=(1, 6), offset=512, num_bytes=96)
    unit = Unit(name="u", ring="u", order=0, num_bytes=1024, places=(place,))
    with shards.opened(tmp_path / "m.safetensors") as files:
        memory = torch.full((1024,), 1, dtype=torch.uint8)
        meta.empty(Turned, files).fill_unit(unit, memory)
    assert torch.equal(memory[512:608].view(torch.float32).as_strided((6, 4), (1, 6)), values)
    assert not memory[:512].any() and not memory[608:].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers__1__linear__weight": None}, r"lacks layers.1.linear.weight$"),
        ({"norm__running_mean": None}, "lacks norm.running_mean"),
        ({"embed__weight": None}, "lacks embed.weight, head.weight"),
        ({"other": torch.ones(2)}, "has other, which the model has not"),
        ({"layers__0__gain": torch.ones(25)}, r"layers.0.gain is \[25\] in the file, \[24\] in the model"),
        ({"layers__0__gain": torch.ones(24).half()}, "layers.0.gain is float16 in the file, float32 in the model"),
        ({"head__weight": torch.ones(11, 24)}, "embed.weight, head.weight differ, but the model ties them"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with saved(trained(), tmp_path / "m.safetensors", **changes) as files, pytest.raises(BadInput, match=said) as caught:
        meta.empty(Model, files)
    assert caught.value.fix


def test_both_names_of_a_tied_weight_may_be_in_the_files_if_they_agree(tmp_path: Path) -> None:
    model = trained()
    with saved(model, tmp_path / "m.safetensors", head__weight=model.embed.weight.detach().clone()) as files:
        empty = meta.empty(Model, files)
        assert isinstance(empty, meta.Empty)
        empty.materialize()
        assert torch.equal(empty.module.head.weight, model.embed.weight)


def test_dtypes_are_cast_only_when_asked_for_and_with_a_note(tmp_path: Path) -> None:
    with saved(trained().half(), tmp_path / "m.safetensors") as files:
        empty = meta.empty(Model, files, cast=True)
        assert isinstance(empty, meta.Empty)
        assert "cast" in empty.notes[0]
        empty.materialize()
        assert torch.equal(empty.module.embed.weight, trained().half().embed.weight.float())


def test_names_with_a_wrappers_prefix_are_found(tmp_path: Path) -> None:
    model = trained()
    state = {f"_orig_mod.{name}": tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    with shards.opened(tmp_path / "m.safetensors") as files:
        empty = meta.empty(Model, files)
        assert empty.fingerprint() == Owned(model, free=False).fingerprint()


def test_one_parameter_put_in_two_places_by_hand_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(3))
            self.one, self.two = nn.Module(), nn.Module()
            self.one.weight = weight
            self.two.register_parameter("weight", weight)
            self.listed = nn.ParameterList([weight, nn.Parameter(torch.ones(3))])
            self._parameters["raw"] = nn.Parameter(torch.ones(3))
            self.register_parameter("none", None)

    module = meta.built(Shared)
    assert module.one.weight is module.two.weight is module.listed[0] and module.listed[1] is not module.one.weight
    assert all(parameter.is_meta for parameter in module.parameters()) and module.none is None
    assert not nn.Linear(2, 2).weight.is_meta, "afterwards everything is as before"


def test_other_threads_build_real_modules_meanwhile() -> None:
    found: list[bool] = []
    with meta.parameters_on_meta():
        thread = threading.Thread(target=lambda: found.append(nn.Linear(2, 2).weight.is_meta))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert found == [False]


def needs_values() -> nn.Module:
    module = nn.Linear(3, 3)
    module.scale = float(module.weight.abs().max())
    return module


def derives_a_buffer() -> nn.Module:
    module = nn.Linear(3, 3)
    module.register_buffer("norms", module.weight.detach().norm(dim=0), persistent=False)
    return module


@pytest.mark.parametrize(("build", "said"), [(needs_values, "needs the values"), (derives_a_buffer, "norms would have no value")])
def test_a_constructor_that_reads_its_weights_is_refused_and_told_what_to_do(
    tmp_path: Path, build: Callable[[], nn.Module], said: str
) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, tmp_path / "m.safetensors")
    with shards.opened(tmp_path / "m.safetensors") as files, pytest.raises(Unsupported, match=said) as caught:
        meta.empty(build, files)
    assert "gpuopt.stream(module" in caught.value.fix


# --- modules in memory -----------------------------------------------------------------------------------------------------------------------


def test_a_module_in_memory_gives_its_weights_once_and_lets_go() -> None:
    model, twin = trained(), trained()
    owned = meta.empty(model)
    assert isinstance(owned, Owned)
    before = owned.fingerprint()
    for unit in dissect(model, small_bytes=1).units:
        memory = torch.zeros(unit.num_bytes, dtype=torch.uint8)
        owned.fill_unit(unit, memory)
        wanted = torch.zeros(unit.num_bytes, dtype=torch.uint8)
        slabs.fill_from_module(unit, twin, wanted)
        assert torch.equal(memory, wanted)
    weight = model.layers[0].linear.weight
    assert weight.shape == (24, 24) and weight.untyped_storage().nbytes() == 4 and weight.isnan().all(), "stale weights shout"
    assert not model.embed.weight.isnan().any(), "what was not moved is as it was"
    assert owned.fingerprint() == before
    with pytest.raises(ValueError, match="moved and freed"):
        owned.fill("layers.0.linear.weight", torch.empty(24, 24))


def test_views_of_one_storage_are_freed_when_the_last_was_moved() -> None:
    whole = torch.arange(8.0)
    module = nn.Module()
    module.a, module.b = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    owned, target = Owned(module), torch.empty(4)
    owned.fill("a", target)
    assert module.a.untyped_storage().nbytes() == 32
    owned.fill("b", target)
    assert torch.equal(target, torch.arange(4.0, 8.0)) and module.a.untyped_storage().nbytes() == module.b.untyped_storage().nbytes() == 4


def test_a_module_on_the_meta_device_has_nothing_to_stream() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(Unsupported, match="meta device"):
        meta.empty(module)


PEAK = """
    import sys, torch
    from torch import nn
    from gpuopt.streaming import meta, shards
    from gpuopt.streaming.anatomy import dissect
    from gpuopt.streaming.hostpages import Pages

    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(18))  # 302 MB

    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

    base = peak()
    if sys.argv[1] == "files":
        source = meta.empty(Big, shards.opened(sys.argv[2]))
    else:
        source = meta.empty(Big())
    anatomy = dissect(source.module)
    homes = []
    for unit in anatomy.units:
        homes.append(Pages(unit.num_bytes))
        source.fill_unit(unit, homes[-1].bytes)
    total = sum(unit.num_bytes for unit in anatomy.units)
    assert total == 18 * 2048 * 2048 * 4
    print((peak() - base) / total)
"""


def test_the_peak_of_host_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    weight = torch.zeros(2048, 2048)
    safetensors.torch.save_file({f"layers.{i}.weight": weight.clone() for i in range(18)}, path)
    started = {
        what: subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PEAK), what, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for what in ("files", "module")
    }
    found = {}
    for what, process in started.items():
        said, complaint = process.communicate(timeout=200)
        assert process.returncode == 0, complaint
        found[what] = float(said)
    path.unlink()
    assert 0.9 < found["files"] < 1.1 and 0.9 < found["module"] < 1.15, found
