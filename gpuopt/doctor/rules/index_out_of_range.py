"""GPU705: an index lies outside the table it is looked up in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuopt.core.accepts import input_names
from gpuopt.core.result import Finding
from gpuopt.doctor import failure, frames, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule
from gpuopt.doctor.rules.shape_mismatch import POSITIONS

if TYPE_CHECKING:
    import torch

_BOUNDS = re.compile(r"index (?P<index>-?\d+) is out of bounds for dimension (?P<axis>\d+) with size (?P<size>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Smallest and largest number of an integer tensor."""

    low: int
    high: int
    outside: int
    """How many lie outside of 0..size-1."""
    at: tuple[int, ...]
    """Where the first of them is."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the table, its size, the tensor that indexes it, and the first offending number."""
    error = evidence.failure
    if error is None or failure.kind(error) != "index":
        return
    is_late = "device-side assert" in str(error)
    failed = failure.locate(evidence.module, evidence.inputs, error)
    # An assertion in a kernel is reported by some later op: only a failure on the CPU names the true place.
    found = _lookup(failed) if failed is not None and "device-side assert" not in str(failed.error) else None
    found = found or _guess(evidence)
    if found is not None:
        yield found
        return
    yield Finding(
        code="",
        severity="error",
        message=(f"{failed.where}: " if failed is not None and not is_late else "") + failure.first_line(error),
        fix="run it once on the CPU (--device cpu): there the failing look-up is named at once"
        if is_late
        else "check the indices on that line",
        module=failed.module_name if failed is not None and not is_late else None,
        line=failed.line if failed is not None and not is_late else None,
        op=failed.code or None if failed is not None and not is_late else None,
    )


def _lookup(failed: failure.Failed) -> Finding | None:
    """From the tensors of the failing expression."""
    index = next((t for t in failed.tensors if t.dtype in ("int64", "int32", "int16", "uint8") and t.kind in ("input", "value")), None)
    index = index or next((t for t in failed.tensors if t.dtype in ("int64", "int32")), None)
    bounds = _BOUNDS.search(str(failed.error))
    table = next((t for t in failed.tensors if t is not index and t.shape and t.dtype.startswith(("float", "bfloat"))), None)
    rows = getattr(failed.module, "num_embeddings", None)
    if bounds is not None:
        size = int(bounds["size"])
    elif isinstance(rows, int):
        size = rows
    elif table is not None:
        size = table.shape[0]
    else:
        return None
    name = failed.module_name if isinstance(rows, int) else table.name if table is not None else failed.code
    given = _range(failed.values[index.name], size) if index is not None and index.name in failed.values else None
    return _finding(
        where=failed.where if isinstance(rows, int) else f"{failed.where}: {failed.code}",
        name=name,
        size=size,
        index=index.name if index is not None else "the index",
        given=given,
        said=int(bounds["index"]) if bounds is not None else None,
        is_input=index is not None and index.kind == "input",
        made_at=index.made_at if index is not None else None,
        module=failed.module_name,
        line=failed.line,
    )


def _guess(evidence: Evidence) -> Finding | None:
    """Where no frame tells: every integer input that can still be read, against every embedding whose name fits it."""
    if evidence.inputs is None or not frames.is_module(evidence.module):
        return None
    tables = {
        name: (part, int(part.num_embeddings))
        for name, part in evidence.module.named_modules()
        if isinstance(getattr(part, "num_embeddings", None), int)
    }
    values = [*evidence.inputs.args, *evidence.inputs.kwargs.values()]
    for given, value in zip(input_names(evidence.inputs), values):
        if not frames.is_tensor(value) or value.is_floating_point() or value.dtype.is_complex or str(value.dtype) == "torch.bool":
            continue
        for name, (part, size) in sorted(tables.items(), key=lambda item: -item[1][1]):
            if not _fits(given, name):
                continue
            found = _range(value, size)
            if found is not None and found.outside:
                return _finding(
                    where=f"{name} ({type(part).__name__})",
                    name=name,
                    size=size,
                    index=given,
                    given=found,
                    said=None,
                    is_input=True,
                    made_at=None,
                    module=name,
                    line=None,
                )
            break  # the largest table whose name fits holds them all
    return None


def _fits(given: str, table: str) -> bool:
    """`input_ids` go into words, `token_type_ids` into types, `position_ids` into positions; a mask into none."""
    given, table = given.lower(), table.lower()
    if "mask" in given or "label" in given:
        return False
    for word in ("type", "pos", "seg"):
        if (word in given) != (word in table):
            return False
    return True


def _range(value: torch.Tensor, size: int) -> Range | None:
    """None where the numbers cannot be read: fake and meta tensors, a GPU whose context is gone."""
    try:
        if not value.numel():
            return None
        bad = (value < 0) | (value >= size)
        first = bad.nonzero()[0].tolist() if bool(bad.any()) else []
        return Range(low=int(value.min()), high=int(value.max()), outside=int(bad.sum()), at=tuple(int(i) for i in first))
    except (RuntimeError, NotImplementedError):
        return None


def _finding(
    *, where: str, name: str, size: int, index: str, given: Range | None, said: int | None, is_input: bool, made_at: str | None, **more: Any
) -> Finding:
    is_position = any(word in name.lower() for word in POSITIONS)
    low, high = (given.low, given.high) if given is not None else (said, said)
    worst = low if low is not None and low < 0 else high
    held = f"holds {worst}" if worst is not None else "goes beyond it"
    count = (
        f"; {words.number(given.outside, 'such number')}, {'the first ' if given.outside > 1 else ''}at {list(given.at)}"
        if given is not None and given.outside
        else ""
    )
    if worst is not None and worst < 0:
        fix = f"{index}.clamp(min=0), or the id of the padding token: {worst} marks what a loss ignores, no layer takes it"
    elif is_position:
        fix = f"inputs of at most {size} tokens: tokenizer(…, truncation=True, max_length={size})"
    elif is_input:
        fix = (
            f"--input '{index}:int64[N,S]<{size}' for random data; for real data the tokenizer is another model's, or tokens were added: "
            f"model.resize_token_embeddings(len(tokenizer))"
        )
    else:
        fix = f"keep {index} below {size}" + (f" where it is made, {made_at}" if made_at else "")
    return Finding(
        code="",
        severity="error",
        message=f"{where} has {size} rows, and {index} {held}, where 0 to {size - 1} is allowed{count}",
        fix=fix,
        count=given.outside if given is not None and given.outside else None,
        op=name or None,
        **more,
    )


RULE = Rule(
    code="GPU705",
    name="index-out-of-range",
    what="forward() failed because an index lies outside its table.",
    why="On a GPU the check is an assertion inside the kernel: it is reported later, at an innocent line, and the whole process has to start again.",
    before="ids = tokenizer_of_another_model(text)\nmodel(ids)",
    after="ids = tokenizer(text, truncation=True, max_length=512)\nmodel(ids)",
    safe=False,
    needs=frozenset({"failure"}),
    find=find,
    source="the exception, its traceback, the inputs checked against num_embeddings",
)
