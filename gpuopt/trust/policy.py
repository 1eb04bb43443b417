"""Path -> Format, by content, and what each format may do. Opens nothing that runs code; pure standard library."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gpuopt.core.errors import BadInput, UsageError
from gpuopt.trust import archives


class Format(StrEnum):
    """What a file or folder is, whatever its name says."""

    CHECKPOINT = "checkpoint"
    """torch.save's zip or its older form: tensors, or a pickled module."""
    PICKLE = "pickle"
    """A bare Python pickle that torch did not write."""
    TORCHSCRIPT = "torchscript"
    EXPORTED = "exported"
    """.pt2 holding an ExportedProgram."""
    AOTI = "aoti"
    """.pt2 holding AOTInductor's native code."""
    SAFETENSORS = "safetensors"
    SHARDED_SAFETENSORS = "sharded_safetensors"
    """model.safetensors.index.json, or the folder that holds it without a config.json."""
    ONNX = "onnx"
    ENGINE = "engine"
    """A TensorRT plan."""
    TRANSFORMERS = "transformers"
    """A folder with config.json."""
    BUNDLE = "bundle"
    """A folder with manifest.json."""


class Consent(StrEnum):
    """What has to be true before a format is opened."""

    NONE = "none"
    """Data: loads after header and size checks."""
    GLOBALS = "globals"
    """Loads when every global it names is admitted; else its hash must be trusted."""
    HASH = "hash"
    """Code: its hash must be trusted."""
    OURS_OR_HASH = "ours_or_hash"
    """Code: built by this user's gpuopt, or its hash must be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the policy."""

    consent: Consent
    is_a: str
    """Completes "NAME is …"."""
    why: str
    """The sentence shown when it is refused."""
    suffixes: tuple[str, ...]


POLICY: dict[Format, Rule] = {
    Format.SAFETENSORS: Rule(
        consent=Consent.NONE,
        is_a="a safetensors file",
        why="safetensors holds data only",
        suffixes=(".safetensors",),
    ),
    Format.SHARDED_SAFETENSORS: Rule(
        consent=Consent.NONE, is_a="a sharded safetensors index", why="safetensors holds data only", suffixes=(".json",)
    ),
    Format.CHECKPOINT: Rule(
        consent=Consent.GLOBALS,
        is_a="a torch checkpoint",
        why="a pickle may call any function; it loads alone only when it names nothing but tensors and the modules of well-known libraries",
        suffixes=(".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".th"),
    ),
    Format.PICKLE: Rule(
        consent=Consent.HASH,
        is_a="a bare Python pickle",
        why="a pickle may call any function",
        suffixes=(".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"),
    ),
    Format.TORCHSCRIPT: Rule(
        consent=Consent.HASH,
        is_a="a TorchScript archive",
        why="TorchScript is a program: loading and running it executes what its author wrote",
        suffixes=(".pt", ".pth", ".ts", ".jit", ".torchscript", ".bin"),
    ),
    Format.EXPORTED: Rule(
        consent=Consent.OURS_OR_HASH,
        is_a="a .pt2 exported program",
        why="torch.export.load unpickles weights and sample inputs and evaluates shape expressions",
        suffixes=(".pt2",),
    ),
    Format.AOTI: Rule(
        consent=Consent.OURS_OR_HASH,
        is_a="a .pt2 AOTInductor package",
        why="the package holds a native library that runs on load",
        suffixes=(".pt2",),
    ),
    Format.ONNX: Rule(
        consent=Consent.NONE,
        is_a="an ONNX model",
        why="ONNX holds a graph of known operators and data",
        suffixes=(".onnx",),
    ),
    Format.ENGINE: Rule(
        consent=Consent.OURS_OR_HASH,
        is_a="a TensorRT plan",
        why="deserialising a TensorRT plan equals running native code",
        suffixes=(".plan", ".engine", ".trt"),
    ),
    Format.TRANSFORMERS: Rule(
        consent=Consent.NONE,
        is_a="a transformers folder",
        why="configuration and safetensors are data; code beside them (auto_map) is refused",
        suffixes=(),
    ),
    Format.BUNDLE: Rule(
        consent=Consent.OURS_OR_HASH,
        is_a="a gpuopt bundle",
        why="a bundle holds native code for the machine that built it",
        suffixes=(),
    ),
}
"""What each format is and may do. A8 of the threat notes, as data."""

_AGAIN = "copy or download it again"
_KNOWN_SUFFIXES = frozenset(suffix for rule in POLICY.values() for suffix in rule.suffixes)
_TRT_MAGIC = (b"ftrt", b"ptrt")
_ONNX_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26})
"""Field numbers of onnx.ModelProto; 7 is the graph, 8 the operator sets."""


def classify(path: Path | str) -> Format:
    """What is at `path`, decided by content. Raises UsageError when nothing is there, BadInput saying what it is when it is no model or its name disagrees."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UsageError(
            f"there is no file or folder {printable(str(path))}", fix="check the path, or use package.module:factory"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{printable(str(path))} cannot be read: {error}", fix="check the path and its permissions") from error
    if stat.S_ISDIR(mode):
        return _classify_folder(path)
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path.name} is not a regular file", fix="name a model file or folder")
    try:
        found = _classify_file(path)
    except OSError as error:
        raise UsageError(f"{printable(str(path))} cannot be read: {error.strerror or error}", fix="check its permissions") from error
    suffix = path.suffix.lower()
    rule = POLICY[found]
    if suffix in _KNOWN_SUFFIXES and suffix not in rule.suffixes:
        raise BadInput(
            f"{path.name} is named {suffix} but is {rule.is_a}",
            fix=f"if it comes from where you think, rename it to {rule.suffixes[0]}",
        )
    return found


def sentence(found: Format) -> str:
    """Why this format needs what it needs, in one sentence."""
    return POLICY[found].why


def printable(text: str, *, limit: int = 120) -> str:
    """Text from a file or a command line, safe to print on one line."""
    cleaned = "".join(c if c.isprintable() else "?" for c in text)
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def _classify_folder(path: Path) -> Format:
    if (path / "manifest.json").is_file():
        return Format.BUNDLE
    if (path / "config.json").is_file():
        return Format.TRANSFORMERS
    if (path / "model.safetensors.index.json").is_file():
        return Format.SHARDED_SAFETENSORS
    raise BadInput(
        f"the folder {printable(path.name)} holds no config.json (transformers), manifest.json (bundle) or model.safetensors.index.json",
        fix="name the model file inside it",
    )


def _classify_file(path: Path) -> Format:
    size = path.stat().st_size
    if size == 0:
        raise BadInput(f"{path.name} is empty (0 bytes)", fix=_AGAIN)
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"PK\x03\x04":
        return _classify_zip(path)
    if head[:4] in _TRT_MAGIC:
        return Format.ENGINE
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        raise BadInput(f"{path.name} is a git-lfs pointer, not the file it stands for", fix="git lfs pull")
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, archives.MAX_HEADER_BYTES):
        archives.safetensors_header(path)
        return Format.SAFETENSORS
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BadInput(
            f"{path.name} is an HTML or XML page (an error page saved as a model?)", fix=f"{_AGAIN}, logged in if the site wants it"
        )
    if text.startswith(b"{"):
        return _classify_json(path)
    if _is_pickle(head, size):
        return Format.CHECKPOINT if _is_legacy_torch(head) else Format.PICKLE
    if path.suffix.lower() == ".safetensors":
        archives.safetensors_header(path)  # says which of its limits is broken
        raise BadInput(f"{path.name} is not a safetensors file: its header is not JSON", fix=_AGAIN)
    onnx = _onnx_problem(path, size)
    if onnx is None:
        return Format.ONNX
    if path.suffix.lower() == ".onnx":
        raise BadInput(f"{path.name} is not a whole ONNX model: {onnx}", fix=_AGAIN)
    for magic, what in _OTHER_MAGIC:
        if head.startswith(magic):
            raise BadInput(f"{path.name} is {what}, not a model", fix="name a model file")
    kind = "text" if head.isascii() else "unknown data"
    raise BadInput(f"{path.name} is {kind}, not a model file (it starts with {head[:8]!r})", fix=_AGAIN)


_OTHER_MAGIC = (
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a native program or library"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"#!", "a script"),
)


def _classify_zip(path: Path) -> Format:
    archive = archives.open_zip(path, stored_only=False)
    pickles = sorted(name for name in archive.members if name.rpartition("/")[2] == "data.pkl")
    if "data.pkl" in archive.members and "constants.pkl" in archive.members:
        return Format.TORCHSCRIPT
    if "archive_format" in archive.members and "archive_version" in archive.members:
        if archive.has("data/aotinductor"):
            return Format.AOTI
        if archive.has("models"):
            return Format.EXPORTED
        raise BadInput(f"{path.name} is a .pt2 archive without a model", fix=_AGAIN)
    if "serialized_exported_program.json" in archive.members:
        return Format.EXPORTED
    if pickles == ["data.pkl"]:
        archives.open_zip(path, stored_only=True)
        return Format.CHECKPOINT
    if pickles:
        raise BadInput(
            f"{path.name} holds more than one data.pkl, or one in an inner folder: {', '.join(pickles[:3])}", fix="do not use this file"
        )
    raise BadInput(f"{path.name} is a zip archive, but not one that torch wrote", fix="name a model file")


def _classify_json(path: Path) -> Format:
    if path.stat().st_size > archives.MAX_HEADER_BYTES:
        raise BadInput(f"{path.name} is a large JSON file, not a model", fix="name a model file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path.name} is damaged JSON: {error}", fix=_AGAIN) from error
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        return Format.SHARDED_SAFETENSORS
    raise BadInput(f"{path.name} is a JSON file, not a model", fix="name the folder it lies in, or a model file")


def _is_pickle(head: bytes, size: int) -> bool:
    """Protocol 2 and later say so; 0 and 1 are recognised by the opcodes a hostile file needs."""
    if head[0:1] == b"\x80" and len(head) > 2 and 2 <= head[1] <= 5:
        return True
    return head[:1] in (b"(", b"c", b"]", b"}") and size < 2**20 and (b"\n" in head[:200]) and head.rstrip()[-1:] == b"."


def _is_legacy_torch(head: bytes) -> bool:
    """torch.save before 1.6 starts with a pickle of its magic number 0x1950a86a20f9469cfc6c."""
    return head[:14] == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


def _onnx_problem(path: Path, size: int) -> str | None:
    """None when the file is a whole protobuf message with the top-level fields of an ONNX model; else what is wrong."""
    position, fields = 0, 0
    has_graph = False
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            raw = file.read(20)
            key, used = _varint(raw)
            if used == 0:
                return "damaged protobuf"
            number, wire = key >> 3, key & 7
            if number not in _ONNX_FIELDS:
                return f"protobuf field {number} is not ONNX's" if fields else "no protobuf message of ONNX"
            if wire == 0:
                _, more = _varint(raw[used:])
                if more == 0:
                    return "damaged protobuf"
                position += used + more
            elif wire == 2:
                length, more = _varint(raw[used:])
                if more == 0:
                    return "damaged protobuf"
                position += used + more + length
                if position > size:
                    return f"truncated: a part of {length} bytes ends {position - size} bytes past the file"
                has_graph = has_graph or number == 7
            else:
                return "no protobuf message of ONNX"
            fields += 1
            if fields > 100_000:
                return "too many top-level fields"
    return None if has_graph else "it has no graph"


def _varint(raw: bytes) -> tuple[int, int]:
    """(value, bytes used); 0 bytes used when it does not end."""
    value = 0
    for index, byte in enumerate(raw[:10]):
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, index + 1
    return 0, 0
