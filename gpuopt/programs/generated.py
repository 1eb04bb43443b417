"""Inductor's generated wrapper + the graph it was generated from -> what it launches, in order, each with its modules and lines.

Inductor writes above every launch which nodes of the captured graph it stems from (`Topologically Sorted Source Nodes`), at every level of provenance tracking, so that a plain
compile is enough. Each of those is found again in the post-grad graph, whose nodes know the modules around them and the source line. Python and C++ wrappers are read alike.

Which one module a launch goes to:

- A product, a convolution or an attention, called or generated from a template, goes to the module of that op, whatever is fused around it.
- Any other goes to the lowest module around all of its ops (views and constants left out), so that `x + dense(h)` and its layer norm are their common parent's. But not
  further up than two levels from where its output is made (or read, by the attention it lays its inputs out for), and to the root only where the root's own forward has an
  op in it: the sum of one layer fused with the norm of the next is the norm's, whose output it makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuopt.core.launches import Launch, LaunchKind, common
from gpuopt.programs.stack_line import line_of

_MARK = "Source Nodes: ["
_SOURCES = re.compile(r"^\s*(?:#|//)\s*(?:Topologically Sorted|Unsorted) Source Nodes: \[(?P<nodes>.*?)\], Original ATen: \[(?P<ops>.*)\]")
_LAUNCHES: tuple[tuple[LaunchKind, re.Pattern[str]], ...] = (
    ("triton", re.compile(r"(?<![\w.])(?P<name>\w+)\.run\(")),
    ("triton", re.compile(r"(?<![\w.:])call_(?P<name>\w+)\(")),
    ("extern", re.compile(r"(?P<name>(?<![\w.])extern_kernels\.\w+)\(")),
    ("extern", re.compile(r"(?<![\w.])torch\.ops\.(?P<name>\w+\.\w+)(?:\.\w+)?\(")),
    ("extern", re.compile(r"(?<![\w.])(?P<name>aten\.\w+)(?:\.\w+)?\(")),
    ("extern", re.compile(r"\baoti_torch_(?:cuda|cpu|xpu|mps)_(?P<name>\w+)\(")),
)
"""What a line of a wrapper launches, Python's and C++'s."""

_FUNCTION = re.compile(r"^(?P<indent>\s*)def (?P<name>call|partition_\d+)\(")
_PARTITION = re.compile(r"(?<!def )\b(?:self\.partitions\[(?P<number>\d+)\]|partition_(?P<named>\d+))\(")
_RUN = re.compile(r"::run_impl\(|inductor_entry_impl\(")
_KERNEL_NAME = re.compile(r"^(\w+) = async_compile\.triton\(\s*'(\w+)'", re.MULTILINE)
_OUT = re.compile(r"_out$")
_GETATTR = re.compile(r"getattr\(([^()]+), ['\"](\w+)['\"]\)")
_SCOPE = re.compile(r"^[LG]\['[^']+'\]")
_SUBSCRIPT = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")

_VIEWS = frozenset(
    "view reshape permute transpose t expand unsqueeze squeeze slice select split split_with_sizes alias detach as_strided _unsafe_view getitem unbind diagonal "
    "full empty scalar_tensor lift_fresh_copy".split()
)
"""Ops that compute nothing: they tell whose tensor a kernel reads, not whose work it does."""

_GROUPS = {
    **dict.fromkeys(
        "mm addmm bmm baddbmm matmul linear _scaled_mm _int_mm mv addmv _linear_pointwise _mkl_linear bias_addmm _grouped_mm _weight_int4pack_mm".split(),
        "product",
    ),
    **dict.fromkeys(
        "convolution _convolution cudnn_convolution _convolution_pointwise conv1d conv2d conv3d conv_transpose2d".split(), "convolution"
    ),
}
_HEAVY = ("product", "convolution", "attention")
_REACH = 2
"""Levels between the module that makes a kernel's output and the one its time goes to, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of a post-grad graph, as far as its origin goes."""

    name: str
    op: str
    """`aten.addmm`."""
    source: str
    """The node of the captured graph it stems from, as the wrapper's comments spell it."""
    stack: tuple[tuple[str, str], ...]
    """(path, class name) of the modules around it, outermost first; the root may be missing."""
    line: str
    """`model.py:12`, innermost outside torch; "" where no source is known."""
    inputs: tuple[str, ...] = ()
    origin: str = ""
    """The op the model called, before it was decomposed: `aten.gelu`; "" where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One graph and the wrapper it became."""

    code: str
    nodes: tuple[Node, ...]


def nodes_of(graph: Any) -> tuple[Node, ...]:
    """Of a torch.fx.Graph, in its order."""
    found = []
    lines: dict[str, str] = {}  # an op that was decomposed leaves many nodes with one long stack
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        trace = node.meta.get("stack_trace") or ""
        if trace not in lines:
            lines[trace] = line_of(trace)
        origins = node.meta.get("from_node") or ()
        stack = (node.meta.get("nn_module_stack") or {}).values()
        found.append(
            Node(
                name=node.name,
                op=op_name(node.target),
                source=str(origins[0].name) if origins else node.name,
                stack=tuple((qualified(str(path)), class_name(kind)) for path, kind in stack),
                line=lines[trace],
                inputs=tuple(n.name for n in node.all_input_nodes),
                origin=op_name(node.meta["original_aten"]) if node.meta.get("original_aten") is not None else "",
            )
        )
    return tuple(found)


def op_name(target: Any) -> str:
    """`aten.addmm.default` -> `aten.addmm`; a Python function's own name."""
    text = str(target)
    parts = text.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and " " not in text else getattr(target, "__name__", text)


def qualified(path: str) -> str:
    """`L['self'].encoder.layer[0]` -> `encoder.layer.0`: as named_modules spells it."""
    while (plain := _GETATTR.sub(r"\1.\2", path)) != path:
        path = plain
    return _SUBSCRIPT.sub(r".\1", _SCOPE.sub("", path).replace("._modules", "")).strip(".")


def class_name(kind: Any) -> str:
    """Of a class, `<class 'torch.nn.Linear'>` or `torch.nn.Linear`: `Linear`."""
    return str(kind).rstrip("'>").rpartition(".")[2].rpartition("'")[2]


def launches(graphs: Iterable[Generated], classes: Mapping[str, str] | None = None) -> tuple[Launch, ...]:
    """Of all graphs, in the order they were compiled, which is that of their first run.

    classes: qualified name -> class name of the module that was compiled. Behind a graph break Dynamo may compile a submodule by itself, whose paths begin at it: they are
        resolved where only one place of the model fits, and a launch whose place is open has no modules. None takes the paths as they are.
    """
    found: list[Launch] = []
    for graph in graphs:
        prefix = _prefix(graph.nodes, classes)
        places = _Places(graph.nodes, prefix, classes)
        found += [places.launch(call) for call in calls(graph.code)]
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A launch as the wrapper writes it."""

    name: str
    kind: LaunchKind
    sources: tuple[str, ...]
    ops: tuple[str, ...]


def calls(code: str) -> list[Call]:
    """Launches of a wrapper in the order it makes them, partitions of a CUDA-graph tree where they are called."""
    names = dict(_KERNEL_NAME.findall(code))
    functions: dict[str, list[Call | str]] = {}
    for name, line in _lines(code):
        body = functions.setdefault(name, [])
        if isinstance(line, Call):
            body.append(Call(name=names.get(line.name, line.name), kind=line.kind, sources=line.sources, ops=line.ops))
        else:
            body.append(line)

    def unrolled(name: str) -> Iterator[Call]:
        for item in functions.get(name, ()):
            if isinstance(item, Call):
                yield item
            else:
                yield from unrolled(item)

    return list(unrolled("call"))


def _lines(code: str) -> Iterator[tuple[str, Call | str]]:
    """(function, launch or the partition it calls) of every line that does either."""
    function, indent = "", 0
    pending: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    for line in code.splitlines():
        if (begun := _FUNCTION.match(line)) is not None:
            function, indent, pending = begun["name"], len(begun["indent"]), None
            continue
        if _RUN.search(line):
            function, indent, pending = "call", -1, None
            continue
        if not function or not line.strip():
            continue
        if len(line) - len(line.lstrip()) <= indent or (indent < 0 and line.startswith("}")):
            function, pending = "", None
            continue
        if _MARK in line and (said := _SOURCES.match(line)) is not None:
            pending = tuple(said["nodes"].split(", ")), tuple(filter(None, said["ops"].split(", ")))
            continue
        if line.lstrip().startswith(("#", "//")):
            continue
        if (part := _PARTITION.search(line)) is not None:
            yield function, f"partition_{part['number'] or part['named']}"
            continue
        for kind, pattern in _LAUNCHES:
            if (made := pattern.search(line)) is not None and (pending is not None or kind == "triton"):
                sources, ops = pending or ((), ())
                yield (
                    function,
                    Call(
                        name=_OUT.sub("", made["name"]) if "aoti_torch_" in made[0] else made["name"], kind=kind, sources=sources, ops=ops
                    ),
                )
                pending = None
                break


def _prefix(nodes: Sequence[Node], classes: Mapping[str, str] | None) -> str | None:
    """What stands before the graph's paths in the model; None where several places fit, or none."""
    seen = {entry for node in nodes for entry in node.stack if entry[0]}
    if classes is None or not seen:
        return ""
    if sum(classes.get(path) == kind for path, kind in seen) * 2 >= len(seen):
        return ""
    fitting = [root for root in classes if root and all(classes.get(f"{root}.{path}") == kind for path, kind in seen)]
    return fitting[0] if len(fitting) == 1 else None


class _Places:
    """Where a graph's nodes lie in the model."""

    def __init__(self, nodes: Sequence[Node], prefix: str | None, classes: Mapping[str, str] | None) -> None:
        self._by_source: dict[str, list[Node]] = {}
        self._order = {node.name: at for at, node in enumerate(nodes)}
        self._module: dict[str, str] = {}
        self._called = {""}
        """Modules whose forward runs; a ModuleList's never does."""
        for node in nodes:
            self._by_source.setdefault(node.source, []).append(node)
            if prefix is None or not (node.stack or node.line):
                continue  # the compiler's own
            path = node.stack[-1][0] if node.stack else ""
            path = ".".join(filter(None, (prefix, path)))
            while classes is not None and path and path not in classes:
                path = path.rpartition(".")[0]
            self._module[node.name] = path
            self._called |= {".".join(filter(None, (prefix, entry))) for entry, _ in node.stack}

    def launch(self, call: Call) -> Launch:
        nodes = sorted(
            {n.name: n for source in call.sources for n in self._by_source.get(source, ())}.values(), key=lambda n: self._order[n.name]
        )
        # One node of the captured graph becomes several, of which a kernel may hold but one: a product's bias without the product.
        nodes = [n for n in nodes if n.name in self._module and (not n.origin or n.origin in call.ops)]
        heavy = self._heavy(call, nodes)
        # A pointwise kernel that names an attention writes what that reads (a mask, a copy in another layout): it does not compute it.
        fed = [] if heavy else [n for n in nodes if _group(n.op.rpartition(".")[2]) in _HEAVY]
        working = heavy or [n for n in nodes if n.op.rpartition(".")[2] not in _VIEWS and n not in fed] or nodes
        home = common(tuple(self._module[n.name] for n in heavy)) if heavy else self._home(working, fed)
        return Launch(
            name=call.name,
            kind=call.kind,
            modules=tuple(dict.fromkeys(self._module[n.name] for n in working)),
            lines=self._lines(working, home),
            ops=self._ops(call, heavy),
            home=home,
        )

    @staticmethod
    def _ops(call: Call, heavy: Sequence[Node]) -> tuple[str, ...]:
        """What it computes of the ops its comment names."""
        if call.kind == "extern":
            return tuple(n.origin or n.op for n in heavy) or call.ops
        working = [op for op in call.ops if op.rpartition(".")[2] not in _VIEWS and (heavy or _group(op.rpartition(".")[2]) not in _HEAVY)]
        return tuple(working) or call.ops

    def _lines(self, nodes: Sequence[Node], home: str | None) -> tuple[str, ...]:
        """Of the home's own ops last, each once."""
        own = {n.name for n in nodes if home is not None and f"{self._module[n.name]}.".startswith(f"{home}." if home else "")}
        told = [n.line for n in sorted(nodes, key=lambda n: n.name in own) if n.line]
        return tuple(reversed(dict.fromkeys(reversed(told))))

    @staticmethod
    def _heavy(call: Call, nodes: Sequence[Node]) -> list[Node]:
        """The products a launch computes: the last ones of its group, for what it reads may come from others."""
        if call.kind == "triton" and not call.name.startswith(("triton_tem_", "triton_mm")):
            return []
        own = call.name.rpartition(".")[2]
        exact = [n for n in nodes if n.op.rpartition(".")[2] == own]
        if exact:
            return exact[-1:]
        group = _group(own)
        wanted = (group,) if group in _HEAVY else _HEAVY
        return [n for n in nodes if _group(n.op.rpartition(".")[2]) in wanted][-1:]

    def _home(self, nodes: Sequence[Node], fed: Sequence[Node]) -> str | None:
        if not nodes:
            return None
        owners = {self._module[n.name] for n in nodes}
        read = {name for n in nodes for name in n.inputs}
        makers = fed or [n for n in nodes if n.name not in read] or nodes[-1:]
        last = self._ran(common(tuple(self._module[n.name] for n in makers)))
        around = self._ran(common(tuple(owners)))
        near = _depth(last) - _depth(around) <= _REACH
        return around if near and (around or "" in owners) else last

    def _ran(self, module: str) -> str:
        """The lowest module from here up that has a forward of its own."""
        while module not in self._called:
            module = module.rpartition(".")[0]
        return module


def _group(op: str) -> str:
    return "attention" if "attention" in op else _GROUPS.get(op, op)


def _depth(module: str) -> int:
    return module.count(".") + 1 if module else 0
