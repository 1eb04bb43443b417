"""A session of its own with ONNX Runtime's profiler on + inputs -> the nodes that ran in each call, when, and on what. Nothing timed comes from here."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpuopt.backends.ort.session import TYPE_NAME, bind_input, open_session, translated
from gpuopt.backends.ort.settings import Settings
from gpuopt.core.accepts import dtype_name
from gpuopt.core.errors import Unsupported
from gpuopt.trust import packages

SPARE_S = 1.0

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """One node as ONNX Runtime ran it, after all its rewriting."""

    name: str
    op: str
    provider: str
    inputs: tuple[tuple[str, Shape], ...]
    """Torch's dtype name and shape; weights a kernel has packed away are absent."""
    outputs: tuple[tuple[str, Shape], ...]
    start_ns: int = 0
    """Since the session began; whole microseconds, as ONNX Runtime writes them."""
    dur_ns: int = 0

    @property
    def dtype(self) -> str:
        """Of the first input that is computed with: floating, else 8-bit integers, else the first."""
        names = [name for name, _ in self.inputs]
        for name in names:
            if name.startswith(("float", "bfloat")):
                return name
        eight = [name for name in names if name in ("int8", "uint8")]
        return "int8" if eight else names[0] if names else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One run of the session."""

    start_ns: int
    dur_ns: int
    nodes: tuple[NodeRun, ...]
    """In order of their start; a node with a subgraph comes before, and lasts as long as, what runs inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one profiled session did."""

    calls: tuple[Call, ...]
    began_ns: int
    """When its clock read 0, on CLOCK_REALTIME."""
    optimised: Any = None
    """The ModelProto that ran, without large weights; None where it was not asked for, or could not be written: then `note` says why."""
    note: str = ""


def record(
    path: Path,
    settings: Settings,
    index: int,
    stream: torch.cuda.Stream | None,
    inputs: Mapping[str, torch.Tensor],
    *,
    calls: int = 1,
    spare: int = 0,
    graph: bool = False,
    around: Callable[[Callable[[], None]], None] | None = None,
) -> Profile:
    """Open a profiled session, call it `calls` times with these tensors, which lie where it runs, and close it. `spare` more calls as long as that takes no second.

    `graph`: bring the optimised graph, too; it is written with all weights, into a temporary folder. `around(run)` makes the calls happen under another profiler. Raises what a session raises.
    """
    with tempfile.TemporaryDirectory(prefix="gpuopt-ort-") as folder:
        session, optimised, note = _open(path, settings, index, stream, Path(folder), graph)
        bound = session.io_binding()
        if stream is not None:
            torch.cuda.synchronize(index)
        for name, tensor in inputs.items():
            bind_input(bound, name, tensor, index)
        for info in session.get_outputs():
            bound.bind_output(info.name, settings.provider, index)

        def run() -> None:
            began = time.monotonic()
            for at in range(calls + spare):
                if at >= calls and time.monotonic() - began > SPARE_S:
                    break
                session.run_with_iobinding(bound)
                if stream is not None:
                    torch.cuda.synchronize(index)

        with translated(path.name):
            around(run) if around is not None else run()
        began_ns = int(session.get_profiling_start_time_ns())
        written = Path(session.end_profiling())
        events = json.loads(written.read_text())
        model = packages.load("onnx").load(str(optimised), load_external_data=False) if optimised is not None else None
    return Profile(calls=calls_of(events), began_ns=began_ns, optimised=model, note=note)


def _open(
    path: Path, settings: Settings, index: int, stream: torch.cuda.Stream | None, folder: Path, graph: bool
) -> tuple[Any, Path | None, str]:
    """(session, where its graph lies, why there is none)."""
    if not graph:
        return open_session(path, settings, index, stream, folder / "profile"), None, ""
    target = folder / "optimised.onnx"
    try:
        return open_session(path, settings, index, stream, folder / "profile", target), target, ""
    except Unsupported as error:  # the same file did open before: it is the writing that failed
        return open_session(path, settings, index, stream, folder / "profile"), None, error.message


def calls_of(events: list[dict[str, Any]]) -> tuple[Call, ...]:
    """Events of ONNX Runtime's profile -> its calls, each with its nodes."""
    runs = sorted((e["ts"] * 1000, e["dur"] * 1000) for e in events if e.get("name") == "model_run")
    nodes = read_profile(events)
    return tuple(
        Call(start_ns=start, dur_ns=dur, nodes=tuple(n for n in nodes if start <= n.start_ns <= start + dur)) for start, dur in runs
    )


def read_profile(events: list[dict[str, Any]]) -> tuple[NodeRun, ...]:
    """Events of ONNX Runtime's profile -> its kernels, in order of their start."""
    nodes = []
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        args = event["args"]
        nodes.append(
            NodeRun(
                name=name.removesuffix("_kernel_time"),
                op=args.get("op_name", ""),
                provider=args.get("provider", ""),
                inputs=_types(args.get("input_type_shape", [])),
                outputs=_types(args.get("output_type_shape", [])),
                start_ns=int(event.get("ts", 0)) * 1000,
                dur_ns=int(event.get("dur", 0)) * 1000,
            )
        )
    return tuple(sorted(nodes, key=lambda n: (n.start_ns, -n.dur_ns)))


def _types(entries: list[dict[str, list[int]]]) -> tuple[tuple[str, Shape], ...]:
    return tuple(
        (dtype_name(TYPE_NAME[name]) if name in TYPE_NAME else name, tuple(shape)) for entry in entries for name, shape in entry.items()
    )
