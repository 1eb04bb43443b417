"""GPU703: forward() met tensors whose shapes do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.core.accepts import input_names
from gpuopt.core.live import Inputs
from gpuopt.core.result import Finding
from gpuopt.doctor import failure, frames, mismatch
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

POSITIONS = ("pos", "wpe")
"""In the name of a table of positions."""
_WANTED = (
    # (attribute of the layer, axis of its input, what it counts)
    ("in_features", -1, "features"),
    ("in_channels", 1, "channels"),
    ("num_features", 1, "channels"),
    ("num_channels", 1, "channels"),
    ("normalized_shape", -1, "features"),
    ("input_size", -1, "features"),
    ("embed_dim", -1, "features"),
)


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the layer and what it takes, the tensor and what it is, and who made it."""

    def judged(failed: failure.Failed, _: BaseException) -> mismatch.Verdict:
        message, fix = _layer(failed) or _too_long(failed, evidence.inputs) or _operands(failed)
        return mismatch.Verdict(message=message, fix=fix)

    otherwise = "give inputs the shapes the model was made for: --input 'x:float32[N,3,224,224]'"
    return mismatch.finding(evidence, "shape", judged, otherwise=otherwise)


def _layer(failed: failure.Failed) -> tuple[str, str] | None:
    """What a layer of torch takes and what it got; None for other modules and for shapes that fit."""
    given = next((t for t in failed.tensors if t.kind in ("input", "value")), None)
    for attribute, axis, unit in _WANTED:
        wanted = _number(getattr(failed.module, attribute, None))
        if wanted is None or given is None:
            continue
        if axis >= len(given.shape):
            return (
                f"{failed.where} takes {wanted} {unit} in dimension {axis}, and {given.text} has {len(given.shape)} dimensions",
                _give(failed, given, f"{len(given.shape)} dimensions are too few: add the batch dimension, {given.name}.unsqueeze(0)"),
            )
        have = given.shape[axis]
        if have == wanted:
            continue
        where = "in the last dimension" if axis == -1 else f"in dimension {axis}"
        message = f"{failed.where} takes {wanted} {unit} {where}, and {given.text} has {have}"
        if attribute == "in_channels" and len(given.shape) == 4 and given.shape[-1] == wanted:
            return message, f"the images are channels-last: {given.name}.permute(0, 3, 1, 2)"
        shape = list(given.shape)
        shape[axis] = wanted
        return message, _give(failed, given, f"{type(failed.module).__name__} with {attribute}={have}, or {wanted} {unit} for it", shape)
    return None


def _give(failed: failure.Failed, given: failure.Seen, change: str, shape: list[int] | None = None) -> str:
    if given.kind == "input" and shape is not None:
        return f"--input '{given.name}:{given.dtype}[{','.join(str(d) for d in shape)}]', or {change}"
    return change + (f": it is made at {given.made_at} by {given.made_by}" if given.made_at else "")


def _too_long(failed: failure.Failed, inputs: Inputs | None) -> tuple[str, str] | None:
    """More tokens than the model has positions: the sizes disagree somewhere behind the look-up, at a line that says nothing."""
    if inputs is None or failed.root is None:
        return None
    tables = {name: size for name, part in failed.root.named_modules() if isinstance(size := getattr(part, "num_embeddings", None), int)}
    limits = {name: size for name, size in tables.items() if any(word in name.lower() for word in POSITIONS)}
    for given, value in zip(input_names(inputs), (*inputs.args, *inputs.kwargs.values())):
        if not frames.is_tensor(value) or value.dim() != 2 or value.is_floating_point():
            continue
        for name, limit in limits.items():
            if value.shape[1] > limit:
                return (
                    f"{given} has {value.shape[1]} tokens, and {name} ({type(failed.root.get_submodule(name)).__name__}) has {limit} positions: "
                    f"{failed.where} then fails with: {failure.first_line(failed.error)}",
                    f"inputs of at most {limit} tokens: tokenizer(…, truncation=True, max_length={limit})",
                )
    return None


def _operands(failed: failure.Failed) -> tuple[str, str]:
    """Two tensors of one expression that differ, the second rather one that belongs to the model."""
    shown = "; ".join(t.text for t in failed.tensors[:4])
    message = f"{failed.where}: {failure.first_line(failed.error)}" + (f": {shown}" if shown else "")
    for table in (t for t in failed.tensors if t.kind in ("parameter", "buffer", "attribute")):
        for other in (t for t in failed.tensors if t.kind in ("input", "value")):
            # Aligned from the last dimension, as broadcasting does.
            for size, limit in zip(reversed(other.shape), reversed(table.shape)):
                if size > limit > 1:
                    return (
                        message,
                        f"{table.name} is made for {limit}: inputs may be at most that long (truncate to {limit}), or make {table.name} longer",
                    )
    at = f" at {failed.line}" if failed.line else ""
    made = next((t for t in failed.tensors if t.made_at), None)
    hint = f"; {made.name} is made at {made.made_at} by {made.made_by}" if made else ""
    return message, f"make the shapes of {failed.code or 'the tensors'}{at} agree{hint}"


def _number(value: Any) -> int | None:
    if isinstance(value, tuple | list) and value:
        value = value[-1]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


RULE = Rule(
    code="GPU703",
    name="shape-mismatch",
    what="forward() failed because the shapes of two tensors do not fit.",
    why="Layers are made for a number of features or channels: another layout, another size of image or a longer text needs other layers or another input.",
    before="model(images)  # [8, 224, 224, 3]",
    after="model(images.permute(0, 3, 1, 2))  # [8, 3, 224, 224]",
    safe=False,
    needs=frozenset({"failure"}),
    find=find,
    source="the exception, its traceback and the tensors in its frames",
)
