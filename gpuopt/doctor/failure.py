"""An exception that forward() raised -> which module, which line, which tensors: read from its traceback, whose frames still hold them.

No op is run again as long as the traceback leads into the model, so a GPU whose context is gone can be diagnosed too. A failure without frames (it crossed a process) is provoked again.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuopt.core.errors import GpuoptError
from gpuopt.core.live import Inputs
from gpuopt.doctor import frames

if TYPE_CHECKING:
    import torch
    from torch import nn

_KINDS: tuple[tuple[str, str], ...] = (
    ("memory", r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|Unable to allocate .* for an array|tried to allocate"),
    ("index", r"index out of range in self|device-side assert|index -?\d+ is out of bounds for dimension|index out of bounds|IndexKernel"),
    (
        "dtype",
        r"must have the same dtype|to have the same dtype|expected scalar type|scalar types?:? |mixed dtype|does not match weight dtype"
        r"|dtypes must be the same|expected dtype|dtypes match|not implemented for '\w+'|tensors used as indices must be|expected target dtype|dtype to be equal"
        r"|same dtype|should be the same dtype|Unsupported dtype",
    ),
    (
        "device",
        r"on the same device|not on the expected device|found two different devices|same device type|on the same device as the indexed tensor"
        r"|Expected object of device type|expected device|tensor is on (cpu|cuda)|Cannot copy out of meta tensor",
    ),
    (
        "shape",
        r"shapes cannot be multiplied|[Ss]ize mismatch|must match the size|must match the existing size|expected input\[.*\] to have \d+ channels|invalid for input of size"
        r"|Sizes of tensors must match|normalized_shape=|should contain \d+ elements|Expected size for first two dimensions|input\.size\(-1\) must be equal"
        r"|embedding dimension of|Expected \d+D|must be \d+-?D|Calculated padded input size|same reduction dim|number of dimensions|Dimension out of range"
        r"|don't multiply up|does not broadcast|equal size, but got|size equal to the number of channels|exceeds dimension size|split_sizes|shape of the mask"
        r"|cannot be broadcast|Incompatible dimensions|inconsistent tensor size|input shape|view size is not compatible",
    ),
)
"""(kind, pattern of the message), the first that matches wins. Messages of torch 2.11 to 2.15, CPU, CUDA, meta and fake tensors."""
_DEPTH = 4
"""Assignments followed back."""
_INPUT_TYPES = re.compile(r"Input type \(([\w.:]+)\) and (?:weight|bias) type \(([\w.:]+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A tensor as it was when the op raised."""

    name: str
    """Qualified for what belongs to a module (`encoder.scale`), else as the source calls it."""
    kind: str
    """`input` (of the model), `parameter`, `buffer`, `attribute` (plain, moved by nobody), `made` (by this expression), `value` (made in a forward())."""
    device: str
    dtype: str
    shape: tuple[int, ...]
    made_at: str | None = None
    """`model.py:12`, where a `value` was assigned last."""
    made_by: str | None = None
    """The expression there."""
    made_from: tuple[Seen, ...] = ()
    """Tensors of that expression, as far back as variables still hold them."""

    def cause(self, is_odd: Callable[[Seen], bool]) -> Seen:
        """The tensor that made this one what it is: the first odd one it was made from, and so on; itself where there is none."""
        return next((source.cause(is_odd) for source in self.made_from if source.kind != "made" and is_odd(source)), self)

    @property
    def operand(self) -> str:
        """Its name, as a method can be called on it: `(x * self.scale)`."""
        return self.name if re.fullmatch(r"[\w.]+(\[.*\]|\(.*\))?", self.name) else f"({self.name})"

    @property
    def text(self) -> str:
        """`input x (cpu, float32[2,3])`."""
        words = {"attribute": "plain attribute ", "value": "", "made": ""}.get(self.kind, self.kind + " ")
        what = f"{self.dtype}[{','.join(str(d) for d in self.shape)}]" if self.dtype else ""
        return f"{words}{self.name} ({', '.join(part for part in (self.device, what) if part)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Where forward() broke."""

    module_name: str
    """Qualified; "" is the root."""
    module_class: str
    module: nn.Module | None
    root: nn.Module | None
    line: str | None
    """Deepest line outside torch: the op, or the call of a layer of torch's."""
    user_line: str | None
    """Deepest line outside installed packages: the user's own."""
    code: str
    """Source of the failing expression."""
    tensors: tuple[Seen, ...]
    """Those of the failing expression, else all the module had at hand."""
    values: Mapping[str, torch.Tensor]
    """The same, by Seen.name: reading them on a GPU whose context is gone fails."""
    error: BaseException

    @property
    def where(self) -> str:
        """`encoder.layer.0 (BertLayer)`."""
        return f"{self.module_name or 'the model itself'} ({self.module_class})"

    @property
    def most(self) -> str:
        """What `usual` counted, as the subject of a sentence."""
        has_own = self.root is not None and next(self.root.parameters(), None) is not None
        return "the model's parameters are" if has_own else "most tensors are"

    def usual(self, what: str, *, floats: bool = False) -> str | None:
        """The commonest `device` or `dtype` by bytes: of the model's parameters, of the tensors at hand where it has none."""
        held = list(self.root.parameters()) if self.root is not None else []
        sizes: Counter[str] = Counter()
        for tensor in held or self.values.values():
            if not floats or tensor.is_floating_point():
                sizes[str(getattr(tensor, what)).removeprefix("torch.")] += max(1, tensor.numel() * tensor.element_size())
        return max(sizes, key=lambda name: sizes[name]) if sizes else None


def kind(error: BaseException) -> str | None:
    """`memory`, `index`, `device`, `dtype`, `shape` or `other`; None for what is no failure of a model: gpuopt's own errors, an interrupt."""
    if isinstance(error, GpuoptError) or not isinstance(error, Exception):
        return None
    message = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorOutOfMemoryError"):
        return "memory"
    types = _INPUT_TYPES.search(message)
    if types is not None:
        return "device" if _is_cuda(types[1]) != _is_cuda(types[2]) else "dtype"
    return next((name for name, pattern in _KINDS if re.search(pattern, message)), "other")


def first_line(error: BaseException) -> str:
    """The sentence of a message that says something, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def locate(module: Any, inputs: Inputs | None, error: BaseException) -> Failed | None:
    """The module, line and tensors of a failure; None where neither its traceback nor a second call tells.

    module, inputs: as the user gave them; the failure may have happened to a copy on another device. A second call is made without gradients,
    where the traceback does not reach the model, or on the CPU for an assertion in a CUDA kernel, which is reported long after the op that caused it.
    """
    is_late = "device-side assert" in str(error)
    found = None if is_late else _read(module, error)
    if (
        found is None
        and frames.is_module(module)
        and inputs is not None
        and kind(error) != "memory"
        and (not is_late or _is_all_on_cpu(module, inputs))
    ):
        import torch

        try:
            with torch.no_grad():
                module(*inputs.args, **inputs.kwargs)
        except Exception as again:  # noqa: BLE001 - whatever a model raises is what is asked about
            found = _read(module, again)
    return found if found is not None or not is_late else _read(module, error)


def _read(module: Any, error: BaseException) -> Failed | None:
    chain: BaseException | None = error
    while chain is not None:
        path = frames.places(chain.__traceback__)
        root = _root(module, path)
        if root is not None:
            return _failed(root, path, chain)
        chain = chain.__cause__ or chain.__context__
    return None


def _root(module: Any, path: Sequence[frames.Place]) -> nn.Module | None:
    """The model in the frames: the one given, or the copy of it that ran, or the outermost module there."""
    modules = [place.module for place in path if place.module is not None]
    if any(found is module for found in modules):
        return modules[next(i for i, found in enumerate(modules) if found is module)]
    return next((found for found in modules if type(found) is type(module)), modules[0] if modules else None)


def _failed(root: nn.Module, path: Sequence[frames.Place], error: BaseException) -> Failed:
    names = {id(found): name for name, found in root.named_modules()}
    start = next(i for i, place in enumerate(path) if place.module is root)
    inside = path[start:]
    last = next(place for place in reversed(inside) if id(place.module) in names)
    inner = last.module
    assert inner is not None
    # The op's own frame: a helper function of the model's package may lie below its module's method.
    at = next((p for p in reversed(inside) if not p.is_torchs or (id(p.module) in names and not p.is_call)), last)
    known = dict(_known(root, inside))
    operands = frames.operands(at)
    if not any(named.tensor is not None for named in operands):
        operands = [frames.Named(name, tensor) for name, tensor in (frames.variables(at) | _own(inner)).items()]
    seen: dict[str, Seen] = {}
    values: dict[str, torch.Tensor] = {}
    for named in operands:
        found = _seen(named, known, inside)
        seen.setdefault(found.name, found)
        if named.tensor is not None:
            values.setdefault(found.name, named.tensor)
    tree = frames.expression(at)
    own = [place for place in inside if not place.is_torchs]
    return Failed(
        module_name=names[id(inner)],
        module_class=type(inner).__name__,
        module=inner,
        root=root,
        line=own[-1].line if own else None,
        user_line=next((place.line for place in reversed(own) if not place.is_installed), None),
        code="" if tree is None else _short(tree),
        tensors=tuple(seen.values()),
        values=values,
        error=error,
    )


def _seen(named: frames.Named, known: Mapping[int, tuple[str, str]], path: Sequence[frames.Place], depth: int = 0) -> Seen:
    tensor = named.tensor
    if tensor is None:
        import torch

        return Seen(name=named.text, kind="made", device=str(torch.get_default_device()), dtype="", shape=(), made_by=named.text)
    facts: dict[str, Any] = {"device": str(tensor.device), "dtype": str(tensor.dtype).removeprefix("torch."), "shape": tuple(tensor.shape)}
    if _key(tensor) in known:
        name, what = known[_key(tensor)]
        return Seen(name=name, kind=what, **facts)
    # Made on the way: its first holder outside torch knows where.
    for place in (p for p in path if not p.is_torchs):
        for name, other in frames.variables(place).items():
            if other is tensor:
                made = frames.made_at(place, name.partition("[")[0])
                sources = frames.operands_of(made[1], place.frame) if made and depth < _DEPTH else []
                made_from = tuple(_seen(source, known, path, depth + 1) for source in sources if source.tensor is not tensor)
                return Seen(name=name, kind="value", made_at=made and made[0], made_by=made and made[1], made_from=made_from, **facts)
    passed = _passed(tensor, path)
    if depth or passed is None:
        return Seen(name=named.text, kind="value", **facts)
    caller, words = passed
    made_from = tuple(
        _seen(source, known, path, depth + 1) for source in frames.operands_of(words, caller.frame) if source.tensor is not tensor
    )
    return Seen(name=_cut(words), kind="value", made_at=caller.line, made_by=_cut(words), made_from=made_from, **facts)


def _passed(tensor: torch.Tensor, path: Sequence[frames.Place]) -> tuple[frames.Place, str] | None:
    """The place outside torch that called a layer of torch's with this tensor, and its words for it: no variable holds `x * self.scale` in `self.fc(x * self.scale)`."""
    at = next((i for i in range(len(path) - 1, -1, -1) if not path[i].is_torchs), None)
    call = next((p for p in path[at + 1 :] if p.frame.f_code.co_name == "_call_impl"), None) if at is not None else None
    tree = frames.expression(path[at]) if at is not None and call is not None else None
    if at is None or call is None or not isinstance(tree, ast.Call) or any(isinstance(arg, ast.Starred) for arg in tree.args):
        return None
    given = call.frame.f_locals.get("args", ())
    index = next((i for i, value in enumerate(given) if value is tensor), None)
    return None if index is None or index >= len(tree.args) else (path[at], ast.unparse(tree.args[index]))


def _known(root: nn.Module, path: Sequence[frames.Place]) -> Iterator[tuple[int, tuple[str, str]]]:
    """Storage -> (name, kind) of everything that has a name of its own; later ones win, so inputs come last."""
    for prefix, module in root.named_modules():
        dot = prefix + "." if prefix else ""
        for name, tensor in _own(module).items():
            what = "parameter" if name in module._parameters else "buffer" if name in module._buffers else "attribute"
            yield _key(tensor), (dot + name, what)
    call = next((place for place in path if place.module is root and place.frame.f_code.co_name == "_call_impl"), None)
    if call is not None:
        args, kwargs = call.frame.f_locals.get("args", ()), call.frame.f_locals.get("kwargs", {})
        for name, value in _bound(root, args, kwargs).items():
            for text, tensor in frames.tensors(name, value):
                yield _key(tensor), (text, "input")


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain attributes of one module that are tensors."""
    tables = (module._parameters, module._buffers, {k: v for k, v in vars(module).items() if not k.startswith("_")})
    return {name: tensor for table in tables for key, value in table.items() for name, tensor in frames.tensors(key, value)}


def _bound(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(root.forward).bind_partial(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # called with what forward() does not take, or a signature that cannot be read
        return {**{f"input {i}": value for i, value in enumerate(args)}, **kwargs}


def _key(tensor: torch.Tensor) -> int:
    """What views of one tensor share."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and wrapped tensors have no storage
        return id(tensor)


def _is_all_on_cpu(module: nn.Module, inputs: Inputs) -> bool:
    held = [*module.parameters(), *module.buffers(), *inputs.args, *inputs.kwargs.values()]
    return all(value.device.type == "cpu" for value in held if frames.is_tensor(value))


def _is_cuda(name: str) -> bool:
    return "cuda" in name.lower()


def _short(tree: ast.expr) -> str:
    return _cut(ast.unparse(tree))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


__all__ = ["Failed", "Seen", "first_line", "kind", "locate"]
