"""A .pt2 of torch.export -> Model, with consent or our signature."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef, TensorSpec
from gpuopt.loaders import describe
from gpuopt.programs import ops
from gpuopt.trust import consent, gate

_LETTERS = ("S", "T", "L", "H", "W", "D", "K", "M", "P", "Q", "R", "U", "V", "X", "Y", "Z")


def load(ref: ModelRef, path: Path) -> Model:
    """Raises Untrusted without consent, Unavailable for a newer format, BadInput when it is damaged."""
    ops.register()  # a program names operators and does not bring them
    program = gate.load_exported(path, ref.trust)
    notes = [f"--arch {ref.arch} is not used: the file holds a whole program"] if ref.arch else []
    model = of_program(program, name=describe.name_of(path), sha256=consent.sha256_of(path), notes=notes)
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(model.module.named_parameters(), path.name)
    return model


def of_program(program: Any, *, name: str, sha256: str | None = None, notes: list[str] | None = None) -> Model:
    """The Model of an ExportedProgram: `module` is its callable, the signature comes from its placeholders."""
    module = program.module()
    return describe.of_module(
        module, name=name, form="exported", exported=program, signature=_signature(program), sha256=sha256, notes=notes or []
    )


def call_structure(program: Any) -> tuple[int, tuple[str, ...]] | None:
    """(number of positional inputs, keyword names) the program is called with; None where an input is nested."""
    positional, keywords = _children(program.call_spec.in_spec)
    if any(not child.is_leaf() for child in (*_children(positional), *_children(keywords))):
        return None
    return positional.num_children, tuple(keywords.context or ())


def _children(spec: Any) -> list[Any]:
    """Of a treespec; `children_specs` is the name before torch had `children()`, which later warns."""
    return list(spec.children()) if hasattr(spec, "children") else list(spec.children_specs)


def ranges(program: Any) -> dict[str, tuple[int, int]]:
    """Letter of the signature -> (low, high) that the program was exported for."""
    letters: dict[str, str] = {}
    _signature(program, letters)
    found: dict[str, tuple[int, int]] = {}
    for symbol, limits in program.range_constraints.items():
        letter = letters.get(str(symbol))
        if letter is not None:
            high = int(limits.upper) if limits.upper.is_finite and limits.upper.is_Integer else 2**62
            found[letter] = (int(limits.lower), high)
    return found


def _signature(program: Any, letters: dict[str, str] | None = None) -> tuple[TensorSpec, ...]:
    """One spec an input in call order; a symbolic size is a letter, N where it is some input's first dimension."""
    if call_structure(program) is None:
        return ()
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [(name, nodes[name].meta.get("val")) for name in program.graph_signature.user_inputs if name in nodes]
    if any(not isinstance(value, torch.Tensor) for _, value in values):
        return ()
    letters = {} if letters is None else letters
    firsts = [str(value.shape[0]) for _, value in values if value.dim() and not isinstance(value.shape[0], int)]
    if firsts:
        letters[firsts[0]] = "N"
    return tuple(
        TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(_shape(value, letters))) for name, value in values
    )


def _shape(value: Any, letters: dict[str, str]) -> Iterator[int | str]:
    for size in value.shape:
        if isinstance(size, int):
            yield size
        else:
            text = str(size)
            if text not in letters:
                unused = [letter for letter in _LETTERS if letter not in letters.values()]
                letters[text] = unused[0] if unused else f"D{len(letters)}"
            yield letters[text]
