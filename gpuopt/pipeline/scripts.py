"""`python infer.py args` -> Report: the program as it stands, run once under observation, with what the doctor finds in it. `gpuopt profile -- python infer.py args`.

Its output goes where it would, it may take its time, and how it ended is part of the report: crashed, timed out, never called a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpuopt.core import codec, units
from gpuopt.core.errors import BadInput, Unavailable, UsageError
from gpuopt.core.result import (
    SCHEMA_VERSION,
    Ceilings,
    Device,
    Environment,
    Finding,
    OpRecord,
    Report,
    RooflinePoint,
    Run,
    Status,
    Waterfall,
)
from gpuopt.core.script import ModelCalls, Script
from gpuopt.core.trace import Trace
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Evidence
from gpuopt.pipeline import elsewhere, environment, isolate
from gpuopt.profiling import waterfall
from gpuopt.profiling.foreign import read_foreign
from gpuopt.script.run import RESULT, TRACE
from gpuopt.script.window import CALL, FIRST, RETURN

BACKEND = "script"
"""In the place of a backend: the program decides what runs."""
CHILDREN_MATTER_S = 1.0
"""CPU time of a program's other processes from which they are mentioned: less is compilers and shells."""
_PYTHON = re.compile(r"(python|pypy)[\d.]*(\.exe)?")
_FLAGS_WITH_VALUE = ("-W", "-X")
_PLAIN_FLAGS = re.compile(r"-[uOBEsSIqvbdP]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command line, taken apart."""

    interpreter: str
    flags: tuple[str, ...]
    """Of the interpreter: `-O`."""
    words: tuple[str, ...]
    """`infer.py args`, or `-m package args`."""

    @property
    def name(self) -> str:
        """`infer.py`, `package`."""
        return self.words[1] if self.words[0] == "-m" else Path(self.words[0]).name


def run(
    argv: Sequence[str],
    timeout_s: float | None = None,
    *,
    here: Device | None = None,
    environment_here: Environment | None = None,
    traced: bool = True,
    save_inputs: Path | None = None,
    command: str = "",
    ignore: Collection[str] = (),
) -> Report:
    """Run a program once, in a process group of its own, and explain it. One run a model of the program, the longest first.

    Parameters
    ----------
    argv: `python infer.py args`, `python -m package args` or `infer.py args`; options of the interpreter stay where they are.
    timeout_s: then it is ended with all it started, and what was seen until then is explained.
    here: this machine's device with its ceilings; without it nothing is held against the roofline.
    traced: run torch.profiler over calls 3 to 8 of the first model that gets that far. Slows those calls, not the others.
    save_inputs: a folder for the tensors of each model's first call, which `--inputs` takes.

    Raises
    ------
    UsageError: no Python program, or one that is not there. Unavailable: its interpreter has no gpuopt or torch.
    """
    program = parse(argv)
    with tempfile.TemporaryDirectory(prefix="gpuopt-script-") as folder:
        out = Path(folder)
        code = _child(program, out, timeout_s, traced=traced, save_inputs=save_inputs)
        told = _told(out, program, code)
        # Read before the folder goes.
        trace, notes = _trace(out) if traced else (None, ["not traced (--no-trace): no waterfall, no kernels"])
    return _report(
        program,
        told,
        code,
        timeout_s,
        trace,
        notes,
        here=here,
        environment_here=environment_here or environment.describe(),
        command=command or f"gpuopt profile -- {shlex.join(argv)}",
        ignore=ignore,
    )


def parse(argv: Sequence[str]) -> Program:
    """Take `python -O infer.py args` apart. Raises UsageError for what is no Python program."""
    words = list(argv)
    if not words:
        raise UsageError("no program to run", fix="gpuopt profile -- python infer.py")
    interpreter = sys.executable
    flags: list[str] = []
    if _PYTHON.fullmatch(Path(words[0]).name):
        found = shutil.which(words[0])
        if found is None:
            raise UsageError(f"there is no {words[0]} here", fix="gpuopt profile -- python infer.py")
        interpreter = found
        words = words[1:]
        while words and words[0].startswith("-") and words[0] != "-m":
            if words[0] in _FLAGS_WITH_VALUE and len(words) > 1:
                flags += words[:2]
                words = words[2:]
            elif _PLAIN_FLAGS.fullmatch(words[0]) or words[0].startswith(_FLAGS_WITH_VALUE):
                flags.append(words.pop(0))
            else:
                raise UsageError(
                    f"python {words[0]} cannot be observed", fix="write the program into a file: gpuopt profile -- python infer.py"
                )
        if not words or (words[0] == "-m" and len(words) < 2):
            raise UsageError("python without a program", fix="gpuopt profile -- python infer.py")
    elif not words[0].endswith((".py", ".pyz")):
        raise UsageError(
            f"{words[0]} is no Python program", fix="gpuopt profile -- python infer.py; inside another launcher use `with gpuopt.record():`"
        )
    if words[0] != "-m" and not Path(words[0]).exists():
        raise UsageError(f"there is no file {words[0]}", fix="gpuopt profile -- python FILE, from the folder you usually start it in")
    return Program(interpreter=interpreter, flags=tuple(flags), words=tuple(words))


def _child(program: Program, out: Path, timeout_s: float | None, *, traced: bool, save_inputs: Path | None) -> int | None:
    """Its exit code, negative for a signal; None where it was ended for taking too long. Nothing it started is left behind."""
    command = [program.interpreter, *program.flags, "-m", "gpuopt.pipeline.script_child", str(out), *(["--trace"] if traced else [])]
    if save_inputs is not None:
        command += ["--save-inputs", str(save_inputs.absolute())]
    child = subprocess.Popen(
        [*command, "--", *program.words],
        start_new_session=True,
        env={**os.environ, "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99")},
    )
    try:
        return child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also after a Ctrl-C, which does not reach a group of its own.
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then make it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=isolate.TERM_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _told(out: Path, program: Program, code: int | None) -> dict[str, Any]:
    """What the child wrote last."""
    path = out / RESULT
    if not path.exists():
        if code is None:
            return {"script": {}, "state": "running"}
        raise Unavailable(
            f"{program.interpreter} could not start the recorder (exit code {code}; its own words are above): most likely it has no gpuopt, or no torch",
            fix=f"pip install gpuopt torch into that environment, or use a Python that has both, as this one does: gpuopt profile -- {shlex.join([sys.executable, *program.words])}",
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _trace(out: Path) -> tuple[Trace | None, list[str]]:
    """The traced calls with their steps: from one call's start to the next one's, so that what a program does between its calls is seen too."""
    path = out / TRACE
    if not path.exists():
        return None, [f"nothing was traced: no model with parameters was called {FIRST + 1} times"]
    data = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    marks = sorted(
        (e["ts"], e["name"], e.get("pid"), e.get("tid"))
        for e in data["traceEvents"]
        if e.get("ph") == "X" and e.get("name") in (CALL, RETURN)
    )
    starts = [mark for mark in marks if mark[1] == CALL]
    ends = [mark for mark in marks if mark[1] == RETURN]
    if ends and (not starts or ends[-1][0] > starts[-1][0]):
        starts.append(ends[-1])  # the program ended within the window: its last iteration is the call alone
    if len(starts) < 2:
        return None, ["nothing was traced: the program ended before a traced call did"]
    data["traceEvents"] += [
        {"ph": "X", "cat": "user_annotation", "name": f"ProfilerStep#{number}", "pid": a[2], "tid": a[3], "ts": a[0], "dur": b[0] - a[0]}
        for number, (a, b) in enumerate(pairwise(starts))
    ]
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        return read_foreign(path).trace, []
    except BadInput as error:
        return None, [f"the trace of its calls cannot be read: {error.message}"]


def _report(
    program: Program,
    told: dict[str, Any],
    code: int | None,
    timeout_s: float | None,
    trace: Trace | None,
    notes: list[str],
    *,
    here: Device | None,
    environment_here: Environment,
    command: str,
    ignore: Collection[str],
) -> Report:
    script = codec.from_plain(Script, told["script"], what="the recording")
    main = _main(script)
    wall_ms = main.period_s * 1e3 if main is not None and main.period_s is not None else None
    parts: Waterfall | None = None
    records: tuple[OpRecord, ...] = ()
    points: tuple[RooflinePoint, ...] = ()
    on_same = here if here is not None and (trace is None or trace.on_device == (here.kind == "cuda")) else None
    if trace is not None:
        wall_ms = wall_ms or elsewhere.mean_span_ms(trace)
        ceilings = on_same.ceilings if on_same is not None else Ceilings()
        records, points, refused = elsewhere.priced(trace, ceilings)
        parts = waterfall.build(trace, wall_ms, ceilings, records)
        notes = [
            *notes,
            *(elsewhere.told(trace)),
            *(n for n in trace.notes if not n.startswith(("no stacks", "no device events")) and "ProfilerStep" not in n),
            *refused,
        ]
    told_findings = tuple(codec.from_plain(Finding, plain, what="a finding") for plain in told.get("findings", ()))
    findings = diagnose(
        Evidence(device=on_same, wall_ms=wall_ms, trace=trace, records=records, waterfall=parts, script=script), ignore=ignore
    )
    status, reason, fix = _ending(program, told, code, timeout_s, script)
    runs = [
        Run(
            model=model.name or model.module_class,
            backend=BACKEND,
            inputs=model.inputs,
            input_source=f"the program's own, {model.saved_inputs} is saved" if model.saved_inputs else "the program's own",
            status=status,
            reason=reason,
            fix=fix,
            wall_ms=wall_ms if model is main else None,
            waterfall=parts if model is main else None,
            roofline=points if model is main else (),
            notes=(*_words(model), *(_overall(script, told, trace) + notes if model is main else ())),
            reproduce=command,
        )
        for model in script.modules
    ]
    if not runs:
        runs = [
            Run(
                model=program.name,
                backend=BACKEND,
                status=status,
                reason=reason,
                fix=fix,
                notes=tuple(_overall(script, told, trace)),
                reproduce=command,
            )
        ]
    tables: dict[str, Any] = {
        "script": codec.dump(script),
        "exit": {"code": code, "error": told.get("error"), "forks": told.get("forks", 0)},
    }
    if trace is not None:
        tables |= elsewhere.tables_of(trace)
    return Report(
        schema_version=SCHEMA_VERSION,
        command=command,
        verb="profile",
        environment=environment_here,
        device=here,
        runs=tuple(sorted(runs, key=lambda r: r.waterfall is None)),
        findings=(*(f for f in told_findings if f.code not in ignore and f.rule not in ignore), *findings),
        tables=tables,
    )


def _main(script: Script) -> ModelCalls | None:
    """The model most of the time went to, of those that were called again."""
    return max(script.modules, key=lambda m: (m.period_s is not None, m.wall_s), default=None)


def _ending(program: Program, told: dict[str, Any], code: int | None, timeout_s: float | None, script: Script) -> tuple[Status, str, str]:
    """(status, reason, fix) of how it went."""
    calls = sum(model.num_calls for model in script.modules)
    seen = f"after {calls} call{'s' if calls != 1 else ''} of its models" if calls else "before it called a model"
    if code is None:
        return (
            Status.TIMEOUT,
            f"{program.name} did not end within {timeout_s:g} s; it was ended {seen}",
            "raise --timeout, or let it do less",
        )
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        status = Status.OOM_HOST if -code == signal.SIGKILL else Status.CRASH
        likely = ", most likely by the kernel for host memory" if -code == signal.SIGKILL else ""
        return (
            status,
            f"{program.name} was ended by {name}{likely}, {seen}",
            "python -X faulthandler shows where" if status is Status.CRASH else "less at once",
        )
    if code != 0:
        raised = f": {told['error']}" if told.get("error") else ""
        where = "in a model, see the findings" if told.get("findings") else "see its own output"
        return Status.CRASH, f"{program.name} exited with {code}, {seen}{raised}", where
    if not calls:
        others = _others(told)
        why = f"; {others}, and what those did was not seen" if others else ""
        return (
            Status.BAD_INPUT,
            f"{program.name} called no torch model in this process{why}",
            "name the program that calls it; in a worker use `with gpuopt.record():`",
        )
    if told.get("state") != "ended":
        return Status.OK, "it left by os._exit or exec: what happened in its last second may be missing", ""
    return Status.OK, "", ""


def _others(told: dict[str, Any]) -> str:
    """Other processes of the program, in words; "" where they did nothing that matters."""
    forks, cpu_s = int(told.get("forks") or 0), float(told.get("children_cpu_s") or 0.0)
    if forks:
        return f"it forked {forks} times"
    return f"other processes it started used {units.format_seconds(cpu_s)} of CPU" if cpu_s >= CHILDREN_MATTER_S else ""


def _words(model: ModelCalls) -> list[str]:
    """One model's calls."""
    times = [f"{units.format_seconds(model.typical_s)} typically"] if model.typical_s is not None else []
    times += [f"the first took {units.format_seconds(model.first_s)}"] if model.first_s is not None and model.num_calls > 1 else []
    text = (
        f"{model.name or model.module_class} ({model.module_class}) was called {model.num_calls} times at {model.line or 'an unknown line'}"
    )
    text += f" on {model.device}" if model.device else ""
    found = [text + (f": {', '.join(times)} (host time: a GPU may still be at work when a call returns)" if times else "")]
    return [*found, f"its last failure: {model.failure}"] if model.failure else found


def _overall(script: Script, told: dict[str, Any], trace: Trace | None) -> list[str]:
    share = f" ({units.format_fraction(script.overhead_s / script.wall_s)})" if script.wall_s else ""
    notes = [f"observing took {units.format_seconds(script.overhead_s)} of {units.format_seconds(script.wall_s)}{share}"]
    if trace is not None:
        notes.append(
            f"up to six calls from call {FIRST} on ran under torch.profiler, which took {units.format_seconds(script.tracing_s)} to start and to write; "
            "times come from the other calls where there are any, from the start of one to the next; what the program prints about its own speed includes the profiler"
        )
    others = _others(told)
    if others:
        notes.append(f"{others}: what they did was not seen")
    return [*notes, *script.notes]
