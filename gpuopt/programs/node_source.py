"""An ONNX node -> the module, source line and op it was exported from: out of the metadata of torch's dynamo exporter, or the scope path its older one puts into names. Pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuopt.programs.stack_line import line_of

_SCOPES, _CLASSES, _STACK = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.stack_trace"
_LONGEST = 100_000
"""Characters of a metadata text that are read: a file may carry anything."""

_ROOT = re.compile(r"^L\['self'\]\.?")
_CALL = re.compile(r"@\d+")
"""torch.export marks the second call of one module: `layer@1`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSource:
    """Where a node stems from; what the file does not say is None or ""."""

    module: str | None = None
    """As `named_modules` calls it: `encoder.layer.0.attention.self`, "" for the root."""
    module_class: str = ""
    line: str = ""
    """`modeling_bert.py:177`, in the model's own code."""
    op: str = ""
    """`aten.linear.default`."""


def of_node(node: Any) -> NodeSource:
    """The source of a NodeProto."""
    return read(node.name, node.op_type, {p.key: p.value for p in node.metadata_props}, list(node.input))


def read(name: str, op_type: str, metadata: Mapping[str, str], inputs: Sequence[str] = ()) -> NodeSource:
    """The same from its parts. Metadata wins over the name; a name without scopes says nothing."""
    scopes, classes = _strings(metadata.get(_SCOPES, "")), _strings(metadata.get(_CLASSES, ""))
    if not scopes:
        return NodeSource(module=_scope_path(name), line=line_of(metadata.get(_STACK, "")[:_LONGEST]))
    module = _CALL.sub("", _ROOT.sub("", scopes[-2])) if len(scopes) > 1 else ""
    module_class = classes[-2].rpartition(".")[2] if len(classes) == len(scopes) > 1 else ""
    op = classes[-1] if classes else ""
    if "batch_norm" in op and op_type != "BatchNormalization":
        # The exporter's optimiser folds a batch norm into the product before it and keeps the norm's metadata: the weight still names the product's module.
        owner = next((i.rpartition(".")[0] for i in inputs if i.endswith(".weight")), None)
        if owner is not None:
            module, module_class, op = owner, "", ""
    return NodeSource(module=module, module_class=module_class, line=line_of(metadata.get(_STACK, "")[:_LONGEST]), op=op)


def _strings(text: str) -> list[str]:
    """`"['', 'encoder']"` -> its strings; nothing where the text is another thing."""
    if not text.startswith("[") or len(text) > _LONGEST:
        return []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return [str(item) for item in found] if isinstance(found, list) else []


def _scope_path(name: str) -> str | None:
    """`/layer1/layer1.0/conv1/Conv` -> `layer1.0.conv1`: a container that is called repeats its name in front of its children's."""
    if not name.startswith("/"):
        return None
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)
