"""A module -> its anatomy: which weights move as units, block by block, and which always stay on the device, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gpuopt.core.errors import BadInput, Unsupported, UsageError
from gpuopt.core.streaming import ALIGNMENT, EMBEDDING, Anatomy, Place, Unit
from gpuopt.streaming.blocks import Block, Tree, found, is_lazy, reads

GRANULARITIES = ("block", "sub")
EMBEDS = ("device", "cpu")


def dissect(module: nn.Module, granularity: str = "block", embed: str = "device", *, small_bytes: int | None = None) -> Anatomy:
    """Find the blocks of a module, lay their weights out in slabs, and say why the rest stays.

    Blocks are the members of lists (`nn.ModuleList`, `nn.Sequential`), else the module's larger children; `sub` takes a block's
    own larger children. Reads no values: works on the meta device. The order of units is that of registration.
    `small_bytes`: parameters below stay on the device. None: 1 MiB, or a 1024th of the weights of a model under 1 GiB; and never
    those that are a hundredth of their block or more, or a block of many small ones would have nothing to move.
    Memory, not names, says what is tied: parameters (and views of them) that share bytes with anything outside their own unit stay on the
    device. Raises UsageError on an unknown granularity or embed, Unsupported for TorchScript, BadInput for lazy parameters.
    """
    for what, value, known in (("granularity", granularity, GRANULARITIES), ("embed", embed, EMBEDS)):
        if value not in known:
            raise UsageError(f"{what} {value!r} is not known", fix="one of " + ", ".join(known))
    if isinstance(module, torch.jit.ScriptModule):
        raise Unsupported(
            "a TorchScript module runs its children without hooks, so nothing can be moved in time",
            fix="pass the nn.Module it was made from",
        )
    tree = Tree(module, small_bytes)
    blocks = found(tree, granularity)
    tensors = _tensors(module, {id(block.module): block for block in blocks})
    return _sorted_out(tensors, blocks, tree, embed)


@dataclass(slots=True, kw_only=True)
class _Tensor:
    """A name of a parameter or buffer, and where it was found."""

    name: str
    tensor: torch.Tensor
    is_buffer: bool
    block: Block | None
    embeds: bool
    """It is a row per token of an nn.Embedding."""
    space: tuple[str, int]
    """Addresses are comparable within a space: a device's memory; a single storage on meta; an object that is no plain tensor."""
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """What it takes on a device: the span of its elements in memory, since a copy keeps its strides."""
        return self.end - self.start

    @property
    def geometry(self) -> tuple[object, ...]:
        """Two names with one geometry in one space are one tensor."""
        tensor = self.tensor
        return self.start, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()) if self.space[0] != "object" else ()


def _tensors(root: nn.Module, blocks: dict[int, Block]) -> list[_Tensor]:
    """Every name of every tensor, in order of registration; a module reached by two paths is walked twice, for its second names."""
    gathered: list[_Tensor] = []

    def walk(module: nn.Module, path: str, block: Block | None, above: tuple[int, ...], is_read: bool) -> None:
        block = blocks.get(id(module), block)
        for table, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, tensor in table.items():
                if tensor is not None:
                    name = f"{path}{key}"
                    embeds = isinstance(module, nn.Embedding) and key == "weight" and not is_read
                    gathered.append(_located(name, tensor, is_buffer, block, embeds))
        for key, child in module._modules.items():
            if child is not None and id(child) not in above:
                is_read = isinstance(child, nn.Embedding) and reads(module, key, child)
                walk(child, f"{path}{key}.", block, (*above, id(child)), is_read)

    walk(root, "", None, (id(root),), False)
    return gathered


def _located(name: str, tensor: torch.Tensor, is_buffer: bool, block: Block | None, embeds: bool) -> _Tensor:
    if is_lazy(tensor):
        raise BadInput(f"{name} is lazy: it has no shape before the first forward", fix="run the model once, then stream it")
    size = tensor.element_size()
    if not _is_plain(tensor):
        space, start, end = ("object", id(tensor)), 0, _inner_bytes(tensor)
    else:
        extent = 0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        storage = tensor.untyped_storage()
        has_memory = tensor.device.type != "meta" and storage.nbytes() > 0
        space = (str(tensor.device), 0) if has_memory else ("meta", storage._cdata)
        start = (int(storage.data_ptr()) if has_memory else 0) + int(tensor.storage_offset()) * size
        end = start + extent * size
    return _Tensor(name=name, tensor=tensor, is_buffer=is_buffer, block=block, embeds=embeds, space=space, start=start, end=end)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Its bytes are all there is: strided, and of no class that keeps tensors within."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided and not tensor.is_quantized


def _inner_bytes(tensor: torch.Tensor) -> int:
    """Of a subclass: its inner tensors where it says which they are."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_inner_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _memories(tensors: Sequence[_Tensor]) -> Iterator[list[_Tensor]]:
    """Tensors whose bytes overlap, together; in the order of the first of each. Neighbours in one storage are apart."""
    group_of = list(range(len(tensors)))
    by_space: dict[tuple[str, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_space.setdefault(tensor.space, []).append(index)
    for members in by_space.values():
        members.sort(key=lambda i: (tensors[i].start, tensors[i].end, i))
        group, end = -1, -1
        for index in members:
            # No elements overlap nothing, but the same empty or foreign object is itself.
            if group < 0 or (tensors[index].start >= end and tensors[index].geometry != tensors[group].geometry):
                group, end = index, tensors[index].end
            group_of[index] = group
            end = max(end, tensors[index].end)
    gathered: dict[int, list[_Tensor]] = {}
    for index, tensor in enumerate(tensors):
        gathered.setdefault(group_of[index], []).append(tensor)
    return iter(gathered.values())


def _sorted_out(tensors: Sequence[_Tensor], blocks: Sequence[Block], tree: Tree, embed: str) -> Anatomy:
    """Each tensor into its unit, or to those that stay, with the reason."""
    inside: dict[int, list[_Tensor]] = {id(block.module): [] for block in blocks}
    fixed: dict[str, int] = {}
    host: dict[str, int] = {}
    reasons: dict[str, str] = {}
    tied: dict[str, str] = {}
    for group in _memories(tensors):
        first = group[0]
        tied.update({other.name: first.name for other in group[1:]})
        num_bytes = max(t.end for t in group) - min(t.start for t in group)
        reason = _why_fixed(group, num_bytes, tree)
        if reason is None:
            assert first.block is not None
            inside[id(first.block.module)].append(first)
        elif embed == "cpu" and reason == EMBEDDING:
            host[first.name] = num_bytes
        else:
            fixed[first.name] = num_bytes
            if num_bytes >= tree.small_bytes:
                reasons[first.name] = reason
    units: list[Unit] = []
    orders: dict[str, int] = {}
    for block in blocks:
        if inside[id(block.module)]:
            order = orders.setdefault(block.ring, 0)
            orders[block.ring] += 1
            units.append(_laid_out(block, order, inside[id(block.module)]))
    return Anatomy(units=tuple(units), fixed=fixed, reasons=reasons, tied=tied, host=host)


def _why_fixed(group: Sequence[_Tensor], num_bytes: int, tree: Tree) -> str | None:
    """Why these bytes stay on the device; None: they move with their block."""
    first = group[0]
    if any(not _is_plain(t.tensor) for t in group):
        return f"a {type(first.tensor).__name__}, which is more than its bytes"
    if any(t.is_buffer for t in group):
        return (
            "a buffer"
            if first.is_buffer and len(group) == 1
            else f"shares memory with the buffer {next(t.name for t in group if t.is_buffer)}"
        )
    block = first.block
    stranger = next((t for t in group if t.block is not block), None)
    if stranger is not None:
        return f"tied to {stranger.name}"
    odd = next((t for t in group if t.geometry != first.geometry), None)
    if odd is not None:
        return f"shares memory with {odd.name}, of another shape"
    if block is None:
        other = next((t for t in group if not t.embeds), None)
        return EMBEDDING if other is None else f"tied to {other.name}" if len(group) > 1 and first.embeds else "outside every block"
    if block.stays:
        return block.stays
    if num_bytes < min(tree.small_bytes, tree.weight(block.module) // 100):
        return "small"
    if num_bytes != first.tensor.numel() * first.tensor.element_size():
        return "its elements share memory or leave gaps (expanded, or a slice of a larger tensor)"
    if first.tensor.is_conj() or first.tensor.is_neg():
        return "a lazily conjugated or negated tensor"
    return None


def _laid_out(block: Block, order: int, members: Sequence[_Tensor]) -> Unit:
    """Tensors one after the other, each at a multiple of ALIGNMENT."""
    offset = 0
    places = []
    for member in members:
        tensor = member.tensor
        place = Place(
            name=member.name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=offset,
            num_bytes=member.num_bytes,
        )
        places.append(place)
        offset += -(-member.num_bytes // ALIGNMENT) * ALIGNMENT
    return Unit(name=block.name, ring=block.ring, order=order, num_bytes=offset, places=tuple(places))
