"""What loads, loads whole; what does not fit this machine says so before it is opened."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.core.errors import BadInput, Unavailable, Untrusted
from gpuopt.trust import consent, gate, pickles

transformers = pytest.importorskip("transformers")
TEXT = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}


def models() -> dict[str, Any]:
    t = transformers
    return {
        "resnet": lambda: t.ResNetForImageClassification(t.ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8)),
        "bert": lambda: t.BertModel(t.BertConfig(**TEXT)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, num_key_value_heads=2)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=60)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=32, patch_size=16)),
        "transformer": lambda: nn.TransformerEncoderLayer(16, 2, 16, batch_first=True),
        "lstm": lambda: nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 4)),
        "parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    }


@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "t5", "vit", "transformer", "lstm", "parallel"])
def test_a_pickled_module_of_known_libraries_loads_with_equal_state_without_consent(name: str, tmp_path: Path) -> None:
    module = models()[name]().eval()
    torch.save(module, tmp_path / "m.pt")
    loaded = gate.load_pickled_module(tmp_path / "m.pt")
    assert type(loaded) is type(module)
    mine, theirs = module.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.filterwarnings("ignore")
def test_the_old_format_loads_tensors_and_asks_consent_for_modules(tmp_path: Path) -> None:
    """torch's restricted unpickler has no way to make the classes of that format."""
    torch.save({"w": torch.ones(2)}, tmp_path / "t.pt", _use_new_zipfile_serialization=False)
    assert gate.load_tensors(tmp_path / "t.pt")["w"].tolist() == [1, 1]
    torch.save(nn.Linear(2, 3), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Untrusted, match=r"torch\.nn\.modules\.linear\.Linear"):
        gate.load_pickled_module(tmp_path / "m.pt")
    assert gate.load_pickled_module(tmp_path / "m.pt", (str(tmp_path / "m.pt"),)).weight.shape == (3, 2)


class Local(nn.Module):
    pass


def test_a_refusal_names_the_global_and_the_hash_and_consent_then_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = types.ModuleType("somebodys_net")
    Local.__module__ = "somebodys_net"
    home.Local = Local  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_net", home)
    path = tmp_path / "m.pt"
    torch.save(Local(), path)
    with pytest.raises(Untrusted) as caught:
        gate.load_pickled_module(path)
    assert "somebodys_net.Local" in caught.value.message
    assert consent.sha256_of(path) in caught.value.fix
    assert isinstance(gate.load_pickled_module(path, (str(path),)), Local)
    assert isinstance(gate.load_pickled_module(path, (consent.sha256_of(path),)), Local)
    consent.record(path)
    assert isinstance(gate.load_pickled_module(path), Local)


def test_trusting_one_file_does_not_trust_another(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / f"{name}.pt"))
    consent.record(tmp_path / "a.pt")
    gate.load_torchscript(tmp_path / "a.pt")
    with pytest.raises(Untrusted):
        gate.load_torchscript(tmp_path / "b.pt")


def test_our_signature_stands_for_consent_of_an_exported_program(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)), tmp_path / "m.pt2")
    with pytest.raises(Untrusted):
        gate.load_exported(tmp_path / "m.pt2")
    assert gate.load_exported(tmp_path / "m.pt2", signed_by_us=True).module()(torch.ones(3, 2)).shape == (3, 2)


def test_small_expanded_buffers_of_honest_models_load(tmp_path: Path) -> None:
    torch.save({"ids": torch.arange(4).expand(8, 4)}, tmp_path / "m.pt")
    assert gate.load_tensors(tmp_path / "m.pt")["ids"].shape == (8, 4)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_is_installed", lambda name: False)
    pickles.admit.cache_clear()
    assert "not installed" in pickles.admit(f"{library}.models.resnet.ResNet").reason
    pickles.admit.cache_clear()


def test_a_folder_that_pretends_to_be_a_library_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    (tmp_path / "timm" / "models" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    pickles._is_installed.cache_clear()
    pickles.admit.cache_clear()
    assert pickles.admit("timm.models.X").thing is None
    assert not (tmp_path / "canary").exists()
    pickles._is_installed.cache_clear()
    pickles.admit.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "functools.partial",
        "torch.load",
        "torch.hub.load",
        "torch.nn.Module",
        "torch.nn.modules.module.torch",
        "torch.nn.modules.module._WrappedHook",
        "torch.nn.functional.boolean_dispatch",
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.jit._script.RecursiveScriptModule",
        "torch.fx.graph_module.GraphModule",
        "transformers.modeling_utils.partial",
        "transformers.configuration_utils.os",
        "transformers.pipelines.pipeline",
        "transformers.dynamic_module_utils.get_class_from_dynamic_module",
        "transformers.models.auto.auto_factory._BaseAutoModelClass",
        "timm.models.create_model",
        "__main__.Net",
    ],
)
def test_what_is_no_plain_part_of_a_model_is_not_admitted(name: str) -> None:
    assert pickles.admit(name).thing is None


def test_garbage_streams_become_problems() -> None:
    for stream in (
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02R.",
        b"\x80\x02}b.",
        b"\x80\x02\x85.",
        b"\x80\x02h\x07.",
        b"\x80\x02(.",
    ):
        pickles.judge(pickles.scan(stream))
    assert pickles.scan(b"\x80\x02R.").problems


# --- AOTInductor packages, without building one


def package(tmp_path: Path, **fields: str) -> Path:
    path = tmp_path / "m.pt2"
    metadata = {
        "AOTI_DEVICE_KEY": "cpu",
        "AOTI_PLATFORM": sys.platform,
        "AOTI_MACHINE": __import__("platform").machine(),
        "AOTI_CPU_ISA": "",
        "AOTI_COMPUTE_CAPABILITY": "",
        **fields,
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/aotinductor/model/x.wrapper.so", b"\x7fELF")
        archive.writestr("m/data/aotinductor/model/x.wrapper_metadata.json", json.dumps(metadata))
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/archive_version", "0")
    return path


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"AOTI_MACHINE": "riscv64"}, "riscv64"),
        ({"AOTI_PLATFORM": "win32"}, "win32"),
        ({"AOTI_DEVICE_KEY": "xpu"}, "xpu"),
        pytest.param({"AOTI_DEVICE_KEY": "cuda"}, "GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_a_package_for_another_machine_is_unavailable_before_consent_is_asked(fields: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=says):
        gate.load_aoti(package(tmp_path, **fields))


def test_a_package_for_instructions_this_cpu_lacks_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_cpu_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(Unavailable, match="AVX512"):
        gate.load_aoti(package(tmp_path, AOTI_CPU_ISA="AVX512 AVX512_VNNI"))
    with pytest.raises(Untrusted):
        gate.load_aoti(package(tmp_path, AOTI_CPU_ISA="AVX2"))


def test_a_package_for_another_gpu_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(Unavailable, match="capability 80, this is 90"):
        gate.load_aoti(package(tmp_path, AOTI_DEVICE_KEY="cuda", AOTI_COMPUTE_CAPABILITY="80"))
    with pytest.raises(Untrusted):
        gate.load_aoti(package(tmp_path, AOTI_DEVICE_KEY="cuda", AOTI_COMPUTE_CAPABILITY="90"))


# --- ONNX


def add_model(tmp_path: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(__import__("numpy").arange(4, dtype="float32"), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", float32, ["batch", 4])],
        [helper.make_tensor_value_info("y", float32, ["batch", 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return tmp_path / "m.onnx"


def test_an_honest_onnx_file_with_external_data_runs_and_copies_whole(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("onnxruntime")
    (tmp_path / "copy").mkdir()
    files = gate.copy_onnx(add_model(tmp_path), tmp_path / "copy" / "model.onnx")
    assert files == {"onnx": "model.onnx", "onnx_data": "w.bin"}
    session = gate.onnx_session(tmp_path / "copy" / "model.onnx", ["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": np.zeros((2, 4), "float32")})
    assert out.tolist() == [[0, 1, 2, 3]] * 2


def test_a_provider_that_is_not_there_is_unavailable_and_never_a_cpu_session(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this build has CUDA")
    with pytest.raises(Unavailable, match="CUDAExecutionProvider is not in this build"):
        gate.onnx_session(add_model(tmp_path), [("CUDAExecutionProvider", {}), "CPUExecutionProvider"])


def test_a_session_that_fell_back_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")

    class Fallen:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    for allow in (False, True):
        with pytest.raises(Unavailable, match="fell back to CPU"):
            gate.onnx_session(add_model(tmp_path), ["CUDAExecutionProvider"], allow_fallback=allow)


def test_a_plan_the_library_refuses_is_unavailable() -> None:
    class Runtime:
        def deserialize_cuda_engine(self, data: bytes) -> Any:
            return None if data == b"old" else "engine"

    assert gate.deserialize_engine(Runtime(), b"new") == "engine"
    with pytest.raises(Unavailable, match=r"built with 10\.0"):
        gate.deserialize_engine(Runtime(), b"old", built_with="10.0")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA")
def test_the_memory_limit_holds_inside_the_block_and_is_gone_after_it() -> None:
    with gate.limit_memory(64 * 2**20):
        with pytest.raises(RuntimeError, match="allocate"):
            torch.empty(2**30, dtype=torch.uint8)
    torch.empty(2**27, dtype=torch.uint8)


def test_load_tensors_takes_nothing_but_tensors(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(Untrusted, match="more than tensors"):
        gate.load_tensors(tmp_path / "m.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "t.pt")
    with pytest.raises(BadInput, match="not a module"):
        gate.load_pickled_module(tmp_path / "t.pt")
