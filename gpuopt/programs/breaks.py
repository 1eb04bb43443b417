"""torch.compile at work -> what it gave up on: graph breaks and recompilations with the user's line and the guard, CUDA graphs it went without.

Heard from the loggers behind TORCH_LOGS=graph_breaks,recompiles,cudagraphs, because nothing else says the line (counters hold reasons alone) and because listening compiles
nothing. What they say is stable text ("This log line MUST contain…", torch/_dynamo/symbolic_convert.py); read here for torch 2.11 to 2.13.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._logging._internal import log_state

_BREAKS = ("torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame.__graph_breaks")
_RECOMPILES = ("torch._dynamo.guards.__recompiles",)
_PARTITIONS = ("torch._inductor.scheduler.__cudagraphs",)
_SKIPS = tuple(f"torch._inductor.cudagraph_utils{tail}" for tail in ("", ".__cudagraphs", ".__perf_hints"))
"""The name moved between torch versions. These warn: they are heard as they are; the others speak only where they are asked to."""

_LIBRARY = f"{Path(torch.__file__).parent}{os.sep}"
_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_AT = re.compile(r"in user code at (.+):(\d+)$", re.MULTILINE)
_RECOMPILING = re.compile(r"Recompiling function (\S+) in (.+):(\d+)")
_FAILURE = re.compile(r"^(\d+/\d+): (.*)")
_SPLIT = re.compile(r"^\s*\S+: reason=(?P<reason>.+?), ir=\w+(?:, fx=(?P<op>[^(]+))?")
_SIZE = re.compile(r"size mismatch at index|stride mismatch at index")
_ONE_LISTENER = threading.RLock()
_OLD_SKIP = "skipping cudagraphs"
_DISABLED = "cudagraphs is disabled"
"""Said of every op of a graph that nobody wanted recorded."""

PROBE_S = 60.0
"""No further size is tried after so long: tracing a large model takes some ten seconds a graph."""


@dataclass(slots=True)
class Heard:
    """What one compiled module made the compiler say, over all the windows in which it was listened to."""

    breaks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(reason, `file.py:12` or "") -> how often. The reason's first line is its title; explanation and hints follow."""
    recompiles: list[tuple[str, str]] = field(default_factory=list)
    """(`forward (file.py:12)`, guard that failed), in order. Graphs of other modules of the same class are not held against this one."""
    skips: list[str] = field(default_factory=list)
    """Why a CUDA graph, or a part of one, was not made: Inductor's sentence and the stack under it."""
    num_skipped: int = 0
    """Graphs without a CUDA graph, as Inductor counts them."""
    _own: set[str] = field(default_factory=set)
    """Compilations made while listening: only their guards are this module's."""
    _lines: dict[tuple[str, str], str] = field(default_factory=dict)
    """Where in the user's code a break inside torch's own code was: said the first time alone."""

    @property
    def num_compiled(self) -> int:
        """Compilations so far; it stands still once nothing compiles any more."""
        return len(self._own)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A window. Loggers are put back as they were; nothing is printed that would not have been."""
        before, skipped = Counter(counters["graph_break"]), counters["inductor"]["cudagraph_skips"]
        logged = Counter(self.breaks)
        hears = {**dict.fromkeys(_BREAKS, self._hear_break), **dict.fromkeys(_RECOMPILES, self._hear_recompile)}
        hears |= {**dict.fromkeys(_PARTITIONS, self._hear_partition), **dict.fromkeys(_SKIPS, self._hear_skip)}
        try:
            # One window at a time in a process: two that end in the order they began would put each other's levels back.
            with _ONE_LISTENER, ExitStack() as undo:
                for name, hear in hears.items():
                    undo.callback(_tap(name, _Ear(hear), is_asked=name not in _SKIPS))
                undo.callback(callback_handler.remove_start_callback, callback_handler.register_start_callback(self._started))
                if not log_state.is_artifact_enabled("recompiles"):
                    log_state.artifact_names.add("recompiles")
                    undo.callback(log_state.artifact_names.discard, "recompiles")
                yield
        finally:
            self.num_skipped += counters["inductor"]["cudagraph_skips"] - skipped
            # Counted and never logged: some frames that are given up as a whole.
            titles = {_title(reason) for reason, _ in self.breaks - logged}
            for reason, number in (Counter(counters["graph_break"]) - before).items():
                if _title(reason) not in titles:
                    self.breaks[(_readable(reason), _place(reason))] += number

    def _started(self, told: Any) -> None:
        self._own.add(str(told.compile_id))

    def _hear_break(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        at = _AT.search(message)
        place = _place(message[at.end() :] if at else message, at.groups() if at else None)
        raised = str(record.exc_info[1]) if record.exc_info and record.exc_info[1] is not None else message
        reason = _readable(message.partition("Graph Break Reason:")[2] or raised)
        if at is not None:
            place = self._lines.setdefault((at[1], at[2]), place)
        self.breaks[(reason, place)] += 1

    def _hear_recompile(self, record: logging.LogRecord) -> None:
        """The newest own graph comes first: what its guard says is what changed since."""
        message = record.getMessage()
        found = _RECOMPILING.search(message)
        failures = [m.groups() for line in message.splitlines() if (m := _FAILURE.match(line.strip(" -")))]
        guard = next((text for graph, text in failures if graph in self._own), None)
        # A compilation is announced after its reasons: here it is its own last chance to be counted.
        self._own.add(str(CompileContext.current_compile_id()))
        if found is not None and guard is not None:
            self.recompiles.append((f"{_function(found[1])} ({Path(found[2]).name}:{found[3]})", _guard(guard)))

    def _hear_skip(self, record: logging.LogRecord) -> None:
        if _OLD_SKIP in (message := record.getMessage()) and message not in self.skips:
            self.skips.append(message)

    def _hear_partition(self, record: logging.LogRecord) -> None:
        """An op between two CUDA graphs, and the lines of its stack, each a message of its own."""
        message = record.getMessage()
        found = _SPLIT.match(message)
        if found is not None and _DISABLED not in found["reason"]:
            text = f"{_OLD_SKIP} due to {found['reason']} in a part of the graph" + (f": {found['op']}" if found["op"] else "")
            if text not in (skip.partition("\n")[0] for skip in self.skips):
                self.skips.append(text)
        elif _FRAME.search(message) and self.skips and " in a part of the graph" in self.skips[-1]:
            self.skips[-1] += f"\n{message}"


def probe(module: Any, calls: Iterable[Iterable[Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]]) -> tuple[tuple[str, str], ...]:
    """Recompilations with their guards that other sizes cause, traced alone: guards are Dynamo's, so no kernel is compiled to learn them.

    `calls`: for each dimension calls of several sizes, the usual one first. Dynamo compiles a second graph for the first size that differs, and makes that size a
    symbol: that graph is expected of any model. Whatever it compiles after that, it will compile again and again. Stops at PROBE_S, and where the model refuses a size.
    """
    began, heard = time.monotonic(), Heard()
    # A backend of its own, or graphs of an earlier probe would be found in Dynamo's cache.
    compiled = torch.compile(module, backend=lambda graph, _: graph.forward)
    found: list[tuple[str, str]] = []
    with heard.listening(), torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        for sizes in calls:
            for index, call in enumerate(sizes):
                seen = len(heard.recompiles)
                if time.monotonic() - began > PROBE_S:
                    return tuple(found)
                try:
                    args, kwargs = call()
                    compiled(*args, **kwargs)
                except Exception:  # noqa: BLE001 - a size the model was never made for may raise anything: nothing is learned from it
                    break
                news = heard.recompiles[seen:]
                found += news if index > 1 else [(f, g) for f, g in news if not _SIZE.search(g)] if index else []
    return tuple(found)


class _Ear(logging.Handler):
    def __init__(self, hear: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.DEBUG)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self._hear(record)


def _tap(name: str, ear: logging.Handler, *, is_asked: bool) -> Callable[[], None]:
    """Listen to a logger, silently where nobody else had asked it to speak; returns what undoes it."""
    logger = logging.getLogger(name)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(ear)
    if is_asked and not logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.DEBUG)
        logger.propagate = False

    def put_back() -> None:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = propagates

    return put_back


def _place(text: str, innermost: tuple[str | Any, ...] | None = None) -> str:
    """`model.py:12`: the innermost frame that is neither torch's nor ours; where there is none, the innermost of all."""
    frames = _FRAME.findall(text)
    if innermost is not None:
        frames.append((str(innermost[0]), str(innermost[1])))
    users = [f for f in frames if not f[0].startswith((_LIBRARY, _OURS, "<"))]
    chosen = (users or frames)[-1:]
    return f"{Path(chosen[0][0]).name}:{chosen[0][1]}" if chosen else ""


def _readable(reason: str) -> str:
    """Without the paragraphs that say that there was a break, the developers' context and the traceback: title, explanation, hints."""
    text = reason.partition("*** While handling this graph break")[0]
    is_skipped = "Skipping the function and falling back to eager" in text or "results in a skip" in text
    for end in (
        "\nUser code traceback:",
        "Stack variable source attribution:",
        "  Developer debug context:",
        "For more details about this",
    ):
        text = text.partition(end)[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    while lines[1:] and lines[0].startswith(("Encountered graph break", "Failed to handle graph break")):
        lines.pop(0)
    if not lines:
        return "no reason given"
    if is_skipped:
        lines[0] += "; its function runs uncompiled"
    return "\n".join(lines)[:2000]


def _title(reason: str) -> str:
    return _readable(reason).partition("\n")[0].removesuffix("; its function runs uncompiled")


def _function(name: str) -> str:
    """`torch_dynamo_resume_in_forward_at_29` -> `forward, from line 29 on`: what follows a break has a name of its own."""
    found = re.fullmatch(r"torch_dynamo_resume_in_(\w+?)_at_(\d+)", name)
    return f"{found[1]}, from line {found[2]} on" if found else name


def _guard(text: str) -> str:
    """`self.calls == 1  # self.calls+=1  # app/model.py:9 in forward (HINT: …)` -> `self.calls == 1, at model.py:9`."""
    condition, _, comment = text.partition("  # ")
    line = re.search(r"([^/\s]+\.py:\d+) in ", comment)
    return condition.strip() + (f", at {line[1]}" if line else "")
