"""A callable + what it accepts -> CUDA graphs of it, one a shape, replayed on buffers of their own.

What the backends `cudagraphs` (an eager forward) and `inductor` (code that is compiled already) share. A graph is addresses and kernels: it reads the buffers it was recorded
on and leaves its results where it left them before. So a call copies its inputs in, replays, and copies the results out:

- an input that is the graph's own buffer (`Graphs.static_inputs`) is not copied; each other one costs one copy before the replay can start;
- results are clones, which nothing overwrites. They are queued while the graph runs, so the host's part is hidden behind it; the device's is one copy a
  result, a kernel of its own. Handing out the graph's own memory and copying late, or in turn from several sets of it, would save those: but a caller who keeps more
  results than there are sets reads another call's numbers and nothing says so. `static_outputs` is for callers who know that they keep none.

What would give another answer than the callable is refused where it is recorded: a forward that writes into its inputs (the caller's would stay as they were). Random numbers are
fresh in every replay, as PyTorch's generator counts them; Python in the callable (a counter, a branch on a setting) ran once, while recording, and does not run again.
"""

from __future__ import annotations

import os
import re
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs
from gpuopt.programs import stack_line
from gpuopt.programs.plain import copied, plain

KEPT = 8
"""Graphs of different shapes kept at a time; the one unused for longest makes room. Each holds its inputs and results: what it computes with in between is shared by all."""
WARMUP = 3
"""Calls before recording: libraries pick algorithms and allocate workspaces in the first ones, which a recording cannot hold."""
STATIC_OUTPUTS = "static_outputs: a result is overwritten by the next call"
"""A runner's note."""
REMEDY = "remove what waits for the device (.item(), .cpu(), nonzero) from forward()"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes an element -> an integer of that size: compared as bits, NaN equals itself and float8 can be compared."""
_OURS = tuple(f"{Path(__file__).parents[1] / part}{os.sep}" for part in ("programs", "backends"))
_GENERATED = "torchinductor"
"""In the path of every file that Inductor writes its code to."""
_CALLED = re.compile(r"torch\.ops\.([\w.]+)|(extern_kernels\.\w+)")


class Graphs:
    """Recorded graphs of one callable behind a check of their inputs. Calls from several threads and streams take turns: they share the graphs' memory."""

    def __init__(
        self,
        call: Callable[..., Any],
        accepts: Accepts,
        *,
        recorder: Recorder | None = None,
        holds: Iterable[torch.Tensor] = (),
        static_outputs: bool = False,
        watch: Callable[[], AbstractContextManager[Any]] = nullcontext,
        remedy: str = REMEDY,
    ) -> None:
        """Raises Unsupported for a callable without inputs, and for inputs on several devices.

        Parameters
        ----------
        accepts: inputs `call` takes. With ranges, a shape is recorded when it is first called with: `WARMUP` calls of `call` and a moment, once.
        recorder: of the device of the first input, where none is given.
        holds: tensors the graphs read besides their inputs (parameters): their memory stays, even where the module they belong to is cast or moved later.
        static_outputs: results are the graph's own memory, which the next call of that shape overwrites.
        watch: makes a context that is entered while `call` is recorded, to see what it dispatches.
        remedy: for a user whose `call` cannot be recorded.
        """
        if not accepts.inputs:
            raise Unsupported("a model without inputs has nothing to record on", fix="use --backend eager")
        first = accepts.inputs[0]
        for spec in accepts.inputs:
            if spec.device != first.device:
                raise Unsupported(
                    f"input {spec.name!r} is on {spec.device}, {first.name!r} on {first.device}: a replay would not read both again",
                    fix="pass all inputs on one device",
                )
        self.accepts = accepts
        self._call = call
        self._recorder = recorder or Recorder(first.device)
        self._holds = [tensor.detach() for tensor in holds]
        self._copies = not static_outputs
        self._watch = watch
        self._remedy = remedy
        self._keywords = tuple(spec.name for spec in accepts.inputs[accepts.positional :])
        self._kept: OrderedDict[tuple[torch.Size, ...], Recorded] = OrderedDict()
        self._newest: Recorded | None = None
        self._queue: Any = None
        """The stream of the last call."""
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Results in plain containers. Raises UsageError for what is not accepted, Unsupported for a shape that cannot be recorded."""
        given = (*args, *map(kwargs.get, self._keywords)) if kwargs else args
        with self._lock, torch.no_grad():
            found = self._newest
            if found is None or len(kwargs) != len(self._keywords) or not found.takes(given):
                self.accepts.check(args, kwargs)
                found = self._of(given)
            queue = self._recorder.queue()
            if self._queue is not None and queue != self._queue:
                queue.wait_stream(self._queue)
            self._queue = queue
            found.fill(given)
            found.graph.replay()
            return copied(found.outputs) if self._copies else found.outputs

    def record(self, inputs: Inputs) -> Recorded:
        """The graph for inputs of these shapes, before the first call asks for it. Raises as a call does."""
        self.accepts.check(inputs.args, inputs.kwargs)
        with self._lock, torch.no_grad():
            return self._of((*inputs.args, *(inputs.kwargs[name] for name in self._keywords)))

    @property
    def static_inputs(self) -> tuple[torch.Tensor, ...]:
        """The buffers of the graph used last, in call order; writing into them and passing them costs no copy."""
        return self._newest.static if self._newest is not None else ()

    @property
    def num_kept(self) -> int:
        """Shapes that are recorded now."""
        return len(self._kept)

    def close(self) -> None:
        """Free the graphs and their memory. Harmless twice."""
        with self._lock:
            self._newest = None
            while self._kept:
                self._drop_oldest()
            self._holds, self._call = [], _closed

    def _of(self, given: Sequence[torch.Tensor]) -> Recorded:
        shapes = tuple(tensor.shape for tensor in given)
        if shapes in self._kept:
            self._kept.move_to_end(shapes)
        else:
            while len(self._kept) >= KEPT:
                self._drop_oldest()
            self._kept[shapes] = self._recorded(given)
        self._newest = self._kept[shapes]
        return self._newest

    def _recorded(self, given: Sequence[torch.Tensor]) -> Recorded:
        static = tuple(buffer(tensor) for tensor in given)
        args = static[: self.accepts.positional]
        kwargs = dict(zip(self._keywords, static[len(args) :], strict=True))

        def once() -> Any:
            return plain(self._call(*args, **kwargs))

        versions = [_version(tensor) for tensor in static]
        self._recorder.run(once)
        for spec, tensor, version, source in zip(self.accepts.inputs, static, versions, given, strict=True):
            # The count misses kernels that write past PyTorch, the bits miss a write that changes nothing here (x.mul_(2) of zeros).
            if _version(tensor) != version or not torch.equal(_bits(tensor), _bits(source)):
                raise Unsupported(
                    f"forward writes into its input {spec.name!r}: a replay would write into the graph's own copy, not into the caller's tensor",
                    fix=f"begin forward with {spec.name} = {spec.name}.clone(), or use a backend without CUDA graphs",
                )
        for _ in range(WARMUP - 1):
            self._recorder.run(once)
        try:
            graph, outputs = self._recorder.record(once, self._watch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = next((line.strip() for e in _chain(error) for line in str(e).splitlines() if "captur" in line), None)
            if reason is None:
                raise
            place = _place(error)
            raise Unsupported(
                f"the forward cannot be recorded as a CUDA graph{f', {place}' if place else ''}: {reason[:200]}", fix=self._remedy
            ) from error
        return Recorded(static=static, graph=graph, outputs=outputs)

    def _drop_oldest(self) -> None:
        self._recorder.synchronize()
        _, oldest = self._kept.popitem(last=False)
        oldest.close()


class Recorded:
    """One graph, the buffers it reads and the results it writes."""

    def __init__(self, *, static: tuple[torch.Tensor, ...], graph: Any, outputs: Any) -> None:
        self.static = static
        self.graph = graph
        self.outputs = outputs
        self._wanted = [(t.shape, t.dtype, t.device) for t in static]
        self._storages = {t.untyped_storage().data_ptr() for t in static}

    def takes(self, given: Sequence[Any]) -> bool:
        """Whether these are tensors of its shapes, dtypes and device; strides do not matter, they are copied."""
        if len(given) != len(self._wanted):
            return False
        for tensor, (shape, dtype, device) in zip(given, self._wanted, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
                return False
        return True

    def fill(self, given: Sequence[torch.Tensor]) -> None:
        """Copy into the buffers what is not there already."""
        stale = [pair for pair in zip(self.static, given, strict=True) if not _is_same(*pair)]
        # A buffer given in another's place, or turned, must not be overwritten before it is read.
        sources = [t.clone() if t.untyped_storage().data_ptr() in self._storages else t for _, t in stale]
        for (own, _), source in zip(stale, sources, strict=True):
            own.copy_(source, non_blocking=True)

    def close(self) -> None:
        """Free the graph. Nothing of it may still be running."""
        self.graph.reset()
        self.outputs = None
        self.static = ()


class Recorder:
    """One GPU's part of it: the stream that is recorded on, and the memory that all graphs compute in, for one runs at a time."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._index = torch.cuda.current_device() if self._device.index is None else self._device.index
        self._stream = torch.cuda.Stream(self._device)
        self._pool: Any = None

    def run(self, call: Callable[[], Any]) -> None:
        """One call on the stream of the recording, whose workspaces libraries keep apart from other streams'; waits until it is done."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(self.queue())
            with torch.cuda.stream(self._stream):
                call()
            torch.cuda.synchronize(self._device)

    def record(self, call: Callable[[], Any], watch: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, Any]:
        """(graph, what `call` returned while it was recorded, in the graph's own memory), replayed once. Raises what `call` or CUDA raises."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            before = self.queue()
            try:
                # Other threads of a service may go on using the device.
                with torch.cuda.graph(graph, stream=self._stream, pool=self._pool, capture_error_mode="thread_local"), watch():
                    outputs = call()
            except BaseException:
                # A capture that broke off stays on its stream (torch.cuda.graph ends the capture first, which raises), leaves the random generator believing it is still
                # captured, which a clone of its state is not, and its pool half-made.
                torch.cuda.set_stream(before)
                generator = torch.cuda.default_generators[self._index]
                generator.graphsafe_set_state(generator.clone_state())
                self._pool = None
                raise
            graph.replay()
            torch.cuda.synchronize(self._device)
        return graph, outputs

    def queue(self) -> Any:
        """The caller's stream."""
        return torch.cuda.current_stream(self._index)

    def synchronize(self) -> None:
        """Wait until nothing runs any more."""
        torch.cuda.synchronize(self._device)


def _closed(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("called after it was closed")


def buffer(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, strides kept where it has no gaps: the caller's tensors must not change under later calls."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format, requires_grad=False).copy_(tensor.detach())


def tensors_of(module: Any) -> Iterator[torch.Tensor]:
    """Parameters and buffers: what a graph of this module reads by address."""
    if isinstance(module, torch.nn.Module):
        yield from module.parameters()
        yield from module.buffers()


def _is_same(own: torch.Tensor, given: torch.Tensor) -> bool:
    return given is own or (given.data_ptr() == own.data_ptr() and given.stride() == own.stride())


def _version(tensor: torch.Tensor) -> int:
    """How often PyTorch saw it written; made in inference mode, it does not say."""
    return 0 if tensor.is_inference() else tensor._version


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain_tensor = tensor.detach()
    return plain_tensor.view(_BITS[tensor.element_size()]) if tensor.element_size() in _BITS else plain_tensor


def _chain(error: BaseException) -> list[BaseException]:
    """What was raised first, then what that led to: ending a broken capture raises an error of its own."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found[::-1]


def _place(error: BaseException) -> str:
    """`at model.py:12 in aten.nonzero`: the line of the model's own code, and the call of the generated code, below which CUDA refused. "" where neither is known."""
    for each in _chain(error):
        frames = [f for f in traceback.extract_tb(each.__traceback__) if not f.filename.startswith(_OURS)]
        users = [f for f in frames if _GENERATED not in f.filename]
        line = stack_line.line_of("".join(f'File "{f.filename}", line {f.lineno}, in {f.name}\n' for f in users))
        code = next((f.line or "" for f in reversed(frames) if _GENERATED in f.filename), "")
        called = _CALLED.search(code)
        op = next((name for name in called.groups() if name), "").removesuffix(".default") if called else ""
        said = [f"at {line}" if line else "", f"in {op}" if op else ""]
        if any(said):
            return " ".join(filter(None, said))
    return ""
