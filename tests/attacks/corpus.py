"""Hostile and broken files, one function each: (folder, canary) -> the path to load. A payload makes the canary folder; nothing worse.

Run as a program (`python corpus.py CASE FOLDER CANARY`) it writes the case and loads it, for tests that need an interpreter with other flags.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Case = Callable[[Path, Path], Path]
CASES: dict[str, tuple[int, str, Case]] = {}
"""Name -> (row of the catalogue, error class, maker)."""
ARCH = "torch.nn:Identity"


def case(row: int, error: str = "BadInput") -> Callable[[Case], Case]:
    def add(make: Case) -> Case:
        CASES[make.__name__] = (row, error, make)
        return make

    return add


class Payload:
    """Unpickling calls os.mkdir(canary)."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def tiny() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def rezip(
    source: Path, target: Path, change: Callable[[str, bytes], list[tuple[str, bytes]]], compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a torch archive again, each member through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            for name, data in change(info.filename, old.read(info)):
                new.writestr(name, data)
    return target


def checkpoint(path: Path, stream: bytes) -> Path:
    """A torch archive whose data.pkl is this very stream."""
    base = saved(path.with_suffix(".base"), tiny())
    rezip(base, path, lambda n, d: [(n, stream if n.endswith("/data.pkl") else d)])
    base.unlink()
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


# --- rows 1 to 13: torch checkpoints


@case(1)
def cut_in_half(folder: Path, canary: Path) -> Path:
    path = saved(folder / "m.pt", tiny())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@case(1)
def cut_before_its_last_byte(folder: Path, canary: Path) -> Path:
    path = saved(folder / "m.pt", tiny())
    path.write_bytes(path.read_bytes()[:-1])
    return path


@case(2)
def empty(folder: Path, canary: Path) -> Path:
    (folder / "m.pt").touch()
    return folder / "m.pt"


@case(3)
def random_bytes(folder: Path, canary: Path) -> Path:
    (folder / "m.pt").write_bytes(np.random.default_rng(0).bytes(5000))
    return folder / "m.pt"


@case(3)
def html_page(folder: Path, canary: Path) -> Path:
    (folder / "m.pt").write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder / "m.pt"


@case(3)
def lfs_pointer(folder: Path, canary: Path) -> Path:
    (folder / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    return folder / "m.safetensors"


@case(5, "Untrusted")
def module_of_an_unknown_package(folder: Path, canary: Path) -> Path:
    return checkpoint(folder / "m.pt", b"\x80\x02cmy_models.net\nNet\n)\x81}b.")


@case(5, "Untrusted")
def partial_beside_a_module(folder: Path, canary: Path) -> Path:
    module = nn.Linear(2, 2)
    module.activation = __import__("functools").partial(torch.nn.functional.gelu, approximate="tanh")
    return saved(folder / "m.pt", module)


@case(6, "Untrusted")
def reduce_payload(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", {"weight": torch.ones(2), "x": Payload(canary)})


@case(6, "Untrusted")
def reduce_payload_in_the_old_format(folder: Path, canary: Path) -> Path:
    torch.save({"x": Payload(canary)}, folder / "m.pt", _use_new_zipfile_serialization=False)
    return folder / "m.pt"


@case(6, "Untrusted")
def bare_pickle(folder: Path, canary: Path) -> Path:
    (folder / "m.pkl").write_bytes(pickle.dumps(Payload(canary), protocol=4))
    return folder / "m.pkl"


@case(6, "Untrusted")
def bare_pickle_of_protocol_0(folder: Path, canary: Path) -> Path:
    (folder / "m.pt").write_bytes(b"cposix\nmkdir\n(V" + str(canary).encode() + b"\ntR.")
    return folder / "m.pt"


@case(6, "Untrusted")
def getattr_of_an_admitted_class(folder: Path, canary: Path) -> Path:
    stream = b"\x80\x02c__builtin__\ngetattr\nctorch.nn.modules.linear\nLinear\n" + text("__init__") + b"\x86R."
    return checkpoint(folder / "m.pt", stream)


@case(6, "Untrusted")
def constructor_called_with_the_files_arguments(folder: Path, canary: Path) -> Path:
    return checkpoint(folder / "m.pt", b"\x80\x02ctorch.nn.modules.linear\nLinear\nK\x02K\x03\x86R.")


@case(6, "Untrusted")
def constructor_called_through_rebuild_from_type(folder: Path, canary: Path) -> Path:
    # torch's own unpickler admits this function, which calls its first argument with its third.
    stream = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch.nn.modules.linear\nLinear\nctorch\nTensor\nK\x02K\x03\x86}tR."
    return checkpoint(folder / "m.pt", stream)


@case(6, "Untrusted")
def class_kept_as_a_hook(folder: Path, canary: Path) -> Path:
    linear = b"ctorch.nn.modules.linear\nLinear\n"
    return checkpoint(folder / "m.pt", b"\x80\x02" + linear + b")\x81}" + text("forward") + linear + b"sb.")


@case(6, "Untrusted")
def state_that_is_no_dictionary(folder: Path, canary: Path) -> Path:
    stream = b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81N}" + text("a") + b"K\x01s\x86b."
    return checkpoint(folder / "m.pt", stream)


@case(6, "Untrusted")
def script_module_class(folder: Path, canary: Path) -> Path:
    return checkpoint(folder / "m.pt", b"\x80\x02ctorch.jit._script\nRecursiveScriptModule\n)\x81}b.")


@case(6, "Untrusted")
def graph_module_code(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))


@case(6, "Untrusted")
def function_of_an_admitted_library(folder: Path, canary: Path) -> Path:
    return checkpoint(folder / "m.pt", b"\x80\x02ctransformers.pytorch_utils\nprune_linear_layer\n.")


@case(6, "Untrusted")
def name_with_a_dot_in_it(folder: Path, canary: Path) -> Path:
    return checkpoint(folder / "m.pt", b"\x80\x02ctorch.nn.modules\nlinear.Linear\n)\x81}b.")


@case(6, "Untrusted")
def attention_kernel_from_the_hub(folder: Path, canary: Path) -> Path:
    import transformers

    config = transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = transformers.BertModel(config)
    model.config._attn_implementation_internal = "someone/kernel"
    return saved(folder / "m.pt", model)


@case(6, "Untrusted")
def layer_kernels_from_the_hub(folder: Path, canary: Path) -> Path:
    import transformers

    config = transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = transformers.BertModel(config)
    model.__dict__["_use_kernels"] = True
    return saved(folder / "m.pt", model)


@case(8, "Untrusted")
def torchscript_named_pt(folder: Path, canary: Path) -> Path:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(folder / "m.pt"))
    return folder / "m.pt"


@case(9)
def deflated_bomb(folder: Path, canary: Path) -> Path:
    base = saved(folder / "b.base", {"w": torch.zeros(2**20)})
    return rezip(base, folder / "m.pt", lambda n, d: [(n, d)], zipfile.ZIP_DEFLATED)


@case(10)
def expanded_to_a_terabyte(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", {"w": torch.zeros(1).expand(10**6, 10**6)})


@case(10)
def many_expanded_tensors(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", {f"w{i}": torch.zeros(1).expand(2**20) for i in range(40)})


@case(10)
def expanded_inside_an_admitted_module(folder: Path, canary: Path) -> Path:
    module = nn.Linear(2, 2)
    module.register_buffer("b", torch.zeros(1).expand(10**6, 10**6))
    return saved(folder / "m.pt", module)


@case(11)
def sparse_that_lies(folder: Path, canary: Path) -> Path:
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        bad = torch.sparse_csr_tensor(
            torch.tensor([0, 1, 1000000]), torch.tensor([0, 900000]), torch.ones(2), (2, 4), check_invariants=False
        )
    return saved(folder / "m.pt", {"w": bad})


@case(12)
def member_that_leaves_its_folder(folder: Path, canary: Path) -> Path:
    base = saved(folder / "b.base", tiny())
    return rezip(base, folder / "m.pt", lambda n, d: [(n, d)] + ([("b/../../evil", b"x")] if n.endswith("data.pkl") else []))


@case(12)
def two_members_of_one_name(folder: Path, canary: Path) -> Path:
    base = saved(folder / "b.base", tiny())
    evil = pickle.dumps(Payload(canary), protocol=2)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rezip(base, folder / "m.pt", lambda n, d: [(n, d), (n, evil)] if n.endswith("data.pkl") else [(n, d)])


@case(12)
def data_pkl_in_two_folders(folder: Path, canary: Path) -> Path:
    base = saved(folder / "b.base", tiny())
    evil = pickle.dumps(Payload(canary), protocol=2)
    return rezip(base, folder / "m.pt", lambda n, d: [(n, d), ("other/data.pkl", evil)] if n.endswith("data.pkl") else [(n, d)])


@case(12)
def second_zip_behind_the_first(folder: Path, canary: Path) -> Path:
    """Two directories in one file: a parser that takes the last one and one that takes the first read different pickles."""
    first, second = saved(folder / "a.base", {"x": Payload(canary)}), saved(folder / "b.base", tiny())
    (folder / "m.pt").write_bytes(first.read_bytes() + second.read_bytes())
    return folder / "m.pt"


@case(12)
def zip_with_a_comment(folder: Path, canary: Path) -> Path:
    path = saved(folder / "m.pt", tiny())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\x05\x06" + bytes(18)
    return path


@case(12)
def tar_that_starts_like_a_pickle(folder: Path, canary: Path) -> Path:
    import tarfile

    path = folder / "m.pt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("x")
        archive.addfile(member)
    torch.save(tiny(), folder / "old.base", _use_new_zipfile_serialization=False)
    head = (folder / "old.base").read_bytes()[:90]
    block = bytearray(path.read_bytes())
    block[: len(head)] = head
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    path.write_bytes(bytes(block))
    return path


@case(13, "Untrusted")
def namespace_beside_tensors(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", {"w": torch.ones(2), "args": argparse.Namespace(lr=1)})


@case(13, "Untrusted")
def numpy_scalar(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", {"w": torch.ones(2), "loss": np.float64(1)})


# --- rows 14 to 21: names and safetensors


@case(14)
def pickle_named_safetensors(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", {"x": Payload(canary)}).rename(folder / "m.safetensors")


@case(14)
def zip_named_onnx(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", tiny()).rename(folder / "m.onnx")


@case(14)
def safetensors_named_pt(folder: Path, canary: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tiny(), folder / "m.pt")
    return folder / "m.pt"


def safetensors(folder: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return folder / "m.safetensors"


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@case(15)
def safetensors_truncated(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"w": entry([4], 0, 16)}, bytes(15))


@case(15)
def safetensors_padded(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"w": entry([4], 0, 16)}, bytes(17))


@case(16)
def safetensors_with_a_terabyte_header(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"w": entry([4], 0, 16)}, length=2**40)


@case(16)
def safetensors_with_a_200_mb_header(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"w": entry([4], 0, 16)}, length=200_000_000)


@case(17)
def safetensors_overlap(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"a": entry([4], 0, 16), "b": entry([2], 8, 16)})


@case(17)
def safetensors_gap(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"a": entry([1], 0, 4), "b": entry([1], 12, 16)})


@case(17)
def safetensors_duplicate_key(folder: Path, canary: Path) -> Path:
    one = json.dumps(entry([4], 0, 16))
    return safetensors(folder, f'{{"w": {one}, "w": {one}}}'.encode())


@case(17)
def safetensors_shape_that_overflows(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"w": entry([2**32, 2**32], 0, 16)})


@case(17)
def safetensors_unknown_dtype(folder: Path, canary: Path) -> Path:
    return safetensors(folder, {"w": entry([4], 0, 16, "F31")})


@case(17)
def safetensors_deeply_nested_header(folder: Path, canary: Path) -> Path:
    return safetensors(folder, b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}")


@case(18, "GateFailed")
def safetensors_with_nan(folder: Path, canary: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"w": torch.tensor([1.0, float("nan")])}, folder / "m.safetensors")
    return folder / "m.safetensors"


def shards(folder: Path, shard: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    return folder


@case(19)
def shard_that_is_missing(folder: Path, canary: Path) -> Path:
    return shards(folder, "model-00001.safetensors")


@case(19)
def shard_outside_the_folder(folder: Path, canary: Path) -> Path:
    return shards(folder, "../x.safetensors")


@case(19)
def shard_at_an_absolute_path(folder: Path, canary: Path) -> Path:
    return shards(folder, "/etc/passwd")


@case(20)
def unexpected_keys(folder: Path, canary: Path) -> Path:
    return saved(folder / "m.pt", tiny())


# --- transformers folders


@case(19)
def transformers_folder_with_an_outside_shard(folder: Path, canary: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return shards(folder, "../x.safetensors")


@case(40, "Untrusted")
def transformers_folder_with_code(folder: Path, canary: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    return folder


@case(40, "Untrusted")
def transformers_folder_with_a_hub_kernel(folder: Path, canary: Path) -> Path:
    config = {"model_type": "bert", "architectures": ["BertModel"], "attn_implementation": "someone/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@case(40, "Untrusted")
def transformers_folder_with_a_pickled_bin(folder: Path, canary: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    saved(folder / "m.pt", {"x": Payload(canary)}).rename(folder / "pytorch_model.bin")
    return folder


# --- rows 22 to 27: .pt2


def exported(folder: Path, change: Callable[[str, bytes], bytes]) -> Path:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),), dynamic_shapes={"input": {0: torch.export.Dim("b")}})
    torch.export.save(program, folder / "base.pt2")
    rezip(folder / "base.pt2", folder / "m.pt2", lambda n, d: [(n, change(n, d))])
    return folder / "m.pt2"


@case(22, "Untrusted")
def pt2_with_pickled_weights(folder: Path, canary: Path) -> Path:
    def change(name: str, data: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true').replace(b'"use_pickle":false', b'"use_pickle":true')
        return pickle.dumps(Payload(canary)) if name.endswith("weights/weight_0") else data

    return exported(folder, change)


@case(23, "Untrusted")
def pt2_with_pickled_sample_inputs(folder: Path, canary: Path) -> Path:
    evil = saved(folder / "evil.base", Payload(canary)).read_bytes()
    return exported(folder, lambda n, d: evil if "sample_inputs" in n else d)


@case(24, "Untrusted")
def pt2_with_an_expression(folder: Path, canary: Path) -> Path:
    code = f"__import__('os').mkdir('{canary}')"

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        program = json.loads(data)
        queue: list[Any] = [program]
        while queue:
            item = queue.pop()
            if isinstance(item, dict):
                if "expr_str" in item:
                    item["expr_str"] = code
                queue.extend(item.values())
            elif isinstance(item, list):
                queue.extend(item)
        return json.dumps(program).encode()

    return exported(folder, change)


@case(25)
def pt2_truncated(folder: Path, canary: Path) -> Path:
    path = exported(folder, lambda n, d: d)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@case(26, "Unavailable")
def pt2_of_a_newer_schema(folder: Path, canary: Path) -> Path:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        program = json.loads(data)
        program["schema_version"] = {"major": 99, "minor": 1}
        return json.dumps(program).encode()

    return exported(folder, change)


@case(26, "Unavailable")
def pt2_of_a_newer_archive_version(folder: Path, canary: Path) -> Path:
    return exported(folder, lambda n, d: b"7" if n.endswith("archive_version") else d)


# --- rows 31 to 38: ONNX


def onnx_model(folder: Path, **external: str) -> Path:
    import onnx
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    if external:
        weight.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=value)
    else:
        weight.raw_data = bytes(16)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    onnx.ModelProto().ParseFromString((folder / "m.onnx").read_bytes())
    return folder / "m.onnx"


def changed_onnx(folder: Path, change: Callable[[Any], None]) -> Path:
    import onnx

    path = onnx_model(folder)
    model = onnx.ModelProto()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def secret(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}-secret.bin"
    path.write_bytes(bytes(64))
    return path


@case(31)
def onnx_data_above_its_folder(folder: Path, canary: Path) -> Path:
    return onnx_model(folder, location=f"../{secret(folder).name}")


@case(31)
def onnx_data_at_an_absolute_path(folder: Path, canary: Path) -> Path:
    return onnx_model(folder, location=str(secret(folder)))


@case(31)
def onnx_data_behind_a_symlink(folder: Path, canary: Path) -> Path:
    (folder / "w.bin").symlink_to(secret(folder))
    return onnx_model(folder, location="w.bin")


@case(31)
def onnx_data_below_a_symlinked_folder(folder: Path, canary: Path) -> Path:
    (folder / "inner").symlink_to(secret(folder).parent)
    return onnx_model(folder, location=f"inner/{secret(folder).name}")


@case(32)
def onnx_data_that_is_a_hard_link(folder: Path, canary: Path) -> Path:
    os.link(secret(folder), folder / "w.bin")
    return onnx_model(folder, location="w.bin")


@case(33)
def onnx_data_in_proc(folder: Path, canary: Path) -> Path:
    return onnx_model(folder, location="/proc/self/environ")


@case(33)
def onnx_data_in_a_pipe(folder: Path, canary: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return onnx_model(folder, location="w.bin")


@case(33)
def onnx_data_in_dev_zero(folder: Path, canary: Path) -> Path:
    return onnx_model(folder, location="/dev/zero")


@case(33)
def onnx_data_behind_a_link_to_dev_zero(folder: Path, canary: Path) -> Path:
    (folder / "w.bin").symlink_to("/dev/zero")
    return onnx_model(folder, location="w.bin")


@case(33)
def onnx_data_in_a_pipe_with_a_length(folder: Path, canary: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return onnx_model(folder, location="w.bin", offset="0", length="16")


@case(33)
def onnx_that_is_itself_a_pipe(folder: Path, canary: Path) -> Path:
    os.mkfifo(folder / "m.onnx")
    return folder / "m.onnx"


@case(33)
def onnx_that_is_itself_dev_zero(folder: Path, canary: Path) -> Path:
    (folder / "m.onnx").symlink_to("/dev/zero")
    return folder / "m.onnx"


@case(33)
def onnx_data_that_is_missing(folder: Path, canary: Path) -> Path:
    return onnx_model(folder, location="w.bin")


@case(34)
def onnx_data_at_a_negative_offset(folder: Path, canary: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(64))
    return onnx_model(folder, location="w.bin", offset="-8", length="16")


@case(34)
def onnx_data_of_a_petabyte(folder: Path, canary: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(64))
    return onnx_model(folder, location="w.bin", offset="0", length=str(10**15))


@case(34)
def onnx_data_past_its_end(folder: Path, canary: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(64))
    return onnx_model(folder, location="w.bin", offset="60", length="16")


@case(35)
def onnx_tensor_of_2_to_the_40(folder: Path, canary: Path) -> Path:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[:] = [2**20, 2**20]

    return changed_onnx(folder, change)


@case(35)
def onnx_tensor_of_negative_shape(folder: Path, canary: Path) -> Path:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[:] = [-4]

    return changed_onnx(folder, change)


@case(36)
def onnx_empty(folder: Path, canary: Path) -> Path:
    (folder / "m.onnx").touch()
    return folder / "m.onnx"


@case(37)
def onnx_truncated(folder: Path, canary: Path) -> Path:
    path = onnx_model(folder)
    path.write_bytes(path.read_bytes()[:-5])
    return path


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file of this size of which only the head is written: the rest is a hole that takes no disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@case(37)
def onnx_larger_than_a_protobuf_may_be(folder: Path, canary: Path) -> Path:
    length = 3 * 2**30
    head = b"\x08\x08" + b"\x3a" + varint(length)  # ir_version 8, then a graph of 3 GiB: whole, as far as its lengths say
    return sparse(folder / "m.onnx", head, len(head) + length)


@case(37)
def onnx_of_nothing_but_zeros(folder: Path, canary: Path) -> Path:
    return sparse(folder / "m.onnx", b"", 3 * 2**30)


@case(37)
def onnx_junk(folder: Path, canary: Path) -> Path:
    (folder / "m.onnx").write_bytes(np.random.default_rng(1).bytes(3000))
    return folder / "m.onnx"


@case(37)
def onnx_junk_inside_its_graph(folder: Path, canary: Path) -> Path:
    path = onnx_model(folder)
    raw = path.read_bytes()
    at = raw.index(b"Add")
    path.write_bytes(raw[: at - 1] + b"\xff" * 6 + raw[at + 5 :])
    return path


@case(38)
def onnx_unknown_operator(folder: Path, canary: Path) -> Path:
    def change(model: Any) -> None:
        model.graph.node[0].op_type = "Frobnicate"

    return changed_onnx(folder, change)


@case(38)
def onnx_operator_set_999(folder: Path, canary: Path) -> Path:
    def change(model: Any) -> None:
        model.opset_import[0].version = 999

    return changed_onnx(folder, change)


@case(38)
def onnx_custom_domain(folder: Path, canary: Path) -> Path:
    def change(model: Any) -> None:
        model.graph.node[0].domain = "evil.ops"
        model.opset_import.add(domain="evil.ops", version=1)

    return changed_onnx(folder, change)


@case(40, "Untrusted")
def onnx_with_native_code(folder: Path, canary: Path) -> Path:
    def change(model: Any) -> None:
        model.graph.node[0].op_type = "EPContext"
        model.graph.node[0].domain = "com.microsoft"
        model.opset_import.add(domain="com.microsoft", version=1)

    return changed_onnx(folder, change)


# --- names


@case(43)
def tensorrt_plan(folder: Path, canary: Path) -> Path:
    (folder / "m.plan").write_bytes(b"ftrt" + bytes(1000))
    return folder / "m.plan"


@case(3)
def folder_without_a_model(folder: Path, canary: Path) -> Path:
    (folder / "inner").mkdir()
    return folder / "inner"


def attempt(path: Path) -> str:
    """Load as a user would; the name of the error class, or `loaded`."""
    from gpuopt import loaders
    from gpuopt.core.errors import GpuoptError
    from gpuopt.core.spec import ModelRef

    try:
        loaders.load(ModelRef(text=str(path), arch=ARCH))
    except GpuoptError as error:
        lines = (error.message + error.fix).splitlines()
        return (
            type(error).__name__
            if len(lines) == 1 and error.fix and "weights_only" not in error.message
            else f"bad message: {error.message!r}"
        )
    return "loaded"


def main() -> None:
    folder, canary = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, (_, wanted, make) in CASES.items():
        place = folder / name
        place.mkdir()
        found[name] = [wanted, attempt(make(place, canary / name))]
    print(json.dumps({"found": found, "canaries": [p.name for p in canary.iterdir()], "optimized": not __debug__}))


if __name__ == "__main__":
    main()

__all__ = ["ARCH", "CASES", "Payload", "attempt", "main"]
