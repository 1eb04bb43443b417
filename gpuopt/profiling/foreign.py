"""A torch.profiler trace from somewhere else (Chrome JSON, plain or gzip) -> Trace, with what it cannot say in its notes. Read as a stream: a million events in seconds.

The file is somebody else's: every limit is checked while it is read, and nothing that is missing is made up.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuopt.core import units
from gpuopt.core.errors import BadInput
from gpuopt.core.result import Device
from gpuopt.core.trace import Trace
from gpuopt.profiling import calls, frames, ranks
from gpuopt.profiling.events import MODULE, STEP, from_rows
from gpuopt.profiling.json_stream import JsonStream, opened
from gpuopt.profiling.rows import WORK, Maker, MarkRow, Rows

MAX_BYTES = 4 * 2**30
"""Of JSON, inflated."""
MAX_EVENTS = 4_000_000
"""Kept ones: about 0.8 KiB of memory each."""
MAX_TIME_US = 1e16
"""A time stamp is microseconds since 1970 at most: this is the year 2286."""

_EXPORT = (
    "export it again: prof.export_chrome_trace(path) after the `with profile(...)` block has ended, and compare sizes when you copy it"
)
_RECORD = "record it with torch.profiler.profile(activities=[CPU, CUDA], record_shapes=True, schedule=schedule(wait=1, warmup=2, active=3)) and export_chrome_trace"

MAX_BAD_SHARE = 0.001
"""Of the events whose times cannot be: profilers lose a clock now and then, and a thousandth changes no figure. A file with more is not believed."""

_WORDS = {
    "cpu_op": "cpu_op",
    "cuda_runtime": "cuda_runtime",
    "cuda_driver": "cuda_runtime",
    "xpu_runtime": "cuda_runtime",
    "xpu_driver": "cuda_runtime",
    "kernel": "kernel",
    "gpu_memcpy": "gpu_memcpy",
    "gpu_memset": "gpu_memset",
    "user_annotation": "user_annotation",
    # torch 1.8 to 1.12 wrote other names: kineto's tb_plugin/torch_tb_profiler/profiler/trace.py reads both.
    "operator": "cpu_op",
    "runtime": "cuda_runtime",
    "memcpy": "gpu_memcpy",
    "memset": "gpu_memset",
}
"""Category -> the one it is read as."""
_SILENT = frozenset(
    {"gpu_user_annotation", "cpu_instant_event", "overhead", "trace", "ac2g", "fwdbwd", "", "async", "cuda_sync", "cuda_event"}
    | {"cuda_profiler_range", "external_correlation", "collective_comm"}
)
"""Categories that are passed over without a word: labels, arrows, and what other events say already."""
_NO_FACTS = frozenset(
    {
        "traceName",
        "baseTimeNanoseconds",
        "displayTimeUnit",
        "schemaVersion",
        "trace_id",
        "record_shapes",
        "with_stack",
        "with_flops",
        "with_modules",
        "profile_memory",
        "host_name",
    }
)
_NUMBERS = (int, float)
_STEP = re.compile(r"ProfilerStep#\d+")
_NN_MODULE = "nn.Module: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A trace and what its file says about the machine it was taken on."""

    trace: Trace
    device: Device | None
    """From `deviceProperties`: of the first device that ran something. None where the file does not say."""
    vendor: str
    """`nvidia`, `amd` or `intel`; NVIDIA where nothing names another. "" where nothing ran on a device."""
    num_events: int
    """In the file, of any kind."""
    facts: dict[str, str] = field(default_factory=dict)
    """What else the file says of its origin: `cuda_runtime_version`, …"""


def read(path: Path, *, max_bytes: int = MAX_BYTES, max_events: int = MAX_EVENTS) -> Trace:
    """The trace in a file, `.json` or `.json.gz` by its content. See `read_foreign`."""
    return read_foreign(path, max_bytes=max_bytes, max_events=max_events).trace


def read_foreign(path: Path, *, max_bytes: int = MAX_BYTES, max_events: int = MAX_EVENTS) -> Foreign:
    """Read a file that `export_chrome_trace` wrote anywhere, on any torch since 1.8.

    Steps are the `ProfilerStep#N` annotations of the thread that has most of them, else a range of the user's that repeats and holds most of the trace, else the whole as one. Whatever was not recorded is a note of the trace.

    Parameters
    ----------
    max_bytes: of JSON, inflated. max_events: of those that are kept (ops, runtime calls, device work).

    Raises
    ------
    BadInput: no such file, empty, truncated, larger than a limit, no JSON, no trace, a second document behind the first, or times that cannot be.
    """
    with uncollected():
        kept = _Kept(path.name, max_events)
        with opened(path, max_bytes=max_bytes, export=_EXPORT) as stream:
            _document(stream, kept)
        return kept.foreign()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: millions of small values that all stay, walked again and again, would double the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _document(stream: JsonStream, kept: _Kept) -> None:
    """Feed every event of the one document in the stream."""
    start = stream.peek()
    if start == "[":  # Chrome's other form, which torch.autograd.profiler wrote
        for batch in stream.array():
            kept.add(batch)
    elif start == "{":
        seen: set[str] = set()
        for key in stream.keys():
            if key in seen:
                raise BadInput(f"{stream.name} holds the key {key!r} twice", fix=_EXPORT)
            seen.add(key)
            if key != "traceEvents":
                kept.about(key, stream.value())
                continue
            if stream.peek() != "[":
                raise BadInput(f"{stream.name}: its traceEvents are no list", fix=_RECORD)
            for batch in stream.array():
                kept.add(batch)
        if {"ph", "ts"} & seen and "traceEvents" not in seen:
            raise BadInput(
                f"{stream.name} begins with a bare event: one event a line (JSON Lines) is no trace",
                fix='put the events into one list: {"traceEvents": [ … , … ]}',
            )
        if "traceEvents" not in seen:
            raise BadInput(
                f"{stream.name} is JSON, but no trace: it has no traceEvents"
                + (f" (it has {', '.join(sorted(seen)[:4])})" if seen else ""),
                fix=_RECORD,
            )
    else:
        raise BadInput(f"{stream.name} is no torch.profiler trace: it begins with {start!r}", fix=_RECORD)
    stream.end()


class _Kept:
    """Takes events in batches; keeps rows of what is read, and remembers what was missing."""

    def __init__(self, name: str, max_events: int) -> None:
        self.name = name
        self.max_events = max_events
        self.rows = Rows()
        self.steps: dict[str, list[MarkRow]] = {}
        self.modules: dict[str, list[MarkRow]] = {}
        self.skipped: Counter[str] = Counter()
        self.devices: Counter[int] = Counter()
        self.properties: list[Any] = []
        self.facts: dict[str, str] = {}
        self.num_events = 0
        self.num_stacks = 0
        self.num_bad = 0
        self.first_bad = ""
        self.runtimes: set[str] = set()
        self._make = Maker()
        self._lists = {category: self.rows.of(category) for category in _WORDS.values()}
        self._lines: dict[str, str] = {}

    def about(self, key: str, value: Any) -> None:
        """Something the file says besides its events."""
        if key == "deviceProperties" and isinstance(value, list):
            self.properties = value
        elif isinstance(value, str | int | float) and key not in _NO_FACTS:
            self.facts[key] = _version(value) if key.endswith("_version") else str(value)[:80]

    def add(self, batch: list[dict[str, Any]]) -> None:
        """Some events: what is read of them becomes rows, what nobody reads is dropped here. Long on purpose: it runs a million times."""
        make, lists, words = self._make, self._lists, _WORDS
        self.num_events += len(batch)
        for event in batch:
            if event.get("ph") != "X" or "ts" not in event:
                continue
            category, name = event.get("cat", ""), event.get("name", "")
            if type(category) is not str or type(name) is not str:
                self._impossible(event)
                continue
            word = words.get(category)
            if word is None:
                category = category.lower()
                word = words.get(category)
                if word is None and category != "python_function":
                    if category not in _SILENT:
                        self.skipped[category[:40]] += 1
                    continue
            start, dur = event["ts"], event.get("dur", 0)
            # NaN compares false.
            if type(start) not in _NUMBERS or type(dur) not in _NUMBERS or not abs(start) <= MAX_TIME_US or not 0 <= dur <= MAX_TIME_US:
                self._impossible(event)
                continue
            args = event.get("args")
            if type(args) is not dict:
                args = {}
            if word == "cpu_op":
                if name.startswith("ProfilerStep#") and _STEP.fullmatch(name):
                    self._step(event, start, dur)
                else:
                    lists["cpu_op"].append(make.op(event, args, start, dur))
            elif word == "cuda_runtime":
                lists["cuda_runtime"].append(make.call(event, args, start, dur))
            elif word in WORK:
                row = make.work(event, args, start, dur)
                self.devices[row.device] += 1
                lists[word].append(row)
            elif word == "user_annotation":
                if _STEP.fullmatch(name):
                    self._step(event, start, dur)
                else:
                    lists["user_annotation"].append(make.mark(event, start, dur))
            else:
                self._frame(event, name, start, dur)
        if len(self.rows) > self.max_events:
            raise BadInput(
                f"{self.name} holds more than {self.max_events} events of ops and device work",
                fix="record fewer steps (schedule(active=3)), or raise --trace-events",
            )

    def _step(self, event: dict[str, Any], start: float, dur: float) -> None:
        mark = self._make.mark(event, start, dur)
        self.steps.setdefault(mark.thread, []).append(mark)

    def _frame(self, event: dict[str, Any], name: str, start: float, dur: float) -> None:
        """A Python frame: a module's forward, a line of the user's, or the framework's own, which nobody reads."""
        self.num_stacks += 1
        if name.startswith(_NN_MODULE):
            mark = self._make.mark(event, start, dur)
            self.modules.setdefault(mark.thread, []).append(mark)
            return
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = frames.line(name)
        if line:
            self.rows.frames.append(MarkRow(start, dur, line, self._make.thread(event)))

    def _impossible(self, event: dict[str, Any]) -> None:
        """An event that cannot be is left out; `foreign` refuses a file with many of them."""
        self.num_bad += 1
        if self.num_bad == 1:
            what = ", ".join(f"{key} {str(event.get(key))[:40]!r}" for key in ("ts", "dur", "cat"))
            self.first_bad = f"({str(event.get('name'))[:60]}) cannot be: {what}"

    def foreign(self) -> Foreign:
        """Everything that was kept, through `from_rows`. Raises BadInput where there is nothing to explain, or little of it can be believed."""
        rows = self.rows
        if self.num_bad > MAX_BAD_SHARE * self.num_events:
            others = f"; {self.num_bad} of {self.num_events} events are like it" if self.num_bad > 1 else ""
            raise BadInput(f"{self.name}: an event {self.first_bad}{others}", fix=_EXPORT)
        if not (rows.ops or rows.calls or self.devices):
            kinds = f": {', '.join(sorted(self.skipped)[:4])}" if self.skipped else ""
            raise BadInput(f"{self.name} is a trace without ops or device work ({self.num_events} events{kinds})", fix=_RECORD)
        self.runtimes = {call.name[:3] for call in rows.calls}
        notes = ranks.once(rows)
        notes += self._calls()
        notes += self._modules()
        notes += self._missing()
        on_device = bool(rows.kernels or rows.memsets or rows.copies)
        index = (
            Counter(w.device for works in (rows.kernels, rows.memsets, rows.copies) for w in works).most_common(1)[0][0] if on_device else 0
        )
        trace = from_rows(rows, device=f"cuda:{index}" if on_device else "cpu", notes=tuple(notes))
        device = self._device(index) if on_device else None
        return Foreign(
            trace=trace,
            device=device,
            vendor=self._vendor(device.name.lower() if device is not None else "") if on_device else "",
            num_events=self.num_events,
            facts=self.facts,
        )

    def _vendor(self, named: str) -> str:
        if "hip" in self.runtimes or "amd" in named or "instinct" in named or "radeon" in named:
            return "amd"
        return "intel" if "intel" in named or not self.runtimes.isdisjoint({"ur_", "urE", "urQ", "urU", "ze_", "zeC"}) else "nvidia"

    def _calls(self) -> list[str]:
        """Add the calls as `from_rows` knows them, of one process."""
        rows = self.rows
        is_ours = any(mark.name == STEP for mark in rows.marks)
        found: list[MarkRow] = []
        notes: list[str] = []
        if self.steps and not is_ours:
            found, notes = calls.of_profiler(self.steps, STEP)
        threads = Counter(op.thread for op in rows.ops)
        if len({ranks.process_of(thread) for thread in threads}) > 1:
            busiest = found[0].thread if found else threads.most_common(1)[0][0]
            notes += ranks.keep_process(rows, ranks.process_of(busiest))
        if not found and not is_ours:
            kinds = (rows.ops, rows.calls, rows.kernels, rows.memsets, rows.copies)
            first = min(row.ts for kind in kinds for row in kind)
            last = max(row.ts + row.dur for kind in kinds for row in kind)
            found, guess = calls.guessed(rows.marks, first, last, STEP)
            notes += guess
        rows.marks += found
        return notes

    def _modules(self) -> list[str]:
        """Forwards that `with_stack` or `with_modules` recorded, as ranges under the profiler's own names."""
        for thread, ranges in self.modules.items():
            open_ranges: list[tuple[float, str]] = []
            for mark in sorted(ranges, key=lambda m: (m.ts, -m.dur)):
                name = mark.name.removeprefix(_NN_MODULE)
                while open_ranges and open_ranges[-1][0] <= mark.ts:
                    open_ranges.pop()
                path = self._make.name(f"{open_ranges[-1][1]}.{name}" if open_ranges else name)
                open_ranges.append((mark.ts + mark.dur, path))
                label = self._make.name(f"{MODULE}{path}|{name.rpartition('_')[0] or name}")
                self.rows.marks.append(MarkRow(mark.ts, mark.dur, label, thread))
        return ["modules carry the profiler's names (class and number), not the model's"] if self.modules else []

    def _missing(self) -> list[str]:
        """What this trace cannot say, and what would have recorded it."""
        rows, notes = self.rows, []
        if not self.devices and rows.calls:
            notes.append(
                f"{len(rows.calls)} runtime calls and no kernel: the profiler lost the device's side (CUPTI taken by another tool?); only host times can be explained"
            )
        elif not self.devices:
            notes.append("no device events: a CPU-only run, or ProfilerActivity.CUDA was off; what a GPU did cannot be said")
        elif not rows.calls:
            notes.append("no runtime calls: launch gaps, waits and which op launched a kernel cannot be said")
        has_graphs = any("GraphLaunch" in call.name for call in rows.calls)
        if not rows.ops and has_graphs:
            notes.append(
                "no host ops: what ran were CUDA graph replays, or ProfilerActivity.CPU was off; kernels stand under their own names"
            )
        elif not rows.ops:
            notes.append(
                "no host ops (ProfilerActivity.CPU was off, or another runtime than torch launched): kernels stand under their own names"
            )
        elif not any(op.shapes for op in rows.ops):
            notes.append("no shapes (record_shapes=True records them): FLOPs and bytes of ops cannot be said")
        if not self.num_stacks:
            notes.append("no stacks (with_stack=True records them): no module or source line can be named")
        elif rows.frames:
            notes.append("source lines are those at which the calling function begins: torch.profiler records no others")
        if "hip" in self.runtimes:
            notes.append(
                "an AMD trace (HIP runtime): kernels and copies are read alike, but rules and ceilings here are NVIDIA's, so none is applied"
            )
        elif self._vendor("") == "intel":
            notes.append(
                "an Intel trace (XPU runtime): kernels and copies are read alike, but rules and ceilings here are NVIDIA's, so none is applied"
            )
        if len(self.devices) > 1:
            listed = ", ".join(str(d) for d in sorted(self.devices))
            notes.append(f"work on devices {listed}: their timelines are laid over each other, busy means any of them")
        if self.num_bad:
            notes.append(f"{self.num_bad} events were left out, their times or names cannot be; the first: {self.first_bad}")
        if self.skipped:
            listed = ", ".join(f"{n} {kind}" for kind, n in self.skipped.most_common(4))
            notes.append(f"events of kinds that are not read here: {listed}")
        return notes

    def _device(self, index: int) -> Device | None:
        """From `deviceProperties`; None where the file has none for this device."""
        rows = [row for row in self.properties if isinstance(row, dict) and isinstance(row.get("name"), str)]
        row = next((row for row in rows if row.get("id") == index), rows[0] if len(rows) == 1 else None)
        if row is None:
            return None
        major, minor = row.get("computeMajor"), row.get("computeMinor")
        return Device(
            id=f"cuda:{index}",
            name=str(row["name"])[:80],
            kind="cuda",
            capability=f"{major}.{minor}" if isinstance(major, int) and isinstance(minor, int) else None,
            num_sms=row["numSms"] if isinstance(row.get("numSms"), int) else None,
            memory_bytes=row["totalGlobalMem"] if isinstance(row.get("totalGlobalMem"), int) else None,
            notes=(
                f"as the trace describes it: {units.format_bytes(row['totalGlobalMem'])}"
                if isinstance(row.get("totalGlobalMem"), int)
                else "as the trace describes it",
            ),
        )


def _version(value: str | float) -> str:
    """CUDA's 13000 -> 13.0; CUPTI's 130001 -> 13.0.1 and older 26 as they are."""
    number = value if isinstance(value, int) else 0
    if 9000 <= number < 100_000:
        return f"{number // 1000}.{number % 1000 // 10}"
    if number >= 100_000:
        return f"{number // 10_000}.{number % 10_000 // 100}.{number % 100}"
    return str(value)[:80]
