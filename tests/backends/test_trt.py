"""Engines built for real by TensorRT-RTX, without a GPU: precision proven, ranges, refusals, bundles."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from gpuopt.backends import trt
from gpuopt.backends.trt import audit, flavour, network, runner
from gpuopt.core.errors import BadInput, Unavailable, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import Precision, TensorSpec

pytestmark = pytest.mark.trt
DYNAMIC = {"N": (1, 16)}
PRECISION = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(scope="module", autouse=True)
def found() -> flavour.Flavour:
    """The installed TensorRT; its absence is a loud skip."""
    try:
        return flavour.find()
    except Unavailable as error:
        pytest.skip(f"TENSORRT IS NOT TESTED: {error.message}. Install it: python tests/fetch_trt_rtx.py .venv/trt-rtx")


def build(case: Any, **options: Any) -> Any:
    return trt.build(case.model, case.inputs, {"build_only": True, **options})


def parsed(path: Path) -> network.Parsed:
    return network.parse(path, flavour.find())


def shapes_of(case: Any) -> dict[str, tuple[int, ...]]:
    names = [i.name for i in onnx.load(case.model.path).graph.input]
    return dict(zip(names, [tuple(t.shape) for t in (*case.inputs.args, *case.inputs.kwargs.values())], strict=True))


# -- precision ------------------------------------------------------------------------------------------------------------------------


# torch.onnx 2.13 by itself folds batch norm into fp32 weights beside bf16 data: a bf16 ResNet must come from our own converter, as below.
BUILT = [("resnet", torch.float32), ("resnet", torch.float16), ("bert", torch.float32), ("bert", torch.float16), ("bert", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), BUILT, ids=[f"{n}-{PRECISION[d]}" for n, d in BUILT])
@pytest.mark.parametrize("dynamic", [{}, DYNAMIC], ids=["static", "dynamic"])
def test_an_engine_is_built_and_proven_to_run_in_the_dtype_asked_for(
    name: str, dtype: torch.dtype, dynamic: Any, exported: Callable[..., Any]
) -> None:
    case = exported(name, dtype)
    engine = build(case, precision=PRECISION[dtype], dynamic=dynamic)
    assert isinstance(engine, Runner) and engine.build_only
    found = engine.audit()
    assert found is not None and found.honoured, found
    assert found.shares == {str(dtype).removeprefix("torch."): 1.0}
    assert found.method.startswith("engine layers"), "the builder's own description of the engine must be joined, not the network alone"
    assert len(engine._engine.plan) > 10_000


def test_a_bf16_resnet_of_our_own_converter_is_built(exported: Callable[..., Any], tmp_path: Path) -> None:
    from gpuopt.converters import onnx as converter

    case = exported("resnet", torch.float32)
    module = copy.deepcopy(case.module).bfloat16()
    inputs = case.inputs.map(lambda t: t.bfloat16())
    path = converter.export(Model(form="module", name="resnet", module=module, dtype="bfloat16"), inputs, tmp_path / "m.onnx", DYNAMIC)
    signature = (TensorSpec(name="pixels", dtype="bfloat16", shape=("N", 3, 32, 32)),)
    engine = trt.build(
        Model(form="onnx", name="m", path=path, signature=signature), inputs, {"build_only": True, "precision": "bf16", "dynamic": DYNAMIC}
    )
    found = engine.audit()
    assert found is not None and found.honoured and found.shares == {"bfloat16": 1.0}


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_an_fp32_file_asked_for_in_fp16_is_not_honoured(name: str, exported: Callable[..., Any]) -> None:
    """The silent failure of tools written for TensorRT 10: a precision flag that no longer does anything."""
    found = build(exported(name, torch.float32), precision="fp16").audit()
    assert found is not None and not found.honoured
    assert found.shares == {"float32": 1.0}
    assert found.exceptions and "float32" in found.exceptions[0]


class Widened(torch.nn.Module):
    """A part left in fp32 inside a half-precision model, casts around it: what a careless exporter, or an "always fp32" list, makes."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part.float()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.part(x.float(), *args, **kwargs)
        return tuple(o.half() for o in out) if isinstance(out, tuple) else out.half()


def widened(name: str, exported: Callable[..., Any], export_module: Callable[..., Any]) -> Any:
    case = exported(name, torch.float16)
    module = copy.deepcopy(case.module).half()
    parts = module.net.model.resnet.encoder.stages if name == "resnet" else module.bert.encoder.layer
    parts[1] = Widened(parts[1])
    return export_module(module, case.inputs)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_a_part_in_another_dtype_is_caught_named_and_weighed(
    name: str, exported: Callable[..., Any], export_module: Callable[..., Any]
) -> None:
    case = widened(name, exported, export_module)
    found = build(case, precision="fp16").audit()
    assert found is not None and not found.honoured
    assert found.method.startswith("engine layers")
    assert found.exceptions and all("float32" in line and "%" in line for line in found.exceptions)
    p = parsed(case.model.path)
    network_says = audit.audit_network(flavour.find().module, p.network, shapes_of(case), Precision.FP16)
    assert network_says.method == "network layers" and not network_says.honoured
    assert 0.01 < found.shares["float32"] <= network_says.shares["float32"] + 1e-9, (
        "the builder may narrow products at the border, never more"
    )


def test_what_the_builder_narrows_on_its_own_is_seen_in_the_engine_alone(tmp_path: Path) -> None:
    """One fp32 product between casts: TensorRT-RTX folds the casts into it and reads halves, weights too. The network still says fp32."""
    weight = onnx.numpy_helper.from_array(np.full((64, 64), 1.0001234, dtype=np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "w"], ["product"], name="one_product"),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT16),
    ]
    model = hand_made(tmp_path / "m.onnx", nodes, {"x": (TensorProto.FLOAT16, [32, 64])}, {"y": (TensorProto.FLOAT16, [32, 64])}, [weight])
    inputs = Inputs(args=(torch.zeros(32, 64, dtype=torch.float16),))
    engine_says = trt.build(model, inputs, {"build_only": True, "precision": "fp32"}).audit()
    p = parsed(tmp_path / "m.onnx")
    network_says = audit.audit_network(flavour.find().module, p.network, {"x": (32, 64)}, Precision.FP32)
    assert network_says.honoured and network_says.shares == {"float32": 1.0}
    assert engine_says is not None and engine_says.method.startswith("engine layers")
    assert engine_says.shares == {"float16": 1.0} and not engine_says.honoured


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_the_networks_flops_are_those_of_the_module(name: str, exported: Callable[..., Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = exported(name, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        case.module.float()(*case.inputs.args, **case.inputs.kwargs)
    p = parsed(case.model.path)
    before = [tuple(p.network.get_input(i).shape) for i in range(p.network.num_inputs)]
    layers = audit.network_layers(flavour.find().module, p.network, shapes_of(case), is_tf32=False, layer_flops={})
    assert sum(layer.flops or 0.0 for layer in layers) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert [tuple(p.network.get_input(i).shape) for i in range(p.network.num_inputs)] == before
    assert before[0][0] == -1


def test_tf32_is_allowed_only_when_asked_for_and_reported_as_such(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float32)
    found = build(case, precision="tf32").audit()
    assert found is not None and found.honoured and found.shares == {"tf32": 1.0}
    plain = build(case, precision="fp32").audit()
    assert plain is not None and plain.honoured and plain.shares == {"float32": 1.0}


def test_without_a_request_nothing_is_dishonoured(exported: Callable[..., Any]) -> None:
    found = build(exported("resnet", torch.float16)).audit()
    assert found is not None and found.honoured and found.requested is None and found.shares == {"float16": 1.0}


def hand_made(path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: Any = (), opset: int = 20) -> Model:
    def infos(values: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(n, t, s) for n, (t, s) in values.items()]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return Model(form="onnx", name=path.stem, path=path)


def test_dequantised_operands_count_as_int8(tmp_path: Path) -> None:
    scale, zero = (helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]), helper.make_tensor("z", TensorProto.INT8, [], [0]))
    weight = helper.make_tensor("w", TensorProto.INT8, [64, 64], [1] * 4096)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
    ]
    model = hand_made(tmp_path / "q.onnx", nodes, {"x": (1, [32, 64])}, {"y": (1, [32, 64])}, [scale, zero, weight])
    p = parsed(model.path or tmp_path)
    (layer,) = audit.network_layers(flavour.find().module, p.network, {"x": (32, 64)}, is_tf32=False, layer_flops={})
    assert (layer.name, layer.dtype, layer.flops) == ("product", "int8", 2.0 * 32 * 64 * 64)


def test_transposed_and_einsum_products_are_counted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["a", "b"], ["g"], transA=1, name="gemm"),
        helper.make_node("Einsum", ["g", "c"], ["y"], equation="ij,jk->ik", name="einsum"),
    ]
    model = hand_made(tmp_path / "g.onnx", nodes, {"a": (1, [7, 3]), "b": (1, [7, 5]), "c": (1, [5, 2])}, {"y": (1, [3, 2])})
    p = parsed(model.path or tmp_path)
    layers = audit.network_layers(flavour.find().module, p.network, {"a": (7, 3), "b": (7, 5), "c": (5, 2)}, is_tf32=False, layer_flops={})
    assert sum(layer.flops or 0.0 for layer in layers) == 2.0 * (3 * 7 * 5 + 3 * 5 * 2)


def test_a_grouped_and_a_transposed_convolution_are_counted_as_torch_does(export_module: Callable[..., Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, groups=4, stride=2), torch.nn.ReLU(), torch.nn.ConvTranspose2d(16, 4, 4, stride=2, groups=2)
    )
    inputs = Inputs(
        args=(torch.randn(2, 8, 9, 9),), specs=(TensorSpec(name="input", dtype="float32", shape=("N", 8, 9, 9)),), dims={"N": 2}
    )
    case = export_module(module, inputs)
    with FlopCounterMode(display=False) as counter:
        module(*inputs.args)
    p = parsed(case.model.path)
    layers = audit.network_layers(flavour.find().module, p.network, shapes_of(case), is_tf32=False, layer_flops={})
    assert sum(layer.flops or 0.0 for layer in layers) == pytest.approx(counter.get_total_flops())


# -- shapes ---------------------------------------------------------------------------------------------------------------------------


def test_the_profile_holds_the_range_and_the_example(exported: Callable[..., Any]) -> None:
    engine = build(exported("bert", torch.float16), dynamic=DYNAMIC)
    assert engine._facts.profile["input_ids"] == ((1, 16), (3, 16), (16, 16))
    assert engine._facts.profile["attention_mask"] == ((1, 16), (3, 16), (16, 16))


def test_a_free_dimension_without_a_range_is_fixed(exported: Callable[..., Any]) -> None:
    assert build(exported("resnet", torch.float16))._facts.profile["pixels"] == ((3, 3, 32, 32),) * 3


def test_an_example_outside_its_range_is_a_usage_error(exported: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="N=3 is outside its range 4 to 8"):
        build(exported("resnet", torch.float16), dynamic={"N": (4, 8)})


def test_an_example_of_another_size_is_a_usage_error(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float16)
    x = case.inputs.args[0]
    with pytest.raises(UsageError, match="31 in dimension 2, the file has 32"):
        trt.build(case.model, Inputs(args=(x[:, :, :31],)), {"build_only": True})
    with pytest.raises(UsageError, match="wants 4 dimensions"):
        trt.build(case.model, Inputs(args=(x[0],)), {"build_only": True})


# -- refusals -------------------------------------------------------------------------------------------------------------------------


def test_an_operator_that_tensorrt_cannot_take_is_named_with_its_node(tmp_path: Path) -> None:
    nodes = [helper.make_node("Det", ["x"], ["d"], name="the_det"), helper.make_node("Relu", ["d"], ["y"])]
    model = hand_made(tmp_path / "d.onnx", nodes, {"x": (1, [2, 3, 3])}, {"y": (1, [2])})
    with pytest.raises(Unsupported, match=r"node the_det \(Det\)"):
        trt.build(model, Inputs(args=(torch.zeros(2, 3, 3),)), {"build_only": True})


def test_operands_that_do_not_fit_are_reported_with_their_node(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    model = hand_made(tmp_path / "m.onnx", nodes, {"x": (1, [2, 3]), "w": (1, [4, 5])}, {"y": (1, [2, 5])})
    with pytest.raises((Unsupported, BadInput), match="product|d.onnx|MatMul|m.onnx"):
        trt.build(model, Inputs(args=(torch.zeros(2, 3), torch.zeros(4, 5))), {"build_only": True})


def test_mixed_dtypes_are_refused_by_strong_typing_and_not_cast(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), helper.make_node("MatMul", ["h", "w"], ["y"], name="mixed")]
    model = hand_made(tmp_path / "m.onnx", nodes, {"x": (1, [2, 4]), "w": (1, [4, 5])}, {"y": (1, [2, 5])})
    with pytest.raises((Unsupported, BadInput), match="mixed|m.onnx"):
        trt.build(model, Inputs(args=(torch.zeros(2, 4), torch.zeros(4, 5))), {"build_only": True})


def test_a_file_that_the_gate_refuses_never_reaches_the_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "empty.onnx"
    path.write_bytes(b"")
    monkeypatch.setattr(trt, "parse", lambda *_: pytest.fail("parsed"))
    with pytest.raises(BadInput):
        trt.build(Model(form="onnx", name="empty", path=path), Inputs(args=(torch.zeros(1),)), {"build_only": True})


def test_without_build_only_and_without_a_gpu_it_is_unavailable(exported: Callable[..., Any]) -> None:
    case = exported("resnet", torch.float16)
    with pytest.raises(Unavailable, match="trt cannot run on cpu") as caught:
        trt.build(case.model, case.inputs, {})
    assert "--build-only" in caught.value.fix


def test_a_capability_the_flavour_does_not_know_is_refused_with_those_it_knows(
    exported: Callable[..., Any], found: flavour.Flavour
) -> None:
    if not found.is_rtx:
        pytest.skip("plain TensorRT builds for the GPU it sees")
    with pytest.raises(UsageError, match=r"does not build for compute capability 9\.0") as caught:
        build(exported("resnet", torch.float16), compute_capability="9.0")
    assert "8.9" in caught.value.fix and "12.0" in caught.value.fix


def test_an_engine_is_built_for_the_capability_asked_for(exported: Callable[..., Any], found: flavour.Flavour) -> None:
    if not found.is_rtx:
        pytest.skip("plain TensorRT builds for the GPU it sees")
    case = exported("resnet", torch.float16)
    plans = {c: build(case, compute_capability=c) for c in ("8.6", "8.9")}
    assert {c: e._facts.compute_capability for c, e in plans.items()} == {"8.6": "8.6", "8.9": "8.9"}
    assert build(case)._facts.compute_capability == trt.DEFAULT_TARGET
    assert build(case, compute_capability=8.9)._facts.compute_capability == "8.9", "options are read as JSON: 8.9 arrives as a number"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fast"}, "no preset 'fast'"),
        ({"fp16": True}, "no option 'fp16'"),
        ({"optimization_level": 9}, "optimization_level is 9"),
        ({"hardware_compatibility": "all"}, "hardware_compatibility is 'all'"),
        ({"flavour": "lite"}, "no flavour 'lite'"),
    ],
)
def test_options_are_checked_before_anything_is_built(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trt.build(Model(form="onnx", name="m", path=Path("absent.onnx")), Inputs(), {"build_only": True, **options})


def test_nothing_is_printed_while_building(exported: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    build(exported("resnet", torch.float16))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# -- bundle ---------------------------------------------------------------------------------------------------------------------------


def test_a_built_engine_says_why_it_cannot_be_called(exported: Callable[..., Any]) -> None:
    engine = build(exported("resnet", torch.float16))
    with pytest.raises(Unavailable, match="only built: the inputs are on the CPU"):
        engine(torch.zeros(1))
    engine.close()
    engine.close()


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bundle")
    engine = build(exported("resnet", torch.float16), precision="fp16", compute_capability="8.9", dynamic=DYNAMIC)
    return folder, dict(engine.save(folder))


def test_a_saved_engine_is_files_with_their_facts(bundle: tuple[Path, dict[str, str]], found: flavour.Flavour) -> None:
    folder, files = bundle
    assert set(files.values()) == {p.name for p in folder.iterdir()} == {"model.onnx", "engine.plan", "engine.json"}
    facts = runner.read_facts(folder / files["facts"])
    assert (facts.flavour, facts.version, facts.compute_capability, facts.precision) == (found.name, found.version, "8.9", "fp16")
    assert facts.profile["pixels"][2] == (16, 3, 32, 32)


def with_facts(bundle: tuple[Path, dict[str, str]], target: Path, **changes: Any) -> tuple[Path, dict[str, str]]:
    folder, files = bundle
    for name in files.values():
        (target / name).write_bytes((folder / name).read_bytes())
    facts = json.loads((target / "engine.json").read_text())
    (target / "engine.json").write_text(json.dumps({**facts, **changes}))
    return target, files


def test_an_engine_of_another_version_is_refused_naming_both_before_it_is_opened(
    bundle: tuple[Path, dict[str, str]], tmp_path: Path, found: flavour.Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.gate, "deserialize_engine", lambda *_, **__: pytest.fail("deserialised"))
    folder, files = with_facts(bundle, tmp_path, version="9.9.9")
    with pytest.raises(Unavailable, match=f"9\\.9\\.9.*{found.version}"):
        trt.load(folder, files, {}, "cuda")


def test_an_engine_for_another_gpu_is_refused_naming_both(bundle: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "_capability", lambda device: "12.0")
    folder, files = bundle
    with pytest.raises(Unavailable, match=r"compute capability 8\.9, this GPU has 12\.0"):
        trt.load(folder, files, {}, "cuda")


def test_an_engine_without_a_gpu_says_so(bundle: tuple[Path, dict[str, str]]) -> None:
    folder, files = bundle
    with pytest.raises(Unavailable, match="no NVIDIA GPU or driver"):
        trt.load(folder, files, {}, "cuda")


def test_an_engine_on_a_cpu_device_says_so(bundle: tuple[Path, dict[str, str]]) -> None:
    folder, files = bundle
    with pytest.raises(Unavailable, match="no NVIDIA GPU or driver"):
        trt.load(folder, files, {}, "cpu")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"profile": {"x": [[1]]}}', '{"profile": {}, "flavour": "tensorrt_rtx", "more": 1}'])
def test_spoiled_facts_are_bad_input(text: str, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(BadInput, match="cannot be read|without three shapes"):
        trt.load(tmp_path, {"facts": "engine.json", "engine": "engine.plan", "onnx": "model.onnx"}, {}, "cuda")


def test_the_runtime_refuses_an_engine_without_a_driver_and_we_say_so(bundle: tuple[Path, dict[str, str]], found: flavour.Flavour) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    folder, files = bundle
    log = network.Log(found.module)
    with pytest.raises(Unavailable):
        runner.gate.deserialize_engine(found.module.Runtime(log.logger), (folder / files["engine"]).read_bytes())
    assert "CUDA driver" in log.last_error


# -- what can run -----------------------------------------------------------------------------------------------------------------------


def test_the_rtx_flavour_says_that_it_does_not_run_on_an_h200(monkeypatch: pytest.MonkeyPatch, found: flavour.Flavour) -> None:
    monkeypatch.setattr(trt, "_capability", lambda device: "9.0")
    reason = trt.available("cuda")
    if found.is_rtx:
        assert reason is not None and "does not run on compute capability 9.0" in reason and "gpuopt[trt]" in reason
    else:
        assert reason is None


def test_a_cpu_is_told_about_build_only() -> None:
    assert "--build-only" in (trt.available("cpu") or "")
    if not torch.cuda.is_available():
        assert "--build-only" in (trt.available("cuda") or "")


def test_what_can_never_be_has_a_reason() -> None:
    assert "not module" in (trt.supports("module", None, "cuda") or "")
    assert "double" in (trt.supports("onnx", Precision.FP64, "cuda") or "")
    assert "dequantize" in (trt.supports("onnx", Precision.INT8, "cuda") or "")
    for precision in (None, Precision.FP32, Precision.TF32, Precision.BF16, Precision.FP16):
        assert trt.supports("onnx", precision, "cpu") is None
