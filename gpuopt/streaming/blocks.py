"""A module -> the modules that move as one: members of its lists, or its larger children, in rings."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

SMALL_BYTES = 1024**2
"""Parameters below stay on the device: norms and biases. A model under 1 GiB has its 1024th instead, or its smaller blocks would have nothing to move."""

SAME_SIZE = 2.0
"""The largest over the smallest member of a list whose members are taken as one kind of block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A module whose own forward is the only one to read its weights."""

    name: str
    module: nn.Module
    ring: str
    stays: str = ""
    """Why its weights stay on the device in spite of that."""


class Tree:
    """A module's weights by subtree: what a block is depends on what holds most of them."""

    def __init__(self, root: nn.Module, small_bytes: int | None = None) -> None:
        """`small_bytes`: see `SMALL_BYTES`."""
        self.root = root
        self._bytes: dict[int, int] = {}
        whole = sum(p.numel() * p.element_size() for p in root.parameters() if not is_lazy(p))
        self.small_bytes = min(SMALL_BYTES, max(1, whole // 1024)) if small_bytes is None else small_bytes
        self.embeddings = {id(m.weight): tuple(m.weight.shape) for m in root.modules() if isinstance(m, nn.Embedding)}
        self.table_shapes = set(self.embeddings.values())

    def weight(self, module: nn.Module) -> int:
        """Bytes of the parameters below, each once, without embeddings and what has their shape: a head as large as a vocabulary is no block."""
        known = self._bytes.get(id(module))
        if known is None:
            known = self._bytes[id(module)] = sum(
                p.numel() * p.element_size() for p in module.parameters() if not is_lazy(p) and tuple(p.shape) not in self.table_shapes
            )
        return known

    def heavy(self, module: nn.Module) -> dict[str, nn.Module]:
        """Children worth moving, name -> module; one that stands in several places, at its first."""
        seen: set[int] = set()
        kept: dict[str, nn.Module] = {}
        for key, child in module._modules.items():
            if (
                child is not None
                and id(child) not in seen
                and self.weight(child) >= self.small_bytes
                and not isinstance(child, nn.Embedding)
            ):
                seen.add(id(child))
                kept[key] = child
        return kept


def found(tree: Tree, granularity: str) -> list[Block]:
    """The blocks, in the order of registration. Empty for a model of a single block."""
    blocks = list(_of_lists(tree))
    if not blocks or 2 * sum(tree.weight(b.module) for b in blocks) < tree.weight(tree.root):
        blocks = list(_of_children(tree, tree.root, ""))
    if granularity == "sub":
        blocks = [part for block in blocks for part in _parts(tree, block)]
    return _once(blocks)


def _once(blocks: list[Block]) -> list[Block]:
    """A module in several places is called several times a forward: in turn with the others it would be fetched each time."""
    places = Counter(id(block.module) for block in blocks)
    within = {id(part) for block in blocks for part in block.module.modules() if part is not block.module}
    kept: dict[int, Block] = {}
    for block in blocks:
        if id(block.module) in within:
            continue  # reached by another name, from within a block: it moves with that
        count = places[id(block.module)]
        stays = block.stays or (f"one block in {count} places, called again and again" if count > 1 else "")
        kept.setdefault(id(block.module), replace(block, stays=stays))
    return list(kept.values())


def _of_lists(tree: Tree) -> Iterator[Block]:
    """Members of the outermost lists. Lists side by side in one module follow each other, so they are one ring; an encoder's and a decoder's are not."""
    gathered: list[tuple[tuple[str, str], str, list[Block]]] = []
    walked: set[int] = set()

    def walk(module: nn.Module, path: str, parent: str) -> None:
        if id(module) in walked:
            return  # another name of the same
        walked.add(id(module))
        members = list(_members(tree, module, path)) if _is_list(module) else []
        if members:
            last = path.rpartition(".")[2]
            side = next((word for word in ("encoder", "decoder") if word in last), "")
            gathered.append(((parent, side), path, members))
            return
        for key, child in module._modules.items():
            if child is not None and not isinstance(child, torch.jit.ScriptModule):
                walk(child, _joined(path, key), path)

    walk(tree.root, "", "")
    rings: dict[tuple[str, str], list[str]] = {}
    for key, path, _ in gathered:
        rings.setdefault(key, []).append(path)
    for key, _, members in gathered:
        paths = rings[key]
        name = paths[0] if len(paths) == 1 else _joined(key[0], "+".join(p.rpartition(".")[2] for p in paths))
        yield from (replace(block, ring=name or "root") for block in members)


def _members(tree: Tree, module: nn.Module, path: str) -> Iterator[Block]:
    """A list's blocks: its members, or, where these are lists or of very different sizes, the members of the one list in each."""
    heavy = tree.heavy(module)
    if len(heavy) < 2 or path.rpartition(".")[2] == "experts":  # experts are called as a router says, not in turn
        if len(heavy) == 1 and len(module._modules) > 1 and len({id(m) for m in module._modules.values()}) == 1:
            again = next(iter(heavy.values()))  # one block, registered over and over: no list of blocks, but not to be moved either
            yield from (Block(name=_joined(path, key), module=again, ring=path) for key in module._modules)
        return
    rounds = _rounds(module, len(heavy))
    one_kind = _is_one_kind([tree.weight(child) for child in heavy.values()])
    for key, child in module._modules.items():
        if child is None or not any(child is one for one in heavy.values()):
            continue
        here = _joined(path, key)
        inner = [] if one_kind and _is_called(child) else _the_list_in(tree, child, here)
        if inner:
            yield from (replace(block, ring=path) for block in inner)
        elif _is_called(child):
            yield Block(name=here, module=child, ring=path, stays=rounds)


def _the_list_in(tree: Tree, module: nn.Module, path: str) -> list[Block]:
    """The blocks of the list that holds most of a member; none where several lists share it: these could be called in any order."""
    if _is_list(module):
        return list(_members(tree, module, path))
    lists = [(key, child) for key, child in tree.heavy(module).items() if _is_list(child)]
    most = next(((key, child) for key, child in lists if 4 * tree.weight(child) >= 3 * tree.weight(module)), None)
    return list(_members(tree, most[1], _joined(path, most[0]))) if most else []


def _is_one_kind(sizes: list[int]) -> bool:
    """All of about one size, or nearly all as large as the largest: a few dense layers before many of experts."""
    large = sum(1 for size in sizes if SAME_SIZE * size >= max(sizes))
    return large == len(sizes) or (len(sizes) >= 4 and 4 * large >= 3 * len(sizes))


def _rounds(module: nn.Module, num_blocks: int) -> str:
    """ALBERT: fewer groups of weights than layers, each called for several layers."""
    config = getattr(next(iter(module.modules()), None), "config", None) or next(
        (m.config for m in module.modules() if hasattr(m, "config")), None
    )
    layers, groups = getattr(config, "num_hidden_layers", 0), getattr(config, "num_hidden_groups", 0)
    return f"{groups} groups of weights serve {layers} layers, called again and again" if groups and layers > groups == num_blocks else ""


def _of_children(tree: Tree, module: nn.Module, path: str) -> Iterator[Block]:
    """Children that hold enough; one that holds most of its parent is opened, a list that holds a single block stays."""
    heavy = tree.heavy(module)
    ring = path or "root"
    for key, child in heavy.items():
        here = _joined(path, key)
        if reads(module, key, child):
            yield Block(name=here, module=child, ring=ring, stays=f"read by {type(module).__name__} itself")
        elif _is_list(child) and len(tree.heavy(child)) == 1 and len(heavy) > 1:
            yield Block(name=here, module=child, ring=ring, stays="a list of one block: nothing else could use its place meanwhile")
        elif tree.heavy(child) and (len(heavy) == 1 or not _is_called(child) or 2 * tree.weight(child) > tree.weight(module)):
            inner = list(_of_children(tree, child, here))
            yield from (
                (replace(block, ring=ring) for block in inner)
                if len(inner) > 1 or not _is_called(child)
                else _alone(child, here, ring, inner)
            )
        elif _is_called(child):
            yield Block(name=here, module=child, ring=ring)


def _alone(child: nn.Module, here: str, ring: str, inner: list[Block]) -> Iterator[Block]:
    """A child with a single block within is that block, unless the block stays."""
    stays = next((block.stays for block in inner), "")
    yield Block(name=here, module=child, ring=ring, stays=stays)


def _parts(tree: Tree, block: Block) -> Iterator[Block]:
    """Attention and MLP of a block; the block itself where its own forward reads their weights, or where one part holds nearly all."""
    parts: list[Block] = []

    def walk(module: nn.Module, path: str) -> bool:
        for key, child in tree.heavy(module).items():
            if reads(module, key, child):
                return False
            here = _joined(path, key)
            if _is_called(child):
                parts.append(Block(name=here, module=child, ring=block.ring, stays=block.stays))
            elif not walk(child, here):
                return False
        return True

    divides = walk(block.module, block.name) and len(parts) > 1
    held = sum(tree.weight(part.module) for part in parts)
    yield from parts if divides and 4 * held >= 3 * tree.weight(block.module) else [block]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(module, ParametrizationList)


def _is_called(module: nn.Module) -> bool:
    """It has a forward of its own, so that hooks run: a ModuleList and a ModuleDict have none."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, torch.jit.ScriptModule)


def is_lazy(tensor: torch.Tensor) -> bool:
    """It has no shape before the first forward."""
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def reads(parent: nn.Module, key: str, child: nn.Module) -> bool:
    """Does the parent's own code use a weight of the child, as `self.child.weight`? The child's hooks would not run for that."""
    names = {name.rpartition(".")[2] for name, _ in child.named_parameters()}
    used = rf"self\.{re.escape(key)}\.(?:\w+\.)*(?:{'|'.join(map(re.escape, sorted(names)))})\b(?!\.(?:dtype|device|shape|size|ndim|data_ptr)\b)"
    own: type = type(parent)
    kinds = [cls for cls in own.__mro__ if cls is own or (cls is not nn.Module and "forward" in vars(cls))]
    return bool(names) and any(re.search(used, _source(cls)) for cls in kinds)


@cache
def _source(cls: Hashable) -> str:
    """The code of a class's methods that run in a forward. Set-up may read weights: nothing is streamed yet."""
    assert isinstance(cls, type)
    try:
        text = inspect.getsource(cls)
    except (OSError, TypeError):  # made at run time, or in C: nothing to read
        return ""
    return re.sub(r"\n    def (?:__init__|_?init_weights|_?reset_parameters)\b.*?(?=\n    (?:def|@)|\Z)", "\n", text, flags=re.DOTALL)


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
