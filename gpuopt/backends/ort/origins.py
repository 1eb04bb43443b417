"""The exported graph + the graph ONNX Runtime made of it -> which nodes of the file, and so which modules and lines, each node that ran stems from. Pure.

Tensors keep their names through every rewriting that keeps the tensor, so what lies in the file between the inputs and the output of a node that ran is what was fused into it.
Its own rewritings name their nodes after one they began with (`node_MatMul_52/MatMulAddFusion`, `fused node_Conv_3`, `relu_nchwc` after a tensor): that one is the first choice for
the work's owner, and all there is where the optimised graph is not known. Layout changes that no source node asked for belong to the node they were made for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpuopt.backends.ort.flops import CONVOLUTIONS, PRODUCTS, UNCOUNTED
from gpuopt.backends.ort.profile import NodeRun, Shape
from gpuopt.backends.ort.session import ELEMENT_TYPE
from gpuopt.core.accepts import dtype_name
from gpuopt.programs import node_source
from gpuopt.programs.node_source import NodeSource

_WORK = PRODUCTS | CONVOLUTIONS | UNCOUNTED
_LAYOUT = frozenset(
    "Reshape Transpose Cast Squeeze Unsqueeze Identity ReorderInput ReorderOutput MemcpyFromHost MemcpyToHost Flatten".split()
)
"""What ONNX Runtime puts in front of and behind a node to suit its kernel."""
_MOST_FUSED = 256
"""Source nodes of one that ran; a walk beyond has left the fusion."""
_FARTHEST = 6
_DTYPES = {number: dtype_name(dtype) for dtype, number in ELEMENT_TYPE.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a node that ran stems from."""

    module: str | None = None
    """Of the node that does the work; None: unknown."""
    module_class: str = ""
    line: str = ""
    modules: tuple[str, ...] = ()
    """Of everything fused in it, in the order of the file."""
    lines: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    """ONNX operators of the file, in its order."""
    nodes: tuple[str, ...] = ()
    """Their names."""


class Origins:
    """The lookup, for one file and one session's graph of it."""

    def __init__(self, source: Sequence[Any], optimised: Any = None) -> None:
        """`source`: NodeProtos of the file, see `nodes_of`. `optimised`: the ModelProto that ran, or None."""
        self._source = list(source)
        self._place = {id(node): at for at, node in enumerate(self._source)}
        self._producers = {output: node for node in self._source for output in node.output if output}
        self._named: dict[str, Any] = {}
        for node in self._source:
            if node.name:
                self._named.setdefault(node.name, node)
        ran = list(nodes_of(optimised)) if optimised is not None else []
        self._ran: dict[str, Any] = {}
        for node in ran:
            if node.name:
                self._ran.setdefault(node.name, node)
        self._tensors = {name for node in ran for name in (*node.output, *node.input) if name}
        self._consumers: dict[str, list[Any]] = {}
        self._made = {output: node for node in ran for output in node.output if output}
        for node in ran:
            for name in node.input:
                if name:
                    self._consumers.setdefault(name, []).append(node)
        self._weights: dict[str, tuple[str, Shape]] = {}
        if optimised is not None:
            self._weights = {t.name: (_DTYPES.get(t.data_type, "?"), tuple(t.dims)) for t in optimised.graph.initializer}
        self._known: dict[str, Origin] = {}
        self._sources: dict[int, NodeSource] = {}
        self._has_modules = any(node_source.of_node(node).module for node in self._source)

    def of(self, name: str) -> Origin:
        """The origin of the node that ran under this name."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = self._find(name)
        return found

    def filled(self, run: NodeRun) -> NodeRun:
        """The same run with the weights its kernel has packed away among its inputs again."""
        node = self._ran.get(run.name)
        if node is None or node.op_type != run.op:
            return run
        shown = list(run.inputs)
        found: list[tuple[str, Shape]] = []
        for name in node.input:
            weight = self._weights.get(name)
            if weight is None:
                if name and shown:
                    found.append(shown.pop(0))
            elif shown and shown[0][1] == weight[1]:
                found.append(shown.pop(0))
            else:
                found.append(weight)
        return replace(run, inputs=(*found, *shown))

    def _find(self, name: str) -> Origin:
        begun = self._begun_with(name)
        ran = self._ran.get(name)
        target = next((o for o in ran.output if o in self._producers), None) if ran is not None else None
        if target is None and begun is None and ran is not None:
            target = self._served(ran)
        if target is None and ran is not None and ran.op_type not in _LAYOUT:
            target = self._behind(ran)
        covered = self._cover(target) if target is not None else []
        if begun is not None and begun not in covered:
            covered = sorted([*covered, begun], key=lambda n: self._place[id(n)])
        return self._origin(covered, begun)

    def _begun_with(self, name: str) -> Any:
        """The source node that a name says it was made from; None where ONNX Runtime's rules do not make that sure."""
        if name in self._named:
            return self._named[name]
        plain = re.sub(r"_token_\d+$", "", name.removeprefix("fused "))
        if plain.endswith("_nchwc"):
            made = self._producers.get(plain.removesuffix("_nchwc"))
            return self._back_to_work(made) if made is not None else self._named.get(plain.removesuffix("_nchwc"))
        plain = plain.removesuffix("_new_reshape")
        while plain:
            if plain in self._named:
                return self._named[plain]
            plain = plain.rpartition("/")[0]
        return None

    def _back_to_work(self, node: Any) -> Any:
        """A blocked convolution is named after its last tensor, an activation's or a sum's: the convolution is behind it."""
        return next((n for n in reversed(self._cover(node.output[0])) if n.op_type in _WORK), node)

    def _behind(self, ran: Any) -> str | None:
        """The source tensor that a node's output becomes after the layout changes behind it."""
        at = ran
        for _ in range(_FARTHEST):
            after = [n for output in at.output for n in self._consumers.get(output, ())]
            at = next((n for n in after if n.op_type in _LAYOUT), None)
            if at is None:
                return None
            found: str | None = next((o for o in at.output if o in self._producers), None)
            if found is not None:
                return found
        return None

    def _served(self, ran: Any) -> str | None:
        """The source tensor of the node that an inserted layout change was made for: what it feeds, else what feeds it."""
        if ran.op_type not in _LAYOUT:
            return None
        edge = [ran]
        for _ in range(_FARTHEST):
            edge = [n for node in edge for output in node.output for n in self._consumers.get(output, ())][:8]
            for node in edge:
                found: str | None = next((o for o in node.output if o in self._producers), None)
                begun = self._begun_with(node.name) if found is None else None
                if begun is not None:
                    found = next((o for o in begun.output if o), None)
                if found is not None:
                    return found
        return next((name for name in ran.input if name in self._producers), None)

    def _cover(self, target: str) -> list[Any]:
        """Source nodes between this tensor and the tensors that still exist in the graph that ran, in the file's order."""
        found: dict[int, Any] = {}
        edge = [target]
        while edge and len(found) < _MOST_FUSED:
            node = self._producers.get(edge.pop())
            if node is None or id(node) in found:
                continue
            found[id(node)] = node
            edge += [name for name in node.input if name and self._ran and name not in self._tensors]
        return [found[key] for key in sorted(found, key=lambda k: self._place[k])]

    def _origin(self, covered: list[Any], begun: Any) -> Origin:
        if not covered:
            return Origin()
        work = [n for n in covered if n.op_type in _WORK]
        owner = begun if begun is not None and (begun.op_type in _WORK or not work) else work[-1] if work else covered[-1]
        sources = [self._source_of(n) for n in covered]
        own = self._source_of(owner)
        return Origin(
            module=own.module,
            module_class=own.module_class,
            line=own.line,
            modules=tuple(dict.fromkeys(s.module for s in sources if s.module is not None)),
            lines=tuple(dict.fromkeys(s.line for s in sources if s.line)),
            ops=tuple(n.op_type for n in covered),
            nodes=tuple(n.name for n in covered),
        )

    def _source_of(self, node: Any) -> NodeSource:
        """What the file says; in one that names no modules each node is its own, as in the count of an ONNX file."""
        found = self._sources.get(id(node))
        if found is None:
            found = node_source.of_node(node)
            if not self._has_modules:
                found = replace(found, module=node.name or None, module_class=node.op_type)
            self._sources[id(node)] = found
        return found


def nodes_of(model: Any) -> Iterator[Any]:
    """Every NodeProto of a ModelProto, in order, what runs inside another one behind it."""
    edge = [model.graph]
    while edge:
        graph = edge.pop()
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                edge += [g for g in (attribute.g, *attribute.graphs) if g.node]


def weight_bytes(model: Any) -> int:
    """Bytes of a ModelProto's weights, wherever they lie; 4-byte elements where the type is none that crosses the border."""
    sizes = {number: dtype.itemsize for dtype, number in ELEMENT_TYPE.items()}
    return sum(math.prod(t.dims) * sizes.get(t.data_type, 4) for t in model.graph.initializer)
