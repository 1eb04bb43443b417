"""nn.Module -> what rules ask of it: its tensors with their owners, source lines, the dtype it runs in, which layer feeds which batch norm. Nothing is run, nothing is changed.

torch is imported inside the few functions that need it: the table of rules must load without it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpuopt.core.spec import Precision
from gpuopt.doctor.evidence import Evidence

FLOATS = ("float64", "float32", "bfloat16", "float16")
HALVES = ("float16", "bfloat16")
EAGER = ("eager", "cudagraphs")
"""Backends that run the module's own ops; the others rewrite layouts, fold and fuse by themselves."""

_DEPTH = 2
"""Levels of plain lists and dicts looked into for tensors: `self.tables = {"a": [t, t]}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor and where it hangs."""

    owner: str
    """Qualified name of the module; "" is the root."""
    attribute: str
    kind: str
    """`parameter`, `buffer`, `plain` (a bare attribute, or inside a plain list or dict) or `unregistered` (a parameter of a module in a plain list)."""
    tensor: Any

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


def parts(root: Any) -> dict[str, Any]:
    """Qualified name -> module, the root under ""; empty for what is no module."""
    return dict(root.named_modules()) if hasattr(root, "named_modules") else {}


def tensors(root: Any) -> Iterator[Held]:
    """Parameters, buffers and plain attributes, each tensor once; lazy parameters, which have no shape yet, are left out."""
    seen: set[int] = set()
    found = parts(root)
    registered = {id(part) for part in found.values()}
    for name, part in found.items():
        for kind, own in (("parameter", part.named_parameters(recurse=False)), ("buffer", part.named_buffers(recurse=False))):
            for attribute, tensor in own:
                if id(tensor) not in seen and not is_lazy(tensor):
                    seen.add(id(tensor))
                    yield Held(owner=name, attribute=attribute, kind=kind, tensor=tensor)
    for name, part in found.items():
        for attribute, value in list(vars(part).items()):
            if attribute in _OWN_DICTS:
                continue
            for kind, tensor in _plain(value, registered, _DEPTH):
                if id(tensor) not in seen and not is_lazy(tensor):
                    seen.add(id(tensor))
                    yield Held(owner=name, attribute=attribute, kind=kind, tensor=tensor)


def given(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor) of nested arguments or outputs; dataclasses of outputs (transformers) are mappings."""
    if is_tensor(value):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from given(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from given(item, f"{name or 'output'}[{index}]")


def inputs(evidence: Evidence) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of one call's inputs; positional ones by their specs where there are some."""
    if evidence.inputs is None:
        return
    specs = evidence.inputs.specs
    for index, value in enumerate(evidence.inputs.args):
        spec = specs[index].name if index < len(specs) else ""
        yield from given(value, spec or f"argument {index}")
    for key, value in evidence.inputs.kwargs.items():
        yield from given(value, key)


def is_tensor(value: Any) -> bool:
    """By its attributes: a strided tensor, a fake or a meta one."""
    return hasattr(value, "dtype") and hasattr(value, "device") and hasattr(value, "numel")


def dtype(tensor: Any) -> str:
    """`float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def is_a(part: Any, *names: str) -> bool:
    """Whether it is an instance of one of torch's classes, by name: `Conv2d`, `_BatchNorm`. Subclasses count, namesakes elsewhere do not."""
    return any(cls.__name__ in names and cls.__module__.startswith("torch.") for cls in type(part).__mro__)


def is_norm(part: Any) -> bool:
    """A normalisation of any library: they are kept in fp32 on purpose."""
    return any("norm" in cls.__name__.lower() for cls in type(part).__mro__ if cls.__name__ != "Module")


def own_dtype(root: Any) -> str | None:
    """Floating dtype of most parameters by elements; None where there are none."""
    sizes: dict[str, int] = {}
    for held in tensors(root):
        if held.kind == "parameter" and dtype(held.tensor) in FLOATS:
            sizes[dtype(held.tensor)] = sizes.get(dtype(held.tensor), 0) + held.tensor.numel()
    return max(sizes, key=lambda d: sizes[d]) if sizes else None


def running(evidence: Evidence, stored: str) -> str:
    """The dtype a tensor stored as `stored` computes in, after the cast the candidate asked for: of what is quantised, between its products."""
    asked = evidence.precision
    if stored not in FLOATS or asked is None or asked not in {p.value for p in Precision}:
        return stored
    return Precision(asked).carrier.dtype


def line(root: Any, name: str) -> str | None:
    """`modeling_bert.py:123`: the forward of this module, or of the nearest one around it that is not torch's own."""
    found = parts(root)
    while True:
        part = found.get(name)
        if part is not None and not type(part).__module__.startswith("torch."):
            cls: Any = type(part)
            return _forward_line(cls)
        if not name:
            return None
        name = name.rpartition(".")[0]


def is_channels_last(evidence: Evidence) -> bool:
    """Whether convolutions run on NHWC tensors: asked for, laid out so by the user, or done by a compiler. 1x1 and depthwise weights are both layouts and say nothing."""
    if "channels_last" in evidence.transforms or evidence.backend not in EAGER:
        return True
    import torch

    for part in parts(evidence.module).values():
        if is_a(part, "Conv2d", "ConvTranspose2d") and not is_lazy(part.weight) and not part.weight.is_contiguous():
            return bool(part.weight.is_contiguous(memory_format=torch.channels_last))
    return False


def common(names: Iterable[str]) -> str:
    """Qualified name of the nearest module around all of these: `layers` for `layers.0.fc` and `layers.1.fc`."""
    shared, *others = [list(around(name)) for name in names]
    return next(name for name in shared if all(name in other for other in others))


def around(name: str) -> Iterator[str]:
    """The name and those of the modules around it, innermost first, down to ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


# -- which layer feeds which batch norm -------------------------------------------------------------------------------------------


def norm_pairs(root: Any) -> list[tuple[str, str]]:
    """(layer, batch norm) where the batch norm is the only reader of a convolution's or linear layer's output, both called once; in eval mode only.

    Seen in each holder's own forward, traced by FX one level deep on a shallow copy. Of a forward that cannot be traced, only a holder of one layer and one batch norm,
    registered in this order, is taken for a pair.
    """
    found = parts(root)
    uses: dict[int, int] = {}
    for _, part in root.named_modules(remove_duplicate=False):
        uses[id(part)] = uses.get(id(part), 0) + 1
    pairs = []
    known: dict[Any, list[tuple[str, str]]] = {}
    for name, holder in found.items():
        children = list(holder.children())
        if any(is_a(child, "_BatchNorm") for child in children) and any(is_a(child, *_LAYERS) for child in children):
            alike = _likeness(holder)
            if alike not in known:
                traced = _traced_pairs(holder)
                known[alike] = _lone_pair(holder) if traced is None else traced
            for layer, norm in known[alike]:
                both = (holder.get_submodule(layer), holder.get_submodule(norm))
                if all(uses[id(part)] == 1 for part in both) and _fits(*both):
                    prefix = f"{name}." if name else ""
                    pairs.append((prefix + layer, prefix + norm))
    return pairs


_LAYERS = ("_ConvNd", "Linear")


def _likeness(holder: Any) -> Any:
    """Equal for holders whose forward takes the same way: class, children, and plain attributes it may branch on."""
    plain = {k: v for k, v in vars(holder).items() if isinstance(v, bool | int | float | str | None)}
    return type(holder), tuple((name, type(child)) for name, child in holder.named_children()), tuple(sorted(plain.items(), key=repr))


def _lone_pair(holder: Any) -> list[tuple[str, str]]:
    named = list(holder.named_children())
    layers = [i for i, (_, child) in enumerate(named) if is_a(child, *_LAYERS)]
    norms = [i for i, (_, child) in enumerate(named) if is_a(child, "_BatchNorm")]
    return [(named[layers[0]][0], named[norms[0]][0])] if len(layers) == len(norms) == 1 and norms[0] == layers[0] + 1 else []


def _traced_pairs(holder: Any) -> list[tuple[str, str]] | None:
    from torch import fx

    class OneLevel(fx.Tracer):
        """Traces a module's own forward; what it calls stays a single node."""

        def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
            return True

    twin = copy.copy(holder)
    # A forward may store what it computed: into the copy, not into the user's model.
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(holder.__dict__[table])
    try:
        graph = OneLevel().trace(twin)
    # The module's own code runs on symbols and may raise anything at all: nothing is known of it then.
    except Exception:  # noqa: BLE001
        return None
    pairs = []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    names = [str(node.target) for node in calls]
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer, norm = str(source.target), str(node.target)
        if names.count(layer) == names.count(norm) == 1 and is_a(holder.get_submodule(norm), "_BatchNorm"):
            pairs.append((layer, norm))
    return pairs


def _fits(layer: Any, norm: Any) -> bool:
    """Whether folding is exact: plain classes, statistics there, nothing hooked on."""
    if not type(layer).__module__.startswith("torch.nn.modules.") or not is_a(layer, *_LAYERS):
        return False
    if norm.training or norm.running_mean is None or any(part._forward_hooks or part._forward_pre_hooks for part in (layer, norm)):
        return False
    if getattr(layer, "transposed", False) and layer.groups != 1:
        return False
    return bool(norm.num_features == (layer.out_features if is_a(layer, "Linear") else layer.out_channels))


# -- inside ------------------------------------------------------------------------------------------------------------------------

_OWN_DICTS = frozenset(
    {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_flat_weights", "_flat_weight_refs", "_is_full_backward_hook"}
)


def _plain(value: Any, registered: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if is_tensor(value):
        yield "plain", value
    elif hasattr(value, "named_parameters") and hasattr(value, "_modules"):
        # A module in a plain list: `.to()` does not see it. One that is registered elsewhere too is only referred to.
        if id(value) not in registered:
            yield from (("unregistered", p) for _, p in value.named_parameters())
    elif depth and isinstance(value, dict):
        for item in list(value.values()):
            yield from _plain(item, registered, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from _plain(item, registered, depth - 1)


def is_lazy(tensor: Any) -> bool:
    return "Uninitialized" in type(tensor).__name__


@lru_cache(maxsize=1024)
def _forward_line(cls: Any) -> str | None:
    try:
        forward = inspect.unwrap(cls.forward)
        file = inspect.getsourcefile(forward)
        return f"{Path(file).name}:{forward.__code__.co_firstlineno}" if file else None
    except (AttributeError, TypeError, ValueError, OSError):
        return None
