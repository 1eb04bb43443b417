"""ONNX Runtime on the CPU for real; its CUDA side by its options and fakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from gpuopt.backends import ort
from gpuopt.backends.ort.profile import Profile
from gpuopt.backends.ort.session import ELEMENT_TYPE, cuda_options, native, open_session, translated
from gpuopt.backends.ort.settings import CPU, CUDA, Settings, onnxruntime
from gpuopt.core.errors import BadInput, OutOfMemory, Unavailable, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import Precision, TensorSpec
from gpuopt.trust import gate, packages

DYNAMIC = {"N": (1, 16)}


def onnx_model(
    path: Path, nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, tuple[int, list[Any]]], constants: Any = ()
) -> Model:
    """A hand-made file."""

    def infos(values: dict[str, tuple[int, list[Any]]]) -> list[Any]:
        return [helper.make_tensor_value_info(n, t, s) for n, (t, s) in values.items()]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return Model(form="onnx", name=path.stem, path=path)


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", ["resnet", "bert"])
@pytest.mark.parametrize("preset", ["default", "basic"])
def test_a_file_runs_as_its_module_does_in_fp64(name: str, preset: str, exported: Callable[..., Any]) -> None:
    case = exported(name, torch.float32)
    runner = ort.build(case.model, case.inputs, {"preset": preset, "precision": "fp32"})
    assert isinstance(runner, Runner) and runner.device == "cpu"
    outputs = runner(*case.inputs.args, **case.inputs.kwargs)
    for found, reference in zip(outputs.values(), case.reference(), strict=True):
        assert found.dtype is torch.float32
        assert relative(found, reference) < 1e-5
    runner.close()
    runner.close()


def test_outputs_of_two_calls_do_not_share_memory(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    (first,) = runner(*case.inputs.args).values()
    kept = first.clone()
    (second,) = runner(case.inputs.args[0] * 2).values()
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_inputs_are_not_changed_and_read_where_they_are(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    x = case.inputs.args[0].clone()
    (before,) = runner(x).values()
    assert torch.equal(x, case.inputs.args[0])
    x.mul_(3.0)
    (after,) = runner(x).values()
    assert not torch.equal(before, after)


def test_a_channels_last_input_gives_the_same_numbers(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    x = case.inputs.args[0]
    (plain,) = runner(x).values()
    (strided,) = runner(x.to(memory_format=torch.channels_last)).values()
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_a_dynamic_batch_takes_its_whole_range(batch: int, exported: Callable[..., Any]) -> None:
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {"dynamic": DYNAMIC})
    inputs = case.at(batch)
    outputs = list(runner(**inputs.kwargs).values())
    for found, reference in zip(outputs, case.reference(inputs), strict=True):
        assert found.shape == reference.shape
        assert relative(found, reference) < 1e-5


def test_a_dimension_outside_its_range_is_refused_by_name(exported: Callable[..., Any]) -> None:
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {"dynamic": DYNAMIC})
    with pytest.raises(UsageError, match="N=17, this build takes 1 to 16"):
        runner(**case.at(17).kwargs)


def test_a_batch_that_was_not_declared_dynamic_is_refused(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    with pytest.raises(UsageError, match="5 in dimension 0, this build takes 3"):
        runner(*case.at(5).args)


def test_the_letters_of_the_file_may_differ_from_the_letters_of_the_inputs(exported: Callable[..., Any], tmp_path: Path) -> None:
    case = exported("resnet", torch.float32)
    proto = onnx.load(case.model.path)
    for value in [*proto.graph.input, *proto.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "batch_size"
    path = tmp_path / "renamed.onnx"
    onnx.save(proto, path)
    model = Model(
        form="onnx", name="renamed", path=path, signature=(TensorSpec(name="pixels", dtype="float32", shape=("batch_size", 3, 32, 32)),)
    )
    runner = ort.build(model, case.inputs, {"dynamic": DYNAMIC})
    assert next(iter(runner(*case.at(7).args).values())).shape[0] == 7
    with pytest.raises(UsageError, match="batch_size=17"):
        runner(*case.at(17).args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x.double(),), "is float64, the file wants float32"),
        (lambda x: (x[0],), "has shape"),
        (lambda x: (x, x), "has 1 inputs"),
        (lambda x: (), "was not given"),
        (lambda x: (x.to("meta"),), "is on meta"),
        (lambda x: (x[:, :2],), "2 in dimension 1, this build takes 3"),
    ],
)
def test_an_input_that_does_not_fit_is_a_usage_error(change: Any, message: str, exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    runner = ort.build(case.model, case.inputs, {})
    with pytest.raises(UsageError, match=message):
        runner(*change(case.inputs.args[0]))


def test_two_inputs_with_one_letter_must_agree(exported: Callable[..., Any]) -> None:
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {"dynamic": DYNAMIC})
    kwargs = dict(case.inputs.kwargs)
    kwargs["attention_mask"] = kwargs["attention_mask"][:2]
    with pytest.raises(UsageError, match="N=2, another input has 3"):
        runner(**kwargs)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("free", [False, True], ids=["known shape", "shape only the run tells"])
def test_every_dtype_crosses_the_border_bit_for_bit(dtype: torch.dtype, free: bool, tmp_path: Path) -> None:
    number = ELEMENT_TYPE[dtype]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = onnx_model(tmp_path / "i.onnx", nodes, {"x": (number, [2, 3])}, {"y": (number, [None, None] if free else [2, 3])})
    torch.manual_seed(0)
    x = torch.randint(0, 2 if dtype is torch.bool else 100, (2, 3)).to(dtype)
    (y,) = ort.build(model, Inputs(args=(x,)), {"optimization": "off"})(x).values()
    assert y.dtype is dtype
    assert torch.equal(x, y)


def test_data_dependent_outputs_and_empty_ones_come_back(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["y"])]
    model = onnx_model(tmp_path / "nz.onnx", nodes, {"x": (TensorProto.FLOAT, [6])}, {"y": (TensorProto.INT64, [1, None])})
    x = torch.tensor([0.0, 1, 0, 2, 0, 3])
    runner = ort.build(model, Inputs(args=(x,)), {})
    assert next(iter(runner(x).values())).tolist() == [[1, 3, 5]]
    assert next(iter(runner(torch.zeros(6)).values())).shape == (1, 0)


def test_a_zero_size_batch_has_a_defined_result(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = onnx_model(tmp_path / "z.onnx", nodes, {"x": (TensorProto.FLOAT, ["N", 4])}, {"y": (TensorProto.FLOAT, ["N", 4])})
    runner = ort.build(model, Inputs(args=(torch.zeros(2, 4),)), {})
    assert next(iter(runner(torch.zeros(0, 4)).values())).shape == (0, 4)


def test_an_operator_without_a_kernel_is_unsupported_with_its_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    kinds = {"x": (TensorProto.BFLOAT16, [1, 1, 4, 4]), "w": (TensorProto.BFLOAT16, [1, 1, 3, 3])}
    model = onnx_model(tmp_path / "c.onnx", nodes, kinds, {"y": (TensorProto.BFLOAT16, [1, 1, 2, 2])})
    inputs = Inputs(args=(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)))
    with pytest.raises((Unsupported, BadInput), match="Conv"):
        ort.build(model, inputs, {})


def test_strings_are_unsupported(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = onnx_model(tmp_path / "s.onnx", nodes, {"x": (TensorProto.STRING, [1])}, {"y": (TensorProto.STRING, [1])})
    with pytest.raises(Unsupported, match="tensor\\(string\\)"):
        ort.build(model, Inputs(args=(torch.zeros(1),)), {})


def test_an_unknown_preset_or_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(form="onnx", name="m", path=Path("m.onnx"))
    with pytest.raises(UsageError, match="no preset 'fast'"):
        ort.build(model, Inputs(), {"preset": "fast"})
    with pytest.raises(UsageError, match="no option 'thread'"):
        ort.build(model, Inputs(), {"thread": 2})
    with pytest.raises(UsageError, match="optimization is 'O9'"):
        ort.build(model, Inputs(), {"optimization": "O9"})
    with pytest.raises(UsageError, match="provider is 'directml'"):
        ort.build(model, Inputs(), {"provider": "directml"})
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(UsageError, match="ort:nhwc is for cuda"):
        ort.build(model, Inputs(), {"preset": "nhwc"})


# -- bundle ---------------------------------------------------------------------------------------------------------------------------


def test_a_saved_runner_loads_again_and_gives_the_same_bits(exported: Callable[..., Any], tmp_path: Path) -> None:
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {"dynamic": DYNAMIC, "precision": "fp32"})
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = runner.save(folder)
    assert set(files.values()) == {p.name for p in folder.iterdir()}
    again = ort.load(folder, files, {}, "cpu")
    assert again.audit() is None
    for a, b in zip(runner(**case.inputs.kwargs).values(), again(**case.inputs.kwargs).values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match="N=17"):
        again(**case.at(17).kwargs)
    audit = again.audit()
    assert audit is not None and audit.honoured


def test_external_weights_travel_with_the_file(tmp_path: Path) -> None:
    a = onnx.numpy_helper.from_array(np.full((64, 64), 0.25, dtype=np.float32), "a")
    source = tmp_path / "source"
    source.mkdir()
    nodes = [helper.make_node("MatMul", ["x", "a"], ["y"])]
    model = onnx_model(source / "m.onnx", nodes, {"x": (TensorProto.FLOAT, [2, 64])}, {"y": (TensorProto.FLOAT, [2, 64])}, [a])
    proto = onnx.load(model.path)
    onnx.save(proto, model.path, save_as_external_data=True, location="m.data", size_threshold=16)
    x = torch.ones(2, 64)
    runner = ort.build(model, Inputs(args=(x,)), {})
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = runner.save(folder)
    assert len(files) == 3
    (source / "m.data").unlink()
    assert next(iter(ort.load(folder, files, {}, "cpu")(x).values())).unique().tolist() == [16.0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ranges": {"N": 3}, "fixed": {}}', '{"ranges": {}, "fixed": {}, "eval": "x"}'])
def test_spoiled_settings_are_bad_input(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(BadInput, match="cannot be read"):
        ort.load(tmp_path, {"settings": "settings.json", "onnx": "model.onnx"}, {}, "cpu")


def test_a_bundle_for_cuda_says_so_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"provider": "cuda", "fixed": {}, "ranges": {}}))
    with pytest.raises(Unavailable, match="built for ONNX Runtime on cuda"):
        ort.load(tmp_path, {"settings": "settings.json", "onnx": "model.onnx"}, {}, "cpu")


# -- availability and the CUDA side, without a GPU ------------------------------------------------------------------------------------


def test_cuda_without_its_provider_is_unavailable_and_never_a_cpu_session(exported: Callable[..., Any]) -> None:
    reason = ort.available("cuda")
    assert reason is not None and "no CUDA" in reason
    case = exported("resnet", torch.float32)
    with pytest.raises(Unavailable, match="no CUDA"):
        ort.build(case.model, case.inputs, {"device": "cuda"})


@pytest.mark.parametrize("options", [{"preset": "cuda"}, {"preset": "tunable"}, {"provider": "cuda"}])
@pytest.mark.parametrize(
    ("wheels", "said"),
    [
        ({"onnxruntime": "1.31.1"}, "onnxruntime 1.31.1 has no CUDA provider"),
        (
            {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"},
            "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 (installed over each other",
        ),
    ],
)
def test_the_cuda_provider_asked_of_the_cpu_wheel_is_unavailable_whatever_the_device(
    wheels: dict[str, str], said: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 4 and not 2: with this wheel there is no command line that would do. The wheel found and the one wanted are named."""
    monkeypatch.setattr(packages, "_of_wheel", lambda name: wheels.get(name, ""))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    model = Model(form="onnx", name="m", path=Path("m.onnx"))
    for device in ("cpu", "cuda:0"):
        with pytest.raises(Unavailable) as caught:
            ort.build(model, Inputs(), {**options, "device": device})
        assert said in caught.value.message
        assert "gpuopt[ort-gpu]" in caught.value.fix
    assert said in (ort.available("cuda:0") or "") and "gpuopt[ort-gpu]" in (ort.available("cuda:0") or "")


def test_a_session_that_fell_to_the_cpu_is_unavailable(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return [CPU]

    class Stream:
        cuda_stream = 7

    seen: list[Any] = []

    def session(path: Path, providers: list[Any], options: Any = None, **_: Any) -> Fallen:
        seen.extend(providers)
        return Fallen()

    monkeypatch.setattr(gate, "onnx_session", session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    settings = Settings(provider="cuda", fixed={}, ranges={}, prefer_nhwc=True)
    with pytest.raises(Unavailable, match="asked for CUDAExecutionProvider and made a session on CPUExecutionProvider"):
        open_session(Path("m.onnx"), settings, 0, Stream())  # type: ignore[arg-type]
    (name, options), cpu = seen
    assert (name, cpu) == (CUDA, CPU)
    assert options["user_compute_stream"] == "7" and options["prefer_nhwc"] == "1"


def test_without_cpu_nodes_the_cpu_provider_is_not_even_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def session(path: Path, providers: list[Any], options: Any = None, **_: Any) -> Any:
        seen.extend(providers)
        raise Unsupported("stop here")

    monkeypatch.setattr(gate, "onnx_session", session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)

    class Stream:
        cuda_stream = 7

    with pytest.raises(Unsupported, match="stop here"):
        open_session(Path("m.onnx"), Settings(provider="cuda", cpu_nodes=False, fixed={}, ranges={}), 0, Stream())  # type: ignore[arg-type]
    assert [name for name, _ in seen] == [CUDA]


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1"), ("fp16", "0"), (None, "0")])
def test_tf32_is_off_unless_asked_for(precision: str | None, tf32: str) -> None:
    settings = Settings(provider="cuda", precision=precision, fixed={}, ranges={})
    assert cuda_options(settings, 0, 5)["use_tf32"] == tf32


def test_out_of_memory_is_told_from_other_failures() -> None:
    with pytest.raises(OutOfMemory), translated("m"):
        raise native.RuntimeException("BFCArena: Failed to allocate memory for requested buffer of size 1")
    with pytest.raises(Unsupported), translated("m"):
        raise native.Fail("no")
    with pytest.raises(Unsupported, match="no kernel"), translated("m"):
        refused = BadInput("refused")
        refused.__cause__ = native.NotImplemented("Could not find an implementation for Conv(11)")
        raise refused


def test_an_emptied_package_is_said_to_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime, "InferenceSession")
    reason = ort.available("cpu") or ""
    assert onnxruntime.__version__ in reason and "1.24 or later" in reason and "pip install" in reason


def test_what_can_never_be_has_a_reason() -> None:
    assert ort.supports("onnx", Precision.FP16, "cpu") is None
    assert "TF32" in (ort.supports("onnx", Precision.TF32, "cpu") or "")
    assert ort.supports("onnx", Precision.TF32, "cuda:0") is None
    assert "not module" in (ort.supports("module", None, "cpu") or "")
    assert "dequantize" in (ort.supports("onnx", Precision.INT8, "cpu") or "")


def test_a_profile_without_a_run_in_it_is_told(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = exported("bert", torch.float32)
    runner = ort.build(case.model, case.inputs, {"precision": "fp32"})
    runner(**case.inputs.kwargs)
    monkeypatch.setattr(runner, "_profiled", lambda *_, **__: Profile(calls=(), began_ns=0))
    with pytest.raises(Unsupported, match="a profile without a run in it"):
        runner.audit()


# -- on a GPU -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["default", "nhwc"])
@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_cuda_gives_the_modules_numbers_without_leaving_the_device(name: str, preset: str, exported: Callable[..., Any]) -> None:
    case = exported(name, torch.float16)
    inputs = case.inputs.map(lambda t: t.cuda())
    runner = ort.build(case.model, inputs, {"preset": preset, "precision": "fp16"})
    for _ in range(4):  # later calls reuse the memory of earlier ones
        outputs = runner(*inputs.args, **inputs.kwargs)
    for found, reference in zip(outputs.values(), case.reference(), strict=True):
        assert found.is_cuda and found.dtype is torch.float16
        assert relative(found.cpu(), reference) < 2e-2
    audit = runner.audit()
    assert audit is not None and audit.honoured, audit
    assert audit.placements.get(CUDA, 0.0) > 0.99


@pytest.mark.gpu
def test_cuda_calls_are_ordered_with_the_callers_stream(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    x = case.inputs.args[0].cuda()
    runner = ort.build(case.model, Inputs(args=(x,), specs=case.inputs.specs), {"precision": "fp32"})
    (expected,) = runner(x).values()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            late = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            (found,) = runner(late).values()
            late.zero_()  # must not overtake the run
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.gpu
def test_tf32_changes_the_numbers_on_cuda_and_the_audit(export_module: Callable[..., Any]) -> None:
    torch.manual_seed(0)  # a product large enough that cuBLAS has a TF32 kernel for it: it picks none for the tiny BERT's
    module = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 512)).eval()
    x = torch.randn(512, 1024)
    specs = (TensorSpec(name="input", dtype="float32", shape=(512, 1024)),)
    case = export_module(module, Inputs(args=(x,), specs=specs), dynamic=False)
    with torch.no_grad():
        exact = module.double()(x.double())
    inputs = case.inputs.map(lambda t: t.cuda())
    errors = {}
    for precision in ("fp32", "tf32"):
        runner = ort.build(case.model, inputs, {"precision": precision})
        found = runner(*inputs.args, **inputs.kwargs)
        errors[precision] = relative(next(iter(found.values() if isinstance(found, dict) else [found])).cpu(), exact)
        audit = runner.audit()
        assert audit is not None and audit.honoured, audit
    assert errors["fp32"] < 1e-5 < errors["tf32"] < 1e-2
