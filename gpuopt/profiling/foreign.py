"""A torch.profiler trace from somewhere else (Chrome JSON, plain or gzip) -> Trace, with what it cannot say in its notes. Read as a stream: a million events in seconds.

The file is somebody else's: every limit is checked while it is read, and nothing that is missing is made up.
"""

from __future__ import annotations

import gc
import math
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
from gpuopt.profiling.events import MODULE, STEP, from_chrome
from gpuopt.profiling.json_stream import JsonStream, opened

MAX_BYTES = 4 * 2**30
"""Of JSON, inflated."""
MAX_EVENTS = 4_000_000
"""Kept ones: about 1.5 KiB of memory each."""
MAX_TIME_US = 1e16
"""A time stamp is microseconds since 1970 at most: this is the year 2286."""

_EXPORT = (
    "export it again: prof.export_chrome_trace(path) after the `with profile(...)` block has ended, and compare sizes when you copy it"
)
_RECORD = "record it with torch.profiler.profile(activities=[CPU, CUDA], record_shapes=True, schedule=schedule(wait=1, warmup=2, active=3)) and export_chrome_trace"

# torch 1.8 to 1.12 wrote other names: kineto's tb_plugin/torch_tb_profiler/profiler/trace.py reads both.
_OLD = {"operator": "cpu_op", "runtime": "cuda_runtime", "memcpy": "gpu_memcpy", "memset": "gpu_memset"}
_KEPT = frozenset({"cpu_op", "cuda_runtime", "cuda_driver", "kernel", "gpu_memcpy", "gpu_memset"})
_SILENT = frozenset(
    {"user_annotation", "gpu_user_annotation", "python_function", "cpu_instant_event", "overhead", "trace", "ac2g", "fwdbwd", "", "async"}
)
"""Categories that are passed over without a word: labels, stacks and arrows."""
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
    """`nvidia`, `amd` or "" where nothing ran on a device, or nobody can tell."""
    num_events: int
    """In the file, of any kind."""
    facts: dict[str, str] = field(default_factory=dict)
    """What else the file says of its origin: `cuda_runtime_version`, …"""


def read(path: Path, *, max_bytes: int = MAX_BYTES, max_events: int = MAX_EVENTS) -> Trace:
    """The trace in a file, `.json` or `.json.gz` by its content. See `read_foreign`."""
    return read_foreign(path, max_bytes=max_bytes, max_events=max_events).trace


def read_foreign(path: Path, *, max_bytes: int = MAX_BYTES, max_events: int = MAX_EVENTS) -> Foreign:
    """Read a file that `export_chrome_trace` wrote anywhere, on any torch since 1.8.

    Steps are the `ProfilerStep#N` annotations of the thread that has most of them, else the whole trace as one. Whatever was not recorded is a note of the trace.

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
    """Takes events one by one; keeps what `from_chrome` reads, and remembers what was missing."""

    def __init__(self, name: str, max_events: int) -> None:
        self.name = name
        self.max_events = max_events
        self.events: list[dict[str, Any]] = []
        self.steps: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        self.modules: dict[tuple[Any, Any], list[tuple[float, float, str]]] = {}
        self.skipped: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.devices: Counter[int] = Counter()

        self.processes: set[int | str | None] = set()
        self.properties: list[Any] = []
        self.facts: dict[str, str] = {}
        self.num_events = 0
        self.has_own_steps = False
        self.num_shaped = 0
        self.num_stacks = 0
        self.num_hip = 0
        self.first_us = math.inf
        self.last_us = -math.inf
        self._names: dict[str, str] = {}
        self._lists: dict[Any, Any] = {}

    def about(self, key: str, value: Any) -> None:
        """Something the file says besides its events."""
        if key == "deviceProperties" and isinstance(value, list):
            self.properties = value
        elif isinstance(value, str | int | float) and key not in ("traceName", "baseTimeNanoseconds", "displayTimeUnit"):
            self.facts[key] = str(value)[:80]

    def add(self, batch: list[dict[str, Any]]) -> None:
        """Some events: what is read of them is kept, what nobody reads is dropped here. Long on purpose: it runs a million times."""
        names, seen, events = self._names, self.seen, self.events
        for event in batch:
            self.num_events += 1
            if event.get("ph") != "X" or "ts" not in event:
                continue
            start, dur = event["ts"], event.get("dur", 0)
            # NaN compares false.
            if type(start) not in _NUMBERS or type(dur) not in _NUMBERS or not abs(start) <= MAX_TIME_US or not 0 <= dur <= MAX_TIME_US:
                raise self._impossible(event)
            category = event.get("cat", "")
            name = event.get("name", "")
            if type(category) is not str or type(name) is not str:
                raise self._impossible(event)
            category = category.lower() if category not in _KEPT else category
            category = _OLD.get(category, category)
            if category not in _KEPT or name.startswith("ProfilerStep#"):
                self._label(event, category, name)
                continue
            seen[category] += 1
            if start < self.first_us:
                self.first_us = start
            if start + dur > self.last_us:
                self.last_us = start + dur
            args = event.get("args")
            if type(args) is not dict:
                args = {}
            pid, tid = event.get("pid", ""), event.get("tid", "")
            if category == "cpu_op":
                # A forward calls the same shapes again and again: equal lists become one list.
                slim: dict[str, Any] = {"External id": args.get("External id")}
                if dims := args.get("Input Dims"):
                    slim["Input Dims"] = self._shared(dims)
                    self.num_shaped += 1
                if types := args.get("Input type"):
                    slim["Input type"] = self._shared(types)
                self.processes.add(pid if type(pid) is int else str(pid))
            elif category in ("cuda_runtime", "cuda_driver"):
                slim = {"External id": args.get("External id"), "correlation": args.get("correlation")}
                self.num_hip += name.startswith("hip")
            else:
                slim = {names.setdefault(key, key): self._shared(value) if type(value) is list else value for key, value in args.items()}
                device = args.get("device")
                self.devices[device if type(device) is int else 0] += 1
            # A new dict: what is left of the parsed one is freed with its batch, while the memory is still in the cache.
            events.append(
                {
                    "ph": "X",
                    "cat": category,
                    "name": names.setdefault(name, name),
                    "pid": pid,
                    "tid": tid,
                    "ts": start,
                    "dur": dur,
                    "args": slim,
                }
            )
        if len(events) > self.max_events:
            raise BadInput(
                f"{self.name} holds more than {self.max_events} events of ops and device work",
                fix="record fewer steps (schedule(active=3)), or raise --trace-events",
            )

    def _label(self, event: dict[str, Any], category: str, name: str) -> None:
        """An event that is no work: a step, a module, a stack, or nothing anybody reads."""
        start, dur = event["ts"], event.get("dur", 0)
        if category in ("user_annotation", "cpu_op") and _STEP.fullmatch(name):
            thread = self._thread(event)
            self.steps.setdefault(thread, []).append(_mark(STEP, thread, start, dur))
        elif category == "user_annotation":
            # Our own marks, the data loader's, a user's record_function: few, and `from_chrome` knows which it reads.
            self.has_own_steps |= name == STEP
            self.events.append(_mark(self._names.setdefault(name, name), self._thread(event), start, dur))
        elif category == "python_function":
            self.num_stacks += 1
            if name.startswith(_NN_MODULE):
                self.modules.setdefault(self._thread(event), []).append((start, dur, name.removeprefix(_NN_MODULE)))
        elif category not in _SILENT:
            self.skipped[category[:40]] += 1

    def _shared(self, value: Any) -> Any:
        """The first list that was equal to this one."""
        try:
            return self._lists.setdefault(tuple([tuple(v) if type(v) is list else v for v in value]), value)
        except TypeError:  # deeper lists, or no list at all
            return self._lists.setdefault(str(value), value)

    @staticmethod
    def _thread(event: dict[str, Any]) -> tuple[str, str]:
        return str(event.get("pid", "")), str(event.get("tid", ""))

    def _impossible(self, event: dict[str, Any]) -> BadInput:
        what = ", ".join(f"{key} {str(event.get(key))[:40]!r}" for key in ("ts", "dur", "cat"))
        return BadInput(f"{self.name}: event {self.num_events} ({str(event.get('name'))[:60]}) cannot be: {what}", fix=_EXPORT)

    def foreign(self) -> Foreign:
        """Everything that was kept, through `from_chrome`. Raises BadInput where there is nothing to explain."""
        if not self.seen:
            kinds = f": {', '.join(sorted(self.skipped)[:4])}" if self.skipped else ""
            raise BadInput(f"{self.name} is a trace without ops or device work ({self.num_events} events{kinds})", fix=_RECORD)
        notes = [*self._steps(), *self._modules(), *self._missing()]
        on_device = bool(self.devices)
        index = self.devices.most_common(1)[0][0] if on_device else 0
        trace = from_chrome({"traceEvents": self.events}, device=f"cuda:{index}" if on_device else "cpu", notes=tuple(notes))
        self.events.clear()
        device = self._device(index) if on_device else None
        vendor = ""
        if on_device:
            named = device.name.lower() if device is not None else ""
            vendor = "amd" if self.num_hip or "amd" in named or "instinct" in named or "radeon" in named else "nvidia"
        return Foreign(trace=trace, device=device, vendor=vendor, num_events=self.num_events, facts=self.facts)

    def _steps(self) -> list[str]:
        """Add the steps as `from_chrome` knows them."""
        if self.has_own_steps:
            return []
        if not self.steps:
            # One more nanosecond: an event at the very end is inside.
            self.events.append(_mark(STEP, ("", ""), self.first_us, self.last_us - self.first_us + 0.001))
            return [
                "no ProfilerStep annotations: the whole trace is explained as one call, whatever it ran (schedule=… and prof.step() mark the calls)"
            ]
        thread = max(self.steps, key=lambda t: (len(self.steps[t]), -self.steps[t][0]["ts"]))
        marks = sorted(self.steps[thread], key=lambda e: e["ts"])
        apart = [marks[0]]
        for mark in marks[1:]:
            if mark["ts"] >= apart[-1]["ts"] + apart[-1]["dur"] - 0.001:
                apart.append(mark)
        self.events += apart
        notes = [f"{len(apart)} calls by their ProfilerStep annotations"]
        if len(apart) < len(marks):
            notes.append(f"{len(marks) - len(apart)} ProfilerStep annotations lie inside others and were left out")
        if len(self.steps) > 1:
            notes.append(
                f"{len(self.steps)} threads have steps of their own (several ranks in one file?): those of thread {thread[0]}/{thread[1]} are explained"
            )
        return notes

    def _modules(self) -> list[str]:
        """Forwards that `with_stack` or `with_modules` recorded, as ranges under the profiler's own names."""
        if not self.modules:
            return []
        for thread, ranges in self.modules.items():
            open_ranges: list[tuple[float, str]] = []
            for start, dur, name in sorted(ranges, key=lambda r: (r[0], -r[1])):
                while open_ranges and open_ranges[-1][0] <= start:
                    open_ranges.pop()
                path = f"{open_ranges[-1][1]}.{name}" if open_ranges else name
                open_ranges.append((start + dur, path))
                self.events.append(_mark(f"{MODULE}{path}|{name.rpartition('_')[0] or name}", thread, start, dur))
        return ["modules carry the profiler's names (class and number), not the model's"]

    def _missing(self) -> list[str]:
        """What this trace cannot say, and what would have recorded it."""
        seen, notes = self.seen, []
        num_launches = seen["cuda_runtime"] + seen["cuda_driver"]
        if not self.devices and num_launches:
            notes.append(
                f"{num_launches} runtime calls and no kernel: the profiler lost the device's side (CUPTI taken by another tool?); only host times can be explained"
            )
        elif not self.devices:
            notes.append("no device events: a CPU-only run, or ProfilerActivity.CUDA was off; what a GPU did cannot be said")
        elif not num_launches:
            notes.append("no runtime calls: launch gaps, waits and which op launched a kernel cannot be said")
        if not seen["cpu_op"]:
            notes.append("no host ops (ProfilerActivity.CPU was off): kernels stand under their own names")
        elif not self.num_shaped:
            notes.append("no shapes (record_shapes=True records them): FLOPs and bytes of ops cannot be said")
        if not self.num_stacks:
            notes.append("no stacks (with_stack=True records them): no module or source line can be named")
        if self.num_hip:
            notes.append(
                "an AMD trace (HIP runtime): kernels and copies are read alike, but rules and ceilings here are NVIDIA's, so none is applied"
            )
        if len(self.devices) > 1:
            listed = ", ".join(str(d) for d in sorted(self.devices))
            notes.append(f"work on devices {listed}: their timelines are laid over each other, busy means any of them")
        if len(self.processes) > 1:
            notes.append(f"ops of {len(self.processes)} processes in one file: they are explained as one")
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


def _mark(name: str, thread: tuple[str, str], start: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "pid": thread[0], "tid": thread[1], "ts": start, "dur": dur, "args": {}}
