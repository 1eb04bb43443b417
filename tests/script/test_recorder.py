"""record() sees models, inputs, loads, waits and copies with their lines, changes nothing, and leaves torch as it was."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpuopt
from gpuopt.script import lines, patches, recorder
from gpuopt.script.recorder import record

FILE = "test_recorder.py"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.first(x)
        return self.last(hidden if mask is None else hidden * mask)


def snapshot() -> dict[tuple[int, str], Any]:
    return {(id(owner), name): owner.__dict__.get(name) for owner, name, _ in patches._targets()}


@pytest.fixture(autouse=True)
def nothing_stays() -> Any:
    """Whatever a test does, torch's own functions are back in place afterwards."""
    before, finders = snapshot(), list(sys.meta_path)
    yield
    assert snapshot() == before and sys.meta_path == finders and patches._active == ()


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose CPU tensors lie on a device that works by itself."""
    monkeypatch.setattr(recorder, "is_remote", lambda tensor: True)


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


def test_root_calls_are_counted_with_their_inputs_line_and_name() -> None:
    model = Net()
    with record() as seen:
        for batch in (2, 4, 4):
            at = here() + 1
            model(torch.ones(batch, 8), mask=torch.ones(8))
    (found,) = seen.script.modules
    assert (found.name, found.module_class, found.num_calls, found.device) == ("model", "Net", 3, "cpu")
    assert found.line.endswith(f"{FILE}:{at}") and not found.line.startswith("/")
    assert found.inputs == ("x:float32[4,8]", "mask:float32[8]")
    assert 0 < found.wall_s < seen.script.wall_s and found.typical_s and found.period_s and found.first_s
    assert seen.num_nested == 6 and 0 < seen.script.overhead_s < seen.script.wall_s


def test_calls_in_eval_mode_that_record_gradients_are_counted_and_those_of_training_are_not() -> None:
    model, frozen, x = Net().eval(), Net().eval().requires_grad_(False), torch.randn(3, 8)
    with record() as seen:
        for _ in range(3):
            model(x)
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        model.train()
        model(x)
        frozen(x)
    counts = {m.name: (m.num_grad_calls, m.num_calls) for m in seen.script.modules}
    assert counts == {"model": (3, 6), "frozen": (0, 1)}


def test_results_are_the_same_bits_and_gradients_flow() -> None:
    model, x = Net(), torch.randn(3, 8)
    plain = model(x)
    with record():
        observed = model(x)
        observed.sum().backward()
    assert torch.equal(plain, observed) and model.first.weight.grad is not None


def test_exceptions_pass_through_untouched_and_are_told() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such thing")

    model = Broken()
    with record() as seen, pytest.raises(KeyError) as raised:
        model(torch.ones(1))
    assert raised.value.args == ("no such thing",)
    assert seen.script.modules[0].failure == "KeyError: 'no such thing'" and seen.script.modules[0].num_calls == 1
    assert patches._local.depth == 0 and patches._local.loading == 0 and not patches._local.is_quiet


def test_an_exception_is_not_kept_alive() -> None:
    class Kept:
        pass

    class Broken(nn.Module):
        def forward(self) -> None:
            kept = Kept()
            self.seen = weakref.ref(kept)
            raise ValueError

    model = Broken()
    gc.disable()
    try:
        with record():
            try:
                model()
            except ValueError:
                pass
            assert model.seen() is None
    finally:
        gc.enable()


def test_recordings_nest_and_each_sees_its_own() -> None:
    model = Net()
    with record() as outer:
        model(torch.ones(1, 8))
        with record() as inner:
            model(torch.ones(1, 8))
        model(torch.ones(1, 8))
    assert outer.script.modules[0].num_calls == 3 and inner.script.modules[0].num_calls == 1


def test_threads_are_seen_and_do_not_mix() -> None:
    models = [Net() for _ in range(4)]

    def work(model: nn.Module) -> None:
        for _ in range(50):
            model(torch.ones(1, 8))

    with record() as seen:
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(m.num_calls for m in seen.script.modules) == 200 and all(m.module_class == "Net" for m in seen.script.modules)


def test_a_model_built_anew_for_every_call_is_one_model_and_one_called_from_two_lines_too() -> None:
    with record() as seen:
        for _ in range(3):
            Net()(torch.ones(1, 8))
    assert [m.num_calls for m in seen.script.modules] == [3]
    model = Net()
    with record() as seen:
        model(torch.ones(1, 8))
        for _ in range(3):
            at = here() + 1
            model(torch.ones(1, 8))
    (found,) = seen.script.modules
    assert found.num_calls == 4 and found.line.endswith(f":{at}")


def test_a_recorded_model_can_be_freed() -> None:
    model = Net()
    with record() as seen:
        model(torch.ones(1, 8))
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None and seen.script.modules[0].num_calls == 1


def test_loads_are_counted_once_each_with_bytes_and_lines(tmp_path: Path) -> None:
    model, path = Net(), tmp_path / "net.pt"
    torch.save(model.state_dict(), path)
    size = sum(t.numel() * 4 for t in model.state_dict().values())
    with record() as seen:
        for _ in range(3):
            model.load_state_dict(torch.load(path, weights_only=True))
            model.to(torch.float64)
            model.to(torch.float32)
            model.to("cpu")  # is there already: no news
    loads = {load.what: load for load in seen.script.loads}
    assert set(loads) == {"torch.load", "load_state_dict", ".to(dtype)"}
    assert loads["torch.load"].count == 3 and loads["torch.load"].bytes == 3 * path.stat().st_size
    assert loads["load_state_dict"].bytes == 3 * size
    assert [load.count for load in seen.script.loads if load.what == ".to(dtype)"] == [3, 3]  # a line each
    assert all(FILE in load.line and load.seconds > 0 for load in seen.script.loads)


def test_loading_before_the_first_call_is_told_apart() -> None:
    model = Net()
    with record() as seen:
        for _ in range(3):
            model.load_state_dict(model.state_dict())
            if _ == 1:
                model(torch.ones(1, 8))
    assert [(load.count, load.at_start) for load in seen.script.loads] == [(3, 2)]


def test_moving_to_a_device_is_a_load_and_inside_a_call_it_says_so() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner.to("meta")
            return x

    model = Lazy()
    with record() as seen:
        model(torch.ones(1, 4))
    (load,) = seen.script.loads
    assert (load.what, load.count, load.in_calls, load.bytes) == (".to(device)", 1, 1, 80.0)


def test_what_a_library_loads_is_seen_when_it_is_imported_later_or_was_before(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    for is_new in (True, False):
        if is_new:
            old = sys.modules.pop("safetensors.torch")
        with record() as seen:
            from safetensors.torch import load_file

            load_file(tmp_path / "a.safetensors")
        if is_new:
            assert not hasattr(sys.modules["safetensors.torch"].load_file, "__wrapped__")
            sys.modules["safetensors.torch"] = old
        assert [(load.what, load.count) for load in seen.script.loads] == [("load_file", 1)]


def test_waits_for_a_device_are_counted_by_line(remote: None) -> None:
    values = torch.arange(6.0)
    with record() as seen:
        for value in values:
            value.item()
        at = here() - 1
        if values.sum() > 0:
            values.tolist()
        float(values[0])
    sites = {site.what: site for site in seen.script.syncs}
    assert set(sites) == {".item()", ".tolist()", "bool(tensor)", "float(tensor)"}
    assert sites[".item()"].count == 6 and sites[".item()"].line.endswith(f"{FILE}:{at}") and sites[".item()"].bytes == 24.0


def test_a_wait_inside_a_model_names_the_models_line(remote: None) -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    with record() as seen:
        Reads()(torch.ones(3))
    (site,) = seen.script.syncs
    assert site.in_calls == 1 and int(site.line.rpartition(":")[2]) == inspect.getsourcelines(Reads.forward)[1] + 1


def test_on_a_cpu_nothing_waits_and_nothing_is_copied() -> None:
    with record() as seen:
        value = torch.ones(3)
        value.sum().item(), value.cpu(), value.numpy(), value.to("cpu"), value.to(torch.float64)
    assert not seen.script.syncs and not seen.script.copies


def test_a_tensor_that_changes_its_device_is_a_copy() -> None:
    with record() as seen:
        torch.ones(3).to("meta")
    (copy,) = seen.script.copies
    assert (copy.what, copy.count, copy.bytes) == (".to() cpu to meta", 1, 12.0)


def test_names_come_from_the_source() -> None:
    holder = nn.ModuleDict({"a": Net()})

    class Owner:
        model = Net()

    owner, models = Owner(), [Net()]
    with record() as seen:
        print(owner.model(torch.ones(1, 8)).shape, "é", owner.model(torch.ones(1, 8)).shape)
        models[0](torch.ones(1, 8))
        holder["a"](torch.ones(1, 8))
        torch.compile(Net(), backend="eager")
        list(map(Net(), [torch.ones(1, 8)]))
    assert [m.name for m in sorted(seen.script.modules, key=lambda m: int(m.line.rpartition(":")[2]))] == ["owner.model", "", "", ""]


def test_data_parallel_is_named_with_what_it_wraps() -> None:
    model = nn.DataParallel(Net())
    with record() as seen:
        model(torch.ones(2, 8))
    (found,) = seen.script.modules
    assert found.is_data_parallel and found.module_class == "DataParallel(Net)" and found.inputs == ("x:float32[2,8]",)


def test_a_replica_in_a_thread_of_data_parallel_is_no_model_of_its_own() -> None:
    replica = Net()._replicate_for_data_parallel()
    replica.first, replica.last = nn.Linear(8, 8), nn.Linear(8, 4)
    with record() as seen:
        replica(torch.ones(1, 8))
    assert all(m.module_class != "Net" for m in seen.script.modules)


def test_compiled_code_holds_nothing_of_the_recorder() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    model = Net()
    with record() as seen:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        compiled(torch.ones(2, 8))
        compiled(torch.ones(2, 8))
    compiled(torch.ones(2, 8))
    assert len(graphs) == 1, "ending the recording must not compile anew"
    assert seen.script.modules[0].module_class == "OptimizedModule(Net)" and seen.script.modules[0].num_calls == 2
    torch._dynamo.reset()


def test_somebody_elses_patch_on_top_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Module.load_state_dict
    with record():
        ours = nn.Module.load_state_dict

        def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
            return ours(self, *args, **kwargs)

        nn.Module.load_state_dict = theirs  # type: ignore[method-assign]
    try:
        assert nn.Module.load_state_dict is theirs
        model = Net()
        model.load_state_dict(model.state_dict())
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def test_first_inputs_are_saved_as_inputs_takes_them(tmp_path: Path) -> None:
    from gpuopt.trust import gate

    model, x = Net(), torch.randn(2, 8)
    with record(save_inputs=tmp_path / "inputs") as seen:
        model(x, mask=torch.ones(8, dtype=torch.bfloat16))
        model(torch.randn(5, 8))
    name = seen.script.modules[0].saved_inputs
    assert name == "model.safetensors" and not seen.script.copies and not seen.script.notes
    saved = gate.load_safetensors(tmp_path / "inputs" / name)
    assert set(saved) == {"x", "mask"} and torch.equal(saved["x"], x) and saved["mask"].dtype == torch.bfloat16


def test_inputs_that_cannot_be_saved_are_a_note_and_the_program_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = Net()
    with record(save_inputs=tmp_path / "file") as seen:
        model(torch.ones(1, 8))
    assert seen.script.modules[0].num_calls == 1 and "not saved" in seen.script.notes[0]


def test_odd_arguments_are_no_obstacle() -> None:
    class Takes(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> int:
            return len(args) + len(kwargs)

    model = Takes()
    with record() as seen:
        assert model([torch.ones(2)], {"a": torch.ones(3)}, None, 3, x=(torch.ones(1), "text")) == 5
        assert model() == 0
    assert seen.script.modules[0].inputs == ("input0.0:float32[2]", "input1.a:float32[3]", "x.0:float32[1]")


def test_lines_show_no_path_of_the_machine() -> None:
    assert lines.shown("/opt/env/lib/python3.11/site-packages/pkg/a.py") == "pkg/a.py"
    assert lines.shown("/somewhere/else/b.py") == "b.py"
    assert lines.shown(os.path.join(os.getcwd(), "sub", "c.py")) == os.path.join("sub", "c.py")
    assert lines.kind(torch.nn.__file__) == "inside" and lines.kind(threading.__file__) == "inside"
    assert lines.caller(None) == ("", None)


def test_record_is_public_and_needs_torch_alone() -> None:
    assert gpuopt.record is record
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "yaml", "rich", "typer", "transformers", "onnx", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import gpuopt, torch
with gpuopt.record() as seen:
    torch.nn.Linear(2, 2)(torch.ones(1, 2))
import gpuopt.script.run
print(seen.script.modules[0].num_calls)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_a_nested_call_costs_little() -> None:
    """Overhead is bounded by what it says of itself: a submodule's call costs about a microsecond more."""
    model = nn.Sequential(*(nn.Identity() for _ in range(50)))
    with record() as seen:
        for _ in range(20):
            model(None)
    assert seen.num_nested == 1000 and seen.nested_s < 2e-5
