"""Safetensors files: what is refused before a byte is read, and that the bytes which are read are the file's."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.streaming import headers, reading, shards

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def written(path: Path, header: Any, data: bytes = bytes(24), *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def fetched(opened: shards.Shards, name: str) -> torch.Tensor:
    entry = opened.entries[name]
    memory = torch.empty(entry.num_bytes, dtype=torch.uint8)
    opened.read_into(name, memory)
    return memory.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def several(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "odd": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator),  # what follows is misaligned
        "weight": torch.randn(33, 65, generator=generator),
        "half": torch.randn(129, generator=generator).bfloat16(),
        "f8": torch.randn(5, 5, generator=generator).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator),
    }


@pytest.mark.parametrize("direct", [False, True])
def test_every_tensor_is_read_as_it_was_written(tmp_path: Path, direct: bool) -> None:
    tensors = several()
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with shards.opened(tmp_path / "a.safetensors", direct=direct) as opened:
        assert set(opened.entries) == set(tensors)
        for name, tensor in tensors.items():
            found = fetched(opened, name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": F32, "b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, bytes(24), "overlap"),
    "hole between": ({"a": F32, "b": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}}, bytes(32), "belong to no tensor"),
    "hole before": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "belong to no tensor"),
    "bytes after": ({"a": F32}, bytes(25), "belong to no tensor"),
    "cut off": ({"a": F32}, bytes(23), "cut off"),
    "shape and bytes": ({"a": {**F32, "shape": [2, 4]}}, bytes(24), "is 32 bytes"),
    "negative extent": ({"a": {**F32, "shape": [-2, -3]}}, bytes(24), "shape"),
    "wrapping extents": ({"a": {**F32, "shape": [2**62, 4, 6]}}, bytes(24), "bytes"),
    "an extent beyond 64 bits": ({"a": {**F32, "shape": [0, 2**63]}}, bytes(24), "shape"),
    "a truth for an extent": ({"a": {**F32, "shape": [True, 6]}}, bytes(24), "shape"),
    "a float for an extent": ({"a": {**F32, "shape": [2.0, 3]}}, bytes(24), "shape"),
    "too many dimensions": ({"a": {**F32, "shape": [2, 3] + [1] * 70}}, bytes(24), "shape"),
    "offsets reversed": ({"a": {**F32, "data_offsets": [24, 0]}}, bytes(24), "offsets"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 12, 24]}}, bytes(24), "offsets"),
    "unknown dtype": ({"a": {**F32, "dtype": "F33"}}, bytes(24), "dtype"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}}, bytes(24), "dtype"),
    "a list for a dtype": ({"a": {**F32, "dtype": ["F32"]}}, bytes(24), "nested|dtype"),
    "no dtype": ({"a": {"shape": [6], "data_offsets": [0, 24]}}, bytes(24), "exactly"),
    "strides": ({"a": {**F32, "strides": [1, 2]}}, bytes(24), "exactly"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": F32}, bytes(24), "metadata"),
    "a list": (b"[]", b"", "JSON object"),
    "no JSON": (b"{,}", b"", "damaged"),
    "leading blanks": (b"   {}", b"", "JSON object"),
    "not UTF-8": (b'{"\xff": 1}', b"", "damaged"),
    "text after it": (b"{} {}", b"", "nested|damaged"),
    "a key twice": (
        b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"a":{"dtype":"I32","shape":[6],"data_offsets":[0,24]}}',
        bytes(24),
        "twice",
    ),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[6],"data_offsets":[0,24]}}', bytes(24), "twice"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', bytes(24), "NaN"),
    "a number of 5000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,24]}}', bytes(24), "damaged"),
    "lists in lists": (b'{"a":{"dtype":"F32","shape":' + b"[" * 50_000 + b"]" * 50_000 + b"}}", bytes(24), "nested"),
    "objects in objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, bytes(24), "nested"),
    "an open string": (b'{"' + b"a" * 100_000, bytes(24), "damaged"),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_header_that_lies_is_refused_with_what_is_wrong(tmp_path: Path, what: str) -> None:
    header, data, said = BAD_HEADERS[what]
    path = written(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(BadInput, match=said) as caught:
        shards.opened(path)
    assert "bad.safetensors" in caught.value.message and caught.value.fix
    assert len(caught.value.message) < 600 and caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        (struct.pack("<Q", 2**63) + b"{}", "the most"),
        (struct.pack("<Q", 100_000_001) + b"{}", "the most"),
        (struct.pack("<Q", 3) + b"{}", "cut off"),
        (struct.pack("<Q", 0), "JSON object"),
        (b"PK\x03\x04" + bytes(100), "no safetensors file|damaged|cut off"),
    ],
)
def test_a_length_that_cannot_be_is_refused_before_the_header_is_read(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=said):
        shards.opened(path)


def test_a_header_of_nothing_but_brackets_costs_no_gigabytes() -> None:
    script = """
        import resource
        from gpuopt.core.errors import BadInput
        from gpuopt.streaming import headers
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        text = b'{"a":[' + b'[],' * 8_000_000 + b'[]]}'
        try:
            headers.entries(text, 10**9, where="x")
        except BadInput:
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200, "parsing it would take 500 MiB"


NAMES = st.text(min_size=1, max_size=6)
EXTENTS = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**62, 2**64]), st.booleans(), st.floats(0, 4))
VALUES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*headers.DTYPES, "F4", "nope", ""]),
        "shape": st.lists(EXTENTS, max_size=4),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=3), st.integers(0, 40), st.integers(0, 8))
def test_what_we_open_the_safetensors_library_opens_too(content: dict[str, Any], num_bytes: int, padding: int) -> None:
    text = json.dumps(content).encode() + b" " * padding
    raw = struct.pack("<Q", len(text)) + text + bytes(num_bytes)
    try:
        ours, _ = headers.entries(text, len(raw), where="x")
    except BadInput:
        return
    theirs = dict(safetensors.deserialize(raw))
    assert set(ours) == set(theirs)
    for name, entry in ours.items():
        assert list(entry.shape) == theirs[name]["shape"] and entry.num_bytes == len(theirs[name]["data"])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_file_with_one_flipped_or_missing_byte_of_header_is_refused_or_still_says_the_truth(data: st.DataObject) -> None:
    raw = bytearray(safetensors.torch.save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)}))
    length = int.from_bytes(raw[:8], "little")
    where = data.draw(st.integers(0, 7 + length))
    if data.draw(st.booleans()):
        raw[where] = data.draw(st.integers(0, 255))
    else:
        del raw[where]
    try:
        size = headers.header_bytes(bytes(raw[:8]), len(raw), where="x")
        found, _ = headers.entries(bytes(raw[8 : 8 + size]), len(raw), where="x")
    except BadInput:
        return
    for entry in found.values():
        assert 8 + size <= entry.offset and entry.offset + entry.num_bytes <= len(raw)
    try:
        safetensors.torch.load(bytes(raw))
    except SafetensorError as error:  # they know no name of a dtype that we know and they do not
        pytest.fail(f"the library refuses what we accept: {error}")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6))
def test_honest_headers_are_read_like_the_library_reads_them(specs: list[tuple[str, list[int]]]) -> None:
    tensors = {f"t{i}": torch.zeros(shape, dtype=getattr(torch, headers.DTYPES[dtype][0])) for i, (dtype, shape) in enumerate(specs)}
    raw = safetensors.torch.save(tensors)
    size = headers.header_bytes(raw[:8], len(raw), where="x")
    found, _ = headers.entries(raw[8 : 8 + size], len(raw), where="x")
    assert {n: (e.dtype, e.shape) for n, e in found.items()} == {
        n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()
    }


# --- folders and indices ---------------------------------------------------------------------------------------------------------------------


def sharded(folder: Path, index: Callable[[dict[str, str]], dict[str, str]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    parts = [{"a": torch.arange(4.0), "b": torch.ones(2)}, {"c": torch.full((3,), 7.0)}]
    names = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file(part, folder / file)
        names.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index(names) if index else names})
    )
    return folder


def test_a_folder_an_index_and_a_list_of_files_are_the_same_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    for named in (folder, folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))):
        with shards.opened(named) as opened:
            assert set(opened.entries) == {"a", "b", "c"} and torch.equal(fetched(opened, "c"), torch.full((3,), 7.0))
    (folder / "model.safetensors.index.json").unlink()
    with shards.opened(folder) as opened:
        assert len(opened.entries) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda names: {**names, "a": "../secret.safetensors"}, "outside its folder"),
        (lambda names: {**names, "a": "/etc/passwd"}, "outside its folder"),
        (lambda names: {**names, "a": ".."}, "outside its folder"),
        (lambda names: {**names, "a": ""}, "outside its folder"),
        (lambda names: {**names, "a": 3}, "outside its folder"),
        (lambda names: {**names, "a": "model-00009-of-00002.safetensors"}, "not there"),
        (lambda names: {**names, "a": names["c"]}, "files were swapped"),
        (lambda names: {**names, "d": names["c"]}, "no shard has it"),
        (lambda _: {}, "names no tensors"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        shards.opened(sharded(tmp_path / "m", change))


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    one, two = sorted(folder.glob("*.safetensors"))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    with pytest.raises(BadInput, match="swapped"):
        shards.opened(folder)


def test_a_missing_shard_is_named_with_and_without_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00001-of-00002"):
        shards.opened(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(BadInput, match=r"model-00001-of-00002.safetensors is not there \(1 of 2 are\)"):
        shards.opened(folder)


def test_an_index_with_a_repeated_name_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    file = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{file}", "a": "{file}"}}}}')
    with pytest.raises(BadInput, match="twice"):
        shards.opened(folder)


def test_tensors_that_no_index_names_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", lambda names: {key: value for key, value in names.items() if key != "b"})
    with shards.opened(folder) as opened:
        assert set(opened.entries) == {"a", "c"} and "b" in opened.notes[0]


def test_a_link_out_of_the_folder_is_refused_and_the_hubs_own_are_followed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    one = folder / "model-00001-of-00002.safetensors"
    one.rename(tmp_path / "elsewhere.safetensors")
    one.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BadInput, match="link out of its folder"):
        shards.opened(folder)
    hub = tmp_path / "models--x--y"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    snapshot = sharded(hub / "snapshots" / "abc")
    for path in list(snapshot.iterdir()):
        blob = hub / "blobs" / __import__("hashlib").sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    with shards.opened(snapshot) as opened:
        assert torch.equal(fetched(opened, "a"), torch.arange(4.0))
        assert len(opened.known_sha256()) == 2
        opened.verify(opened.known_sha256())
        blob = (snapshot / "model-00002-of-00002.safetensors").resolve()
        raw = bytearray(blob.read_bytes())
        raw[-1] ^= 1
        blob.write_bytes(raw)
        with pytest.raises(BadInput, match="sha256"):
            opened.verify(opened.known_sha256())


def test_two_files_with_the_same_tensor_are_no_model(tmp_path: Path) -> None:
    for name in "ab":
        safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInput, match="both in a.safetensors and in b.safetensors"):
        shards.opened([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    with pytest.raises(UsageError, match="no index"):
        shards.opened(tmp_path)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="no regular file"):
        shards.opened(tmp_path / "model.safetensors")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        shards.opened(tmp_path / "none.safetensors")
    with pytest.raises(BadInput, match=r"holds no .safetensors"):
        shards.opened(tmp_path)


# --- reading ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_cut_off_while_it_is_read_is_an_error_and_never_zeros(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3_000_000)}, path)
    with shards.opened(path, direct=direct) as opened:
        os.truncate(path, 5_000_001)
        with pytest.raises(BadInput, match="ends at byte 5000001"):
            fetched(opened, "a")


def test_a_file_written_to_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000)}, path)
    with shards.opened(path) as opened:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"aaaa")
        os.utime(path, ns=(0, 0))
        with pytest.raises(BadInput, match="was changed"):
            fetched(opened, "a")


def test_an_error_of_the_disk_names_file_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.ones(5_000_000)}, path)
    with shards.opened(path) as opened:
        real = os.preadv

        def broken(fd: int, buffers: Any, offset: int, *rest: Any) -> int:
            if offset > 9_000_000:
                raise OSError(5, "Input/output error")
            return real(fd, buffers, offset, *rest)

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(ResourceError, match=r"m.safetensors: reading \d+ bytes at byte \d+ failed: Input/output error"):
            fetched(opened, "a")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50_000)
    safetensors.torch.save_file({"a": values}, tmp_path / "m.safetensors")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:999]], offset))
    with shards.opened(tmp_path / "m.safetensors") as opened:
        assert torch.equal(fetched(opened, "a"), values)


def test_a_file_system_that_refuses_direct_reads_is_read_anyway_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5_000_000)
    safetensors.torch.save_file({"a": values}, tmp_path / "m.safetensors")
    real, refused = os.preadv, []
    with reading.File(tmp_path / "m.safetensors", direct=True) as file:
        if not file.is_direct:
            pytest.skip("this file system has no O_DIRECT")

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") and __import__("fcntl").fcntl(fd, 3) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    with shards.opened(tmp_path / "m.safetensors", direct=True) as opened:
        assert torch.equal(fetched(opened, "a"), values)
        assert refused and "page cache" in " ".join(opened.notes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20_000), st.integers(1, 20_000), st.integers(0, 4096))
def test_direct_reads_at_any_offset_length_and_address_give_the_files_bytes(
    tmp_path_factory: pytest.TempPathFactory, offset: int, length: int, shift: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "direct.bin"
    if not path.exists():
        path.write_bytes(torch.randint(0, 256, (40_001,), dtype=torch.uint8).numpy().tobytes())
    memory = torch.zeros(length + 8192, dtype=torch.uint8)
    with reading.File(path, direct=True) as file:
        file.read_into(offset, memory[shift : shift + length])
    assert memory[shift : shift + length].numpy().tobytes() == path.read_bytes()[offset : offset + length]
    assert not memory[:shift].any() and not memory[shift + length :].any()
