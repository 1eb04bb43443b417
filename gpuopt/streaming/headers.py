"""The header of a safetensors file -> its entries, or BadInput with what is wrong. The file is hostile until every rule holds.

8 bytes of length, little endian; a JSON object of that length: name -> dtype, shape, data_offsets; then the tensors' bytes, end to end.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpuopt.core.errors import BadInput
from gpuopt.trust.policy import printable

MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""
MAX_RANK = 64
"""Of a tensor; torch's own limit for most operators."""
DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""Their name -> torch's name and bytes an element. Types of less than a byte are not here: no view of a slab holds them."""
_AGAIN = "copy or download the file again, and compare its sha256 with the source"
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_DEPTH = re.compile(rb"\{(?:\{(?:\[\])*+\})*+\}")
"""Brackets of an honest header: one object, objects in it, lists of numbers in those. Checked first: a hundred million bytes of `[[[[` cost gigabytes to parse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor in a file."""

    name: str
    dtype: str
    """torch's name: `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """From the start of the file; at any alignment."""
    num_bytes: int


def header_bytes(first_eight: bytes, file_bytes: int, *, where: str) -> int:
    """Length of the header, checked against the file's size before anything of that length is read. Raises BadInput."""
    if len(first_eight) < 8:
        raise BadInput(f"{where} holds {file_bytes} bytes: too few for a safetensors file", fix=_AGAIN)
    length = int.from_bytes(first_eight, "little")
    if length > MAX_HEADER_BYTES:
        raise BadInput(
            f"{where} says that its header has {length} bytes, and {MAX_HEADER_BYTES} are the most: it is damaged, or no safetensors file",
            fix=_AGAIN,
        )
    if 8 + length > file_bytes:
        raise BadInput(f"{where} is cut off: its header ends at byte {8 + length}, the file at byte {file_bytes}", fix=_AGAIN)
    return length


def entries(header: bytes, file_bytes: int, *, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Name -> entry in the order of their bytes, and the file's own metadata. Raises BadInput when anything does not fit."""
    found = strict_json(header, _DEPTH, where=where)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(where, "__metadata__ maps to other things than texts")
    start = 8 + len(header)
    tensors = sorted((_entry(name, value, start, where) for name, value in found.items()), key=lambda e: (e.offset, e.num_bytes))
    end = start
    for before, entry in zip([None, *tensors], tensors, strict=False):
        if entry.offset < end:
            raise _bad(where, f"{_named(entry.name)} and {_named(before.name) if before else 'the header'} overlap")
        if entry.offset > end:
            raise _bad(where, f"{entry.offset - end} bytes before {_named(entry.name)} belong to no tensor")
        end = entry.offset + entry.num_bytes
    if end != file_bytes:
        word = "is cut off" if end > file_bytes else "has bytes that belong to no tensor"
        raise BadInput(f"{where} {word}: its tensors end at byte {end}, the file at byte {file_bytes}", fix=_AGAIN)
    return {entry.name: entry for entry in tensors}, metadata


def strict_json(text: bytes, brackets: re.Pattern[bytes], *, where: str) -> dict[str, Any]:
    """A JSON object whose brackets are those expected, without repeated keys, NaN or text that is not UTF-8. Raises BadInput."""
    if not text.startswith(b"{"):
        raise _bad(where, "it is no JSON object")
    if not brackets.fullmatch(_STRINGS.sub(b"", text).translate(None, _NOT_BRACKETS)):
        raise _bad(where, "it is nested otherwise than a list of tensors")
    try:
        found: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError and int's limit of digits are ValueErrors
        raise _bad(where, printable(str(error), limit=160)) from error
    return found


def _entry(name: str, value: Any, start: int, where: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(where, f"{_named(name)} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadInput(
            f"{where}: {_named(name)} has the dtype {printable(repr(dtype))}, which cannot be streamed",
            fix=f"convert it to one of {', '.join(DTYPES)}",
        )
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise _bad(where, f"{_named(name)} has the shape {printable(repr(shape))}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(where, f"{_named(name)} has the offsets {printable(repr(offsets))}")
    torch_name, element_bytes = DTYPES[dtype]
    need = element_bytes
    for extent in shape:
        need *= extent  # Python's integers do not wrap
    if need != offsets[1] - offsets[0]:
        raise _bad(
            where, f"{_named(name)}: {dtype} of shape {printable(repr(shape))} is {need} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return Entry(name=name, dtype=torch_name, shape=tuple(shape), offset=start + offsets[0], num_bytes=need)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)  # True is an int, and no extent


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_named(twice)} is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _named(name: str) -> str:
    return printable(repr(name), limit=120)


def _bad(where: str, what: str) -> BadInput:
    return BadInput(f"the header of {where} is damaged: {what}", fix=_AGAIN)
