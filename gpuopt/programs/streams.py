"""A callable -> the same callable with its batch in parts, each on a CUDA stream of its own: recorded as one CUDA graph, branches that run side by side.

For calls whose kernels do not fill the card: at a batch of 2 to 8 a kernel often has fewer blocks than the GPU has multiprocessors, and a second branch runs on the rest. Where kernels
do fill the card the parts only get smaller ones, each of which reads all weights again.

What holds it together, in the order it is queued:

- fork: each side stream waits for the stream of the call, so no part starts before its inputs are there, nor before the call before it has read its results;
- the first part runs on the stream of the call itself, each other one on its own, the same in every call: libraries keep workspaces by stream, and those must be there before a recording;
- join: the stream of the call waits for each side stream, and only then are results concatenated, on the stream of the call.

Memory: a side stream's tensors come from blocks of that stream (the allocator keeps them apart, and under a recording takes them from the graph's own pool, whatever stream of it asks).
They are read on the call's stream after the join and freed; the next that could be given them is the same side stream, which waits at the next fork for all that the call's
stream had queued. So nothing needs `record_stream`. Samples must not depend on each other; that they do not is what the accuracy gate shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs
from gpuopt.programs import artifact
from gpuopt.programs.plain import plain

MOST = 8
"""Streams: beyond, a part is a sample or less in the batches that this is for."""
FILE = "streams.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a call comes apart and how its results go together."""

    streams: int
    inputs: tuple[int | None, ...]
    """Of each input, positional ones first, the dimension that is the batch; None where every part gets all of it."""
    outputs: tuple[int | None, ...]
    """Of each leaf of the results; None for one that is no tensor."""

    def parts(self, given: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The inputs of each part, views of those given."""
        return [tuple(_part(tensor, axis, index, self.streams) for tensor, axis in zip(given, self.inputs, strict=True)) for index in range(self.streams)]  # fmt: skip

    def joined(self, found: Sequence[Any]) -> Any:
        """The results of all parts, in their order, as one."""
        leaves, nest = zip(*(pytree.tree_flatten(each) for each in found), strict=True)
        whole = [
            column[0] if axis is None else torch.cat(column, axis)
            for axis, column in zip(self.outputs, zip(*leaves, strict=True), strict=True)
        ]
        return pytree.tree_unflatten(whole, nest[0])


class Parted:
    """The callable in parts. Made for a recording: outside of one it gives the same, and waits on the host for every launch."""

    def __init__(self, call: Callable[..., Any], split: Split, keywords: Sequence[str], device: str, *, cuda: Any = torch.cuda) -> None:
        """keywords: names of the inputs that are not positional, in order. cuda: what makes streams; tests give their own."""
        self._call = call
        self._split = split
        self._keywords = tuple(keywords)
        self._device = torch.device(device)
        self._cuda = cuda
        self._sides = [cuda.Stream(self._device) for _ in range(split.streams - 1)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Results in plain containers, as of the whole batch."""
        own = self._cuda.current_stream(self._device)
        parts = self._split.parts((*args, *(kwargs[name] for name in self._keywords)))
        for side in self._sides:
            side.wait_stream(own)
        found = [self._run(own, parts[0])]
        found += [self._run(side, part) for side, part in zip(self._sides, parts[1:], strict=True)]
        for side in self._sides:
            own.wait_stream(side)
        return self._split.joined(found)

    def _run(self, stream: Any, part: tuple[Any, ...]) -> Any:
        count = len(part) - len(self._keywords)
        with self._cuda.stream(stream):
            return plain(self._call(*part[:count], **dict(zip(self._keywords, part[count:], strict=True))))


def asked(options: Mapping[str, Any]) -> int:
    """`streams=N`; 1 where there is none. Raises UsageError for a number that there cannot be."""
    found = options.get("streams", 1)
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= MOST:
        raise UsageError(f"streams is {found!r}", fix=f"a whole number from 2 to {MOST}")
    if found > 1 and options.get("dynamic"):
        raise Unsupported("a batch in parts has one size, and a dimension is asked to be dynamic", fix="leave streams or --dim out")
    return found


def of(module: Callable[..., Any], inputs: Inputs, streams: int) -> Split:
    """How this module's batch comes apart: one call of it with all of the batch and one with a part say which dimension of each result is the batch.

    Raises Unsupported where no input is known to have a batch, where it does not divide, and for a result that is not one sample after the other.
    """
    axes = tuple(_axis(spec.shape) for spec in inputs.specs)
    bound = [*inputs.args, *inputs.kwargs.values()]
    if len(axes) != len(bound) or all(axis is None for axis in axes):
        raise Unsupported("no input has a batch to take apart", fix="name it in a shape: --input 'x:float32[N,3,224,224]'")
    if inputs.batch % streams:
        raise Unsupported(
            f"a batch of {inputs.batch} does not come apart into {streams} equal parts", fix="streams= a divisor of the batch"
        )
    split = Split(streams=streams, inputs=axes, outputs=())
    with torch.no_grad():
        whole = plain(module(*inputs.args, **inputs.kwargs))
        first = split.parts(bound)[0]
        try:
            part = plain(module(*first[: len(inputs.args)], **dict(zip(inputs.kwargs, first[len(inputs.args) :], strict=True))))
        except (torch.OutOfMemoryError, Unsupported):
            raise
        except Exception as error:  # a model that takes one batch alone may raise anything for another: all of it ran just now
            reason = (str(error).splitlines() or [""])[0][:200]
            raise Unsupported(f"the model does not run on a part of its batch: {reason}", fix="leave streams out") from error
    leaves, nest = pytree.tree_flatten(whole)
    others, same = pytree.tree_flatten(part)
    if nest != same:
        raise Unsupported("results of a part of the batch are nested in another way than those of all of it", fix="leave streams out")
    outputs = tuple(_grown(index, *pair, streams) for index, pair in enumerate(zip(leaves, others, strict=True)))
    return Split(streams=streams, inputs=axes, outputs=outputs)


def part_of(inputs: Inputs, split: Split) -> Inputs:
    """The first part of a call, in memory of its own: what is exported where the whole cannot say how its parts are run."""
    bound = [*inputs.args, *inputs.kwargs.values()]
    found = [tensor.clone() if axis is not None else tensor for tensor, axis in zip(split.parts(bound)[0], split.inputs, strict=True)]
    count = len(inputs.args)
    dims = {**inputs.dims, "N": inputs.batch // split.streams}
    return Inputs(args=tuple(found[:count]), kwargs=dict(zip(inputs.kwargs, found[count:], strict=True)), specs=inputs.specs, dims=dims)


def save(module: torch.nn.Module, inputs: Inputs, split: Split, folder: Path) -> dict[str, str]:
    """`artifact.save` of a part, beside what all of the batch is and how it comes apart; role -> file name. Raises Unsupported where the module cannot be exported."""
    files = artifact.save(module, part_of(inputs, split), None, folder)
    artifact.write_accepts(Accepts.of(inputs), folder)
    told = {"streams": split.streams, "inputs": split.inputs, "outputs": split.outputs}
    (folder / FILE).write_text(json.dumps(told), encoding="utf-8")
    return {**files, "streams": FILE}


def read(folder: Path, files: Mapping[str, str]) -> Split | None:
    """None in a bundle whose batch is in one piece."""
    if "streams" not in files:
        return None
    told = json.loads((folder / files["streams"]).read_text(encoding="utf-8"))
    return Split(streams=int(told["streams"]), inputs=tuple(told["inputs"]), outputs=tuple(told["outputs"]))


def _axis(shape: Sequence[int | str]) -> int | None:
    return shape.index("N") if "N" in shape else None


def _part(tensor: Any, axis: int | None, index: int, streams: int) -> Any:
    if axis is None:
        return tensor
    size = tensor.shape[axis] // streams
    return tensor.narrow(axis, index * size, size)


def _grown(index: int, whole: Any, part: Any, streams: int) -> int | None:
    """The dimension in which a result of all of the batch is longer than that of a part."""
    if not isinstance(whole, torch.Tensor):
        if whole == part:
            return None
        raise Unsupported(f"output {index} is {whole!r} of all of the batch and {part!r} of a part of it", fix="leave streams out")
    longer = [axis for axis, (n, m) in enumerate(zip(whole.shape, part.shape)) if n != m]
    if whole.dim() != part.dim() or len(longer) != 1 or whole.shape[longer[0]] != part.shape[longer[0]] * streams:
        raise Unsupported(
            f"output {index} is {list(whole.shape)} of all of the batch and {list(part.shape)} of a part of it: it is not one sample after the other",
            fix="leave streams out",
        )
    return longer[0]
