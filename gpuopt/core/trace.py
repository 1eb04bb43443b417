"""What a traced program did, as values: steps, kernels, copies, runtime calls, ops and module ranges, linked to each other. Read by profiling, judged by the doctor.

All times are nanoseconds from the first event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KINETO_DTYPES = {
    "float": "float32",
    "double": "float64",
    "c10::Half": "float16",
    "c10::BFloat16": "bfloat16",
    "signed char": "int8",
    "unsigned char": "uint8",
    "c10::Float8_e4m3fn": "float8_e4m3fn",
    "c10::Float8_e5m2": "float8_e5m2",
    "long int": "int64",
    "int": "int32",
    "bool": "bool",
}
"""A dtype as Kineto writes it, and traces carry it -> torch's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One traced call, from its first line to the synchronisation after it."""

    start_ns: int
    dur_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOp:
    """One op on the host, between its entry and its return."""

    index: int
    name: str
    """`aten::mm`."""
    start_ns: int
    dur_ns: int
    self_ns: int
    """Without what its children took."""
    num_children: int
    """Events recorded directly below it, module ranges included: each cost the profiler time inside this op."""
    thread: str
    parent: int | None
    """Index of the enclosing op."""
    module: str | None
    """Qualified name of the innermost module around it; None where no ranges were recorded."""
    module_class: str = ""
    step: int | None = None
    external_id: int | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of its tensor inputs with at least one dimension, lists flattened."""
    dtypes: tuple[str, ...] = ()
    """As Kineto writes them: `float`, `c10::Half`."""
    line: str = ""
    """`infer.py:12 in load`: the function of the user's code it was called from, by the line it begins at; "" where no stacks were recorded."""
    flops: float | None = None
    """Of its own products, where whoever traced it knows them from what it ran on; 0 is known, None: ask the count."""
    bytes: float | None = None
    """Its own compulsory traffic, known with `flops`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel (or memset) on the device."""

    name: str
    start_ns: int
    dur_ns: int
    stream: int
    correlation: int | None
    op: int | None
    """Index of the innermost op that launched it."""
    step: int | None
    graph_id: int | None = None
    """Set when it ran from a CUDA graph (the replay's correlation where Kineto gives no id): then `op` is the replay's, which says nothing."""
    is_memset: bool = False
    grid: tuple[int, int, int] | None = None
    """Blocks launched, in x, y and z."""
    block: tuple[int, int, int] | None = None
    """Threads of a block."""
    registers: int | None = None
    """Of one thread."""
    shared_bytes: int | None = None
    """Of one block, static and dynamic."""
    blocks_per_sm: float | None = None
    """As Kineto writes it: blocks of the grid over SMs of the device, whatever fits at once."""
    device: int = 0
    """Its number, as the tracing process counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One copy engine transfer."""

    kind: str
    """`h2d`, `d2h`, `d2d`, `p2p` or `h2h`."""
    memory: str
    """`pageable`, `pinned` or "" where Kineto does not say: of the host side."""
    bytes: int
    start_ns: int
    dur_ns: int
    stream: int
    correlation: int | None
    op: int | None
    step: int | None
    device: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCall:
    """One CUDA runtime or driver call on the host."""

    name: str
    kind: str
    """`launch`, `graph`, `copy`, `sync`, `alloc` or `other`."""
    start_ns: int
    dur_ns: int
    thread: str
    correlation: int | None
    op: int | None
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRange:
    """One forward of one module."""

    name: str
    module_class: str
    start_ns: int
    dur_ns: int
    thread: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """A batch asked of a torch DataLoader: no op, for the host computes what it likes meanwhile, or waits for a worker."""

    name: str
    """`enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__`."""
    start_ns: int
    dur_ns: int
    thread: str


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Trace:
    """What ran, where and when, over a few steps. No figure in it is a latency: tracing stretches the host side."""

    device: str
    steps: tuple[Step, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    copies: tuple[Copy, ...] = ()
    runtime: tuple[RuntimeCall, ...] = ()
    ops: tuple[CpuOp, ...] = ()
    """Indexed by `CpuOp.index`."""
    modules: tuple[ModuleRange, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    num_lost: int = 0
    """Device events outside every step: they belong to nobody."""
    notes: tuple[str, ...] = ()

    @property
    def on_device(self) -> bool:
        """Whether anything ran on a device of its own; otherwise the ops themselves are the work."""
        return bool(self.kernels or self.copies)

    def chain(self, op: int | None) -> Iterable[CpuOp]:
        """The op and those around it, innermost first."""
        while op is not None:
            found = self.ops[op]
            yield found
            op = found.parent
