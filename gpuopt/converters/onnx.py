"""Model + inputs -> an .onnx file by the dynamo exporter, loaded and run again before it is published."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from gpuopt.converters import exported
from gpuopt.converters.publish import publish
from gpuopt.core.errors import GateFailed, Unavailable, Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.programs.export import Ranges
from gpuopt.programs.plain import plain
from gpuopt.trust import gate, packages

_INLINE_BYTES = 1_500_000_000
"""Weights from here on go into a file beside the model: protobuf ends at 2 GiB."""

_LIMITS = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2}
"""Relative RMSE between the module and ONNX Runtime on the CPU, both in this dtype. This finds a wrong export, it does not judge a precision: the accuracy gate does."""

_NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")


def export(model: Model, inputs: Inputs, path: Path, dynamic: Ranges | None = None, *, check: bool = True) -> Path:
    """Write `path`, whole or not at all; beyond 1.5 GB the weights lie in `<name>.data` beside it.

    Inputs have the names of `inputs.specs` (else those of `forward`), outputs the model's own dotted ones: `output` for a bare tensor, `0`, `1` for a tuple, keys of a dict.
    Dimensions in `dynamic` are free and carry their letter. With `check` the file is validated, run by ONNX Runtime on the CPU and held against the module.
    What the file lacks (an input the model never reads) or could not be checked is added to `model.notes`.
    Raises Unsupported with the exporter's reason, GateFailed where the file gives other answers than the module.
    """
    _require_exporter()
    program = exported.export(model, inputs, dynamic)
    names = _input_names(program, inputs)
    outputs = _output_names(program, names)
    with publish(path) as temporary:
        _write(program, temporary, names, outputs, _letters(inputs, dynamic or {}), model.name)
        notes = _missing(temporary, names)
        if check:
            notes += _check(temporary, model, inputs, names, outputs)
    model.notes += [note for note in notes if note not in model.notes]
    return path


def _require_exporter() -> None:
    """The extra is imported here and not with this file: everything but ONNX must work without it. Raises Unavailable."""
    packages.load("onnx")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"the ONNX exporter needs the package onnxscript: {error}", fix="pip install 'gpuopt[onnx]'") from error


def _write(
    program: ExportedProgram,
    path: Path,
    names: Sequence[str],
    outputs: Sequence[str],
    letters: tuple[dict[int, str], ...] | None,
    model: str,
) -> None:
    # The optimiser's rules (onnxscript 0.7) fold batch norm in numpy, whose bfloat16 times a float is a float32: fp32 convolution weights beside bf16 data,
    # a file that TensorRT refuses. Constants alone may be folded: TensorRT wants axes, shapes and biases as constants.
    narrow = any(tensor.dtype == torch.bfloat16 for tensor in program.state_dict.values())
    try:
        with _quiet() as said:
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=letters,  # the program has its dimensions already: this only names them
                verbose=False,
                optimize=not narrow,
            )
            assert made is not None
            if narrow:
                from onnxscript import optimizer

                optimizer.fold_constants(made.model)
                optimizer.remove_unused_nodes(made.model)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # the exporter, its decompositions and its optimiser raise each their own: whatever it is, it is why there is no file
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), _last_line(said.getvalue()))
        raise Unsupported(
            f"{model} cannot be exported to ONNX: {type(error).__name__}: {first[:300]}",
            fix="--to pt2, or a backend that runs the module itself",
        ) from error
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    with _quiet():
        made.save(path, external_data=num_bytes > _INLINE_BYTES)


def _missing(path: Path, names: Sequence[str]) -> list[str]:
    """A sentence for each input that the exporter left out."""
    held = {value.name for value in packages.load("onnx").load(path, load_external_data=False).graph.input}
    lost = [name for name in names if name not in held]
    return [f"the ONNX file does not take {', '.join(lost)}: the model never reads {'it' if len(lost) == 1 else 'them'}"] if lost else []


def _check(path: Path, model: Model, inputs: Inputs, names: Sequence[str], outputs: Sequence[str]) -> list[str]:
    onnx = packages.load("onnx")
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise Unsupported(
            f"the exporter wrote an invalid ONNX file for {model.name}: {str(error).splitlines()[0]}", fix="--to pt2"
        ) from error
    limit = _LIMITS.get(model.dtype or "float32")
    if limit is None:
        return [f"the ONNX file is valid but was not run: ONNX Runtime's CPU provider does not compute in {model.dtype}"]
    with torch.no_grad():
        wanted = [leaf for leaf in pytree.tree_leaves(plain(model.module(*inputs.args, **inputs.kwargs))) if isinstance(leaf, torch.Tensor)]
    session = gate.onnx_session(path, ["CPUExecutionProvider"])
    held = {value.name for value in session.get_inputs()}
    feeds = {name: tensor.cpu().numpy() for name, tensor in zip(names, _tensors(inputs), strict=True) if name in held}
    found = [torch.from_numpy(value) for value in session.run(list(outputs), feeds)]
    for name, ours, theirs in zip(outputs, wanted, found, strict=True):
        reason = _difference(ours.detach().cpu(), theirs, limit)
        if reason:
            raise GateFailed(
                f"the ONNX file gives another answer than {model.name}: output {name!r} {reason}",
                fix="--to pt2, or report the exporter's bug",
            )
    return []


def _difference(ours: torch.Tensor, theirs: torch.Tensor, limit: float) -> str | None:
    """Why two outputs are not the same; None where they are, to within rounding."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"is {theirs.dtype} {tuple(theirs.shape)}, not {ours.dtype} {tuple(ours.shape)}"
    if not ours.is_floating_point():
        count = int((ours != theirs).sum())
        return f"differs in {count} of {ours.numel()} whole numbers" if count else None
    a, b = ours.double(), theirs.double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return "has NaN or Inf in other places"
    finite = torch.isfinite(a)
    error, size = (a - b)[finite].square().mean().sqrt().item(), a[finite].square().mean().sqrt().item()
    return f"is off by {error / size if size else error:.2g} (relative RMSE, limit {limit:g})" if error > limit * max(size, 1e-30) else None


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, torch.Tensor)]


def _letters(inputs: Inputs, ranges: Ranges) -> tuple[dict[int, str], ...] | None:
    """Axis -> letter for each tensor, in the order of `_tensors`; None where everything is fixed."""
    found = tuple({axis: part for axis, part in enumerate(spec.shape) if isinstance(part, str) and part in ranges} for spec in inputs.specs)
    return found if any(found) else None


def _input_names(program: ExportedProgram, inputs: Inputs) -> list[str]:
    """One a tensor, in the order of `_tensors`."""
    own = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    given = [spec.name for spec in inputs.specs]
    if len(given) != len(own) or not all(given) or len(set(given)) < len(given):
        return own
    return given


def _output_names(program: ExportedProgram, taken: Sequence[str]) -> list[str]:
    """Dotted paths through the outputs; one that is an input's name too gets a tail."""
    spec = program.call_spec.out_spec
    assert spec is not None
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [".".join(_part(key) for key in path) or "output" for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [f"{path}_out" if path in taken else path for path in paths]


def _part(key: Any) -> str:
    return str(next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)))


def _last_line(text: str) -> str:
    """The last line of what was printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """The exporter prints its progress to stdout, which belongs to the report, and warns about its own internals."""
    said = io.StringIO()
    before = {name: logging.getLogger(name).level for name in _NOISY}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield said
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
