"""The runner of engines against a fake TensorRT that reads and writes real pointers; flavours, logs and layer texts without any TensorRT."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.backends.trt import audit, flavour, network, runner
from gpuopt.core.errors import OutOfMemory, Unavailable, UsageError
from gpuopt.core.live import Runner
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision

# -- a fake TensorRT ------------------------------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Location(enum.Enum):
    HOST = 1
    DEVICE = 2


class DType(enum.Enum):
    FLOAT = 1


class Base:
    def __init__(self) -> None: ...


class Context:
    """y = 2x by the addresses it was given; `z` holds the positive elements of x, as many as there are."""

    def __init__(self, events: list[Any]) -> None:
        self.events, self.shapes, self.addresses, self.allocators = events, {}, {}, {}
        self.runs = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address, "TensorRT refuses null"
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name == "y" else (-1,)

    def set_output_allocator(self, name: str, allocator: Any) -> None:
        self.allocators[name] = allocator

    def execute_async_v3(self, stream: int) -> bool:
        self.events.append(("run", stream))
        if not self.runs:
            return False
        size = torch.Size(self.shapes["x"]).numel()
        x = (ctypes.c_float * size).from_address(self.addresses["x"])
        y = (ctypes.c_float * size).from_address(self.addresses["y"])
        y[:] = [2 * value for value in x]
        kept = [value for value in x if value > 0]
        address = self.allocators["z"].reallocate_output_async("z", 0, 4 * len(kept), 256, stream)
        (ctypes.c_float * len(kept)).from_address(address)[:] = kept
        self.allocators["z"].notify_shape("z", (len(kept),))
        return True


class FakeEngine:
    num_io_tensors = 3

    def __init__(self, events: list[Any]) -> None:
        self.context = Context(events)

    def get_tensor_name(self, i: int) -> str:
        return "xyz"[i]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DType:
        return DType.FLOAT

    def get_tensor_location(self, name: str) -> Location:
        return Location.DEVICE

    def create_execution_context(self) -> Context:
        return self.context


class FakeStream:
    def __init__(self, events: list[Any], handle: int) -> None:
        self.events, self.cuda_stream = events, handle

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append((self.cuda_stream, "waits for", other.cuda_stream))


FACTS = runner.Facts(
    flavour="tensorrt",
    version="11.1.0.1",
    compute_capability="9.0",
    device_name="NVIDIA H200",
    portable=False,
    version_compatible=False,
    precision="fp32",
    profile={"x": ((1, 2), (2, 2), (4, 2))},
)


@pytest.fixture
def events() -> list[Any]:
    return []


@pytest.fixture
def current() -> list[int]:
    """Handle of torch's current stream; 0 is the default stream."""
    return [0]


@pytest.fixture
def engine(events: list[Any], current: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[runner.EngineRunner]:
    """A runner whose device memory is the host's."""
    fake = types.SimpleNamespace(
        ILogger=Base, IOutputAllocator=Base, TensorIOMode=Mode, TensorLocation=Location, __version__="11.1.0.1",
        Runtime=lambda log: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: FakeEngine(events) if plan == b"good" else None),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: FakeStream(events, 99))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: FakeStream(events, current[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index=None: events.append("sync"))
    made = runner.EngineRunner(b"good", FACTS, flavour.Flavour(name="tensorrt", version="11.1.0.1", module=fake), Path("m.onnx"), "cpu")
    yield made
    made.close()


def test_outputs_are_written_where_torch_reads_them(engine: runner.EngineRunner) -> None:
    assert isinstance(engine, Runner)
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    out = engine(x)
    assert torch.equal(out["y"], 2 * x)
    assert out["z"].tolist() == [1.0, 3.0, 4.0], "an output whose size only the run tells comes from the allocator"


def test_two_calls_share_no_memory(engine: runner.EngineRunner) -> None:
    first = engine(torch.ones(2, 2))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    engine(torch.full((2, 2), 5.0))
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_a_transposed_input_is_read_in_its_own_order(engine: runner.EngineRunner) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()
    assert not x.is_contiguous()
    assert torch.equal(engine(x)["y"], 2 * x)


def test_the_default_stream_is_never_handed_to_tensorrt(engine: runner.EngineRunner, events: list[Any]) -> None:
    events.clear()
    engine(torch.ones(1, 2))
    assert events == [(99, "waits for", 0), ("run", 99), (0, "waits for", 99)]


def test_a_stream_of_the_callers_own_is_used_as_it_is(engine: runner.EngineRunner, events: list[Any], current: list[int]) -> None:
    current[0] = 7
    events.clear()
    engine(torch.ones(1, 2))
    assert events == [("run", 7)], "no host synchronisation, no second stream"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(5, 2), "5 in dimension 0, the engine takes 1 to 4"),
        (torch.ones(2, 3), "3 in dimension 1, the engine takes 2"),
        (torch.ones(2), "wants 2 dimensions"),
        (torch.ones(2, 2).double(), "is float64, the engine wants float32"),
        (torch.ones(2, 2, device="meta"), "is on meta"),
    ],
)
def test_inputs_outside_the_profile_never_reach_the_engine(
    engine: runner.EngineRunner, events: list[Any], x: torch.Tensor, message: str
) -> None:
    events.clear()
    with pytest.raises(UsageError, match=message):
        engine(x)
    assert events == []


def test_a_failed_run_carries_tensorrts_own_words(engine: runner.EngineRunner) -> None:
    engine._context.runs = False
    engine._log.take("ERROR", "IExecutionContext::enqueueV3: Error Code 2: out of memory")
    with pytest.raises(OutOfMemory, match="enqueueV3"):
        engine(torch.ones(1, 2))


def test_a_closed_runner_cannot_be_called_and_closes_twice(engine: runner.EngineRunner) -> None:
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine(torch.ones(1, 2))


def test_a_plan_that_the_runtime_refuses_is_unavailable(engine: runner.EngineRunner) -> None:
    found = flavour.Flavour(name="tensorrt", version="11.1.0.1", module=engine._trt)
    with pytest.raises(Unavailable, match="does not accept this plan"):
        runner.EngineRunner(b"bad", FACTS, found, Path("m.onnx"), "cpu")


# -- facts ----------------------------------------------------------------------------------------------------------------------------


def test_facts_survive_their_file(tmp_path: Path) -> None:
    runner.write_facts(FACTS, tmp_path / "f.json")
    assert runner.read_facts(tmp_path / "f.json") == FACTS


H200 = {"capability": "9.0", "device_name": "NVIDIA H200"}
PLAIN = flavour.Flavour(name="tensorrt", version="11.1.0.1", module=None)


@pytest.mark.parametrize(
    ("changes", "here", "message"),
    [
        ({}, H200, None),
        ({"version": "11.0.0.9"}, H200, "tensorrt 11.0.0.9, here is version 11.1.0.1"),
        ({"version": "11.0.0.9", "version_compatible": True}, H200, None),
        ({"version": "10.9.0.1", "version_compatible": True}, H200, "10.9.0.1"),
        ({"flavour": "tensorrt_rtx"}, H200, "built by tensorrt_rtx"),
        ({}, {"capability": None, "device_name": None}, "no NVIDIA GPU"),
        ({}, {"capability": "8.0", "device_name": "NVIDIA A100"}, "compute capability 9.0, this GPU has 8.0"),
        ({}, {"capability": "9.0", "device_name": "NVIDIA H100"}, "built on NVIDIA H200, this GPU is NVIDIA H100"),
        ({"portable": True}, {"capability": "9.0", "device_name": "NVIDIA H100"}, None),
        ({"device_name": ""}, {"capability": "9.0", "device_name": "NVIDIA H100"}, None),
    ],
)  # fmt: skip
def test_an_engine_runs_only_where_its_facts_say(changes: Any, here: Any, message: str | None) -> None:
    from dataclasses import replace

    found = runner.mismatch(replace(FACTS, **changes), PLAIN, **here)
    assert found is None if message is None else found is not None and message in found


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 12))
def test_a_size_is_accepted_exactly_within_its_range(low: int, more: int, size: int) -> None:
    profile = {"x": ((low, 2), (low, 2), (low + more, 2))}
    tensors = {"x": torch.zeros(size, 2)}
    if low <= size <= low + more:
        assert runner.check_inputs(tensors, profile, {"x": torch.float32}, "cpu")["x"].shape == (size, 2)
    else:
        with pytest.raises(UsageError, match=f"{size} in dimension 0"):
            runner.check_inputs(tensors, profile, {"x": torch.float32}, "cpu")


# -- flavours -------------------------------------------------------------------------------------------------------------------------


def fake_modules(monkeypatch: pytest.MonkeyPatch, present: dict[str, Any]) -> None:
    """Only these TensorRT modules can be imported; an exception stands for a module that is there and does not load."""

    def find_spec(name: str) -> Any:
        return object() if name in present else None

    def import_module(name: str) -> Any:
        if isinstance(present[name], Exception):
            raise present[name]
        return present[name]

    monkeypatch.setattr(flavour, "_FOUND", {})
    monkeypatch.setattr(
        flavour, "importlib", types.SimpleNamespace(util=types.SimpleNamespace(find_spec=find_spec), import_module=import_module)
    )
    monkeypatch.setattr(flavour, "_preload", lambda: None)


def module(name: str, version: str, **members: Any) -> Any:
    return types.SimpleNamespace(__name__=name, __version__=version, **({"Builder": 1, "OnnxParser": 1} | members))


def test_plain_tensorrt_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"tensorrt": module("tensorrt", "11.1.0.1"), "tensorrt_rtx_bindings": module("tensorrt_rtx_bindings", "1.7")})
    assert flavour.find().title == "TensorRT 11.1.0.1"
    assert flavour.find("tensorrt_rtx").title == "TensorRT-RTX 1.7"


def test_the_bindings_alone_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"tensorrt_rtx_bindings": module("tensorrt_rtx_bindings", "1.7")})
    assert flavour.find().is_rtx


def test_nothing_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {})
    with pytest.raises(Unavailable, match="is not installed") as caught:
        flavour.find()
    assert "gpuopt[trt]" in caught.value.fix


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), OSError("libnvinfer.so.11: cannot open shared object file")])
def test_a_broken_tensorrt_is_said_to_be_broken_and_not_passed_over(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"tensorrt": error, "tensorrt_rtx": module("tensorrt_rtx", "1.7")})
    with pytest.raises(Unavailable, match="tensorrt is installed but does not load: .*(undefined symbol|libnvinfer)"):
        flavour.find()


def test_a_placeholder_package_is_not_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"tensorrt": types.SimpleNamespace(__name__="tensorrt", __version__="11.1")})
    with pytest.raises(Unavailable, match="is not TensorRT"):
        flavour.find()


def test_an_old_tensorrt_is_refused_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"tensorrt": module("tensorrt", "8.6.1")})
    with pytest.raises(Unavailable, match=r"TensorRT 8\.6\.1 is too old"):
        flavour.find()


def test_plain_tensorrt_11_needs_no_strong_typing_flag_and_10_does() -> None:
    flags = types.SimpleNamespace(NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=1))
    assert network._network_flags(flavour.Flavour(name="tensorrt", version="11.1.0.1", module=flags)) == 0
    assert network._network_flags(flavour.Flavour(name="tensorrt", version="10.9.0.1", module=flags)) == 2
    assert network._network_flags(flavour.Flavour(name="tensorrt_rtx", version="1.7.1.116", module=flags)) == 2


def test_libraries_are_found_by_variable_or_beside_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv(flavour.LIBRARIES_VARIABLE, raising=False)
    assert flavour.libraries_folder() is None
    for folder in (tmp_path / "trt-rtx", tmp_path / "named"):
        folder.mkdir()
        for name in flavour.RTX_LIBRARIES:
            (folder / name).touch()
    assert flavour.libraries_folder() == tmp_path / "trt-rtx"
    monkeypatch.setenv(flavour.LIBRARIES_VARIABLE, str(tmp_path / "named"))
    assert flavour.libraries_folder() == tmp_path / "named"
    monkeypatch.setenv(flavour.LIBRARIES_VARIABLE, str(tmp_path / "absent"))
    assert flavour.libraries_folder() is None, "a named folder without the libraries is not passed over for another"


# -- log, cache, layer texts ----------------------------------------------------------------------------------------------------------


def fake_log() -> network.Log:
    return network.Log(types.SimpleNamespace(ILogger=Base))


def test_the_log_keeps_errors_and_the_layers_and_forgets_old_lines() -> None:
    log = fake_log()
    for i in range(5000):
        log.logger.log(types.SimpleNamespace(name="VERBOSE"), f"line {i}")
    log.take("ERROR", "IBuilder: Error Code 9: Internal Error (no tactic In build at /_src/a.cpp:12)\n")
    log.take("WARNING", "x.cpp:1: twice")
    log.take("WARNING", "x.cpp:1: twice")
    log.take("WARNING", "ModelImporter.cpp:1071: Make sure input ids has Int64 binding.")
    log.take("VERBOSE", "Layers:\nName: a")
    assert len(log.lines) <= 400
    assert log.last_error == "IBuilder: Error Code 9: Internal Error (no tactic)"
    assert log.warnings == ["twice"]
    assert log.layers == "Layers:\nName: a"


def test_a_cache_folder_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = network.cache_folder()
    assert folder == tmp_path / "gpuopt" / "trt"
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert network.cache_folder() is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert network.cache_folder() is None


def test_timings_are_kept_for_plain_tensorrt_and_published_whole(tmp_path: Path) -> None:
    class Config:
        def __init__(self) -> None:
            self.given = b""

        def create_timing_cache(self, data: bytes) -> bytes:
            self.given = data
            return data

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
            assert not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return types.SimpleNamespace(serialize=lambda: self.given + b"+")

    path = tmp_path / "t.cache"
    for expected in (b"", b"+"):
        config = Config()
        with network._timing_cache(PLAIN, config, path):
            assert config.given == expected
    assert path.read_bytes() == b"++"
    assert list(tmp_path.iterdir()) == [path]
    rtx = flavour.Flavour(name="tensorrt_rtx", version="1.7", module=None)
    with network._timing_cache(rtx, object(), path):  # its calls are deprecated no-ops: not even touched
        pass


LINE = (
    "Name: gemm_1, LayerType: {kind}, Inputs: [ {{ Name: x, Dimensions: [4,8], Strides: [8,1], StrideOrder: [1,0], Datatype: {x}, Format: (Linear) Row }}], "
    "Constants: [ {{ Name: one, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row }}, "
    "{{ Name: w, Dimensions: [8,16], Strides: [16,1], StrideOrder: [1,0], Datatype: {w}, Format: (Linear) Row }}], "
    "Outputs: [ {{ Name: y, Dimensions: [4,16], Strides: [16,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row }}], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a]\x1f[ONNX Layer: b]"
)


@pytest.mark.parametrize(
    ("x", "w", "dtype"),
    [("Half", "Half", "float16"), ("Half", "Float", "float32"), ("BFloat16", "BFloat16", "bfloat16"), ("Int8", "Int8", "int8")],
)
def test_an_engine_layer_is_read_from_the_builders_text(x: str, w: str, dtype: str) -> None:
    (layer,) = audit.engine_layers("Layers:\n" + LINE.format(kind="gemm", x=x, w=w) + "\n\nI/O Tensors:\n Name: x, IOMode: Input")
    assert (layer.name, layer.kind, layer.dtype, layer.sources) == ("gemm_1", "gemm", dtype, ("a", "b"))


def test_an_engine_layer_is_read_from_the_inspectors_json() -> None:
    text = """{"Layers": [
      {"Name": "c", "LayerType": "Convolution", "Metadata": "[ONNX Layer: conv1]",
       "Inputs": [{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP16 format"}], "Outputs": []},
      "a name alone, at the default verbosity"], "Bindings": []}"""
    (layer,) = audit.engine_layers(text)
    assert (layer.name, layer.dtype, layer.sources) == ("c", "float16", ("conv1",))


def test_text_that_is_neither_gives_no_layers() -> None:
    assert audit.engine_layers("") == ()
    assert audit.engine_layers("Layers:\nsomething else entirely") == ()


def product(name: str, dtype: str, flops: float | None) -> audit.Layer:
    return audit.Layer(name=name, op="MATRIX_MULTIPLY", kind="product", dtype=dtype, flops=flops)


def built(dtype: str, *sources: str, kind: str = "gemm") -> audit.EngineLayer:
    return audit.EngineLayer(name="e", kind=kind, dtype=dtype, sources=sources)


def test_the_engine_outweighs_the_network_when_it_can_be_joined() -> None:
    layers = (product("a", "float16", 90.0), product("b", "float16", 10.0))
    found = audit.audit_layers(layers, [built("float16", "a"), built("float32", "b")], Precision.FP16, is_tf32=False)
    assert found.shares == {"float16": 0.9, "float32": 0.1} and not found.honoured
    assert found.method.startswith("engine layers")
    assert found.exceptions == ("b (matrix_multiply): float32, 10.0%",)


def test_the_network_speaks_where_the_engine_cannot_be_joined() -> None:
    layers = (product("a", "float16", 50.0), product("b", "float16", 50.0))
    found = audit.audit_layers(layers, [built("float32", "a")], Precision.FP16, is_tf32=False)
    assert found.method == "network layers" and found.honoured


def test_a_copying_layer_does_not_speak_for_the_product_it_is_named_after() -> None:
    found = audit.audit_layers(
        (product("a", "float16", 1.0),), [built("float32", "a", kind="kgen"), built("float16", "a")], Precision.FP16, is_tf32=False
    )
    assert found.shares == {"float16": 1.0}


def test_layers_that_cannot_be_weighed_are_judged_by_their_dtype() -> None:
    for dtype, honoured in (("float16", True), ("float32", False)):
        found = audit.audit_layers((product("w", "float16", 1.0), product("a", dtype, None)), (), Precision.FP16, is_tf32=False)
        assert found.honoured is honoured and "a (matrix_multiply)" in found.reason


def test_a_network_without_products_has_nothing_to_honour() -> None:
    found = audit.audit_layers((), (), Precision.FP16, is_tf32=False)
    assert isinstance(found, PrecisionAudit) and found.honoured and found.shares == {}


def test_an_inspected_engine_is_judged_by_its_layers() -> None:
    text = "Layers:\n" + LINE.format(kind="gemm", x="Half", w="Half") + "\n" + LINE.format(kind="gemm", x="Float", w="Float")
    found = runner.audit_inspected(text, Precision.FP16)
    assert found.shares == {"float16": 0.5, "float32": 0.5} and not found.honoured


# -- the script that fetches the libraries --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parents[1] / "fetch_trt_rtx.py"
    spec = importlib.util.spec_from_file_location("fetch_trt_rtx", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_fetched_names_are_those_the_backend_loads(script: Any) -> None:
    assert set(script.LIBRARIES.values()) == set(flavour.RTX_LIBRARIES)


def test_fetching_does_nothing_the_second_time(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "pip", lambda *_: pytest.fail("pip was run"))
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: script.BINDINGS_VERSION)
    for name in script.LIBRARIES.values():
        (tmp_path / name).touch()
    assert not script.is_done(tmp_path)
    (tmp_path / script.STAMP).write_text(script.stamp_text())
    assert script.main([str(tmp_path)]) == 0


def test_a_failed_download_leaves_nothing_and_fails(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: str) -> None:
        raise script.subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(script, "pip", fail)
    monkeypatch.setattr(script.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(script.sys, "platform", "linux")
    assert script.main([str(tmp_path / "libs")]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "pip failed" in capsys.readouterr().err


def test_a_machine_without_such_wheels_is_told_so(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.platform, "machine", lambda: "arm64")
    assert script.main([str(tmp_path)]) == 1
    assert "arm64" in capsys.readouterr().err
