"""Job -> what the terminal shows: the report to stdout and to --json, progress and warnings to stderr, errors in two lines."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpuopt._version import __version__
from gpuopt.cli.progress import Screen
from gpuopt.cli.streams import confirmed, emit, has_colour, is_terminal, require_writable, tell, write_whole
from gpuopt.core.errors import GpuoptError, Untrusted, UsageError
from gpuopt.core.progress import Progress
from gpuopt.core.result import SCHEMA_VERSION, Environment, Failure, Report
from gpuopt.core.spec import Job
from gpuopt.reports.figures import clean

if TYPE_CHECKING:
    from gpuopt.reports.content.blocks import View

PLAIN_WIDTH = 140
"""Columns where stdout is no terminal and COLUMNS says nothing."""


def run(
    job: Job,
    act: Callable[[Job, Progress], Report],
    *,
    json: str | None = None,
    quiet: bool = False,
    force: bool = False,
    ask: bool = True,
    view: View | None = None,
) -> int:
    """Do the job and show its report; returns the exit code. `--json` is opened first, rewritten as the job goes, and written on failure too."""
    from gpuopt.pipeline.gates import exit_code

    with json_sink(json, force=force) as sink, Screen(quiet=quiet, on_report=sink.write_partial) as screen:
        try:
            report = _asking(job, act, screen, ask=ask)
        except BaseException as error:
            with contextlib.suppress(GpuoptError):  # the first error is the one to tell
                sink.write(_failed(job, screen.last, error))
            raise
        sink.write(report)
    if json != "-":
        emit(rendered(report, view))
    return exit_code(report, strict=job.strict)


def run_all(
    recipes: Sequence[Path],
    jobs: Sequence[Job],
    act: Callable[..., Sequence[Report]],
    *,
    folder: str | None = None,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Do several jobs as one command and show their reports; returns the worst exit code. In `folder`, each has a report of its own, written whenever more of it is known."""
    from gpuopt.pipeline.gates import exit_code

    names = _names(recipes)
    if folder == "-":
        raise UsageError("several reports are no one stdout", fix="--json DIR")
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{clean(folder, 200)} cannot be made: {error.strerror}", fix="--json DIR") from error
    with contextlib.ExitStack() as stack:
        sinks = [
            stack.enter_context(json_sink(str(Path(folder) / f"{name}.json") if folder is not None else None, force=force))
            for name in names
        ]
        known: dict[int, Report] = {}

        whole: set[int] = set()
        unwritten: dict[int, GpuoptError] = {}

        def keep(number: int, report: Report, is_whole: bool) -> None:
            known[number] = report
            whole.update([number] if is_whole else [])
            try:
                sinks[number].write_partial(report)
            except GpuoptError as error:  # a full disk ends no other recipe: it is told when all are done
                unwritten[number] = error
            else:
                unwritten.pop(number, None)

        with Screen(quiet=quiet, on_report=lambda report: None) as screen:
            try:
                reports = act(jobs, screen, on_report=keep)
            except BaseException as error:
                for number, job in enumerate(jobs):
                    if number not in whole:
                        with contextlib.suppress(GpuoptError):  # the first error is the one to tell
                            sinks[number].write(_failed(job, known.get(number), error))
                with contextlib.suppress(GpuoptError):  # what is done is not lost with the others, also where --json keeps nothing
                    for number in sorted(whole):
                        emit(f"{names[number]}\n\n{rendered(known[number])}\n")
                raise
    for name, report in zip(names, reports, strict=True):
        emit(f"{name}\n\n{rendered(report)}\n")
    if unwritten:
        raise next(iter(unwritten.values()))
    return max(exit_code(report, strict=job.strict) for job, report in zip(jobs, reports, strict=True))


def _names(recipes: Sequence[Path]) -> list[str]:
    """What tells recipes apart: the file's name, or its folder's where it is called recipe. Raises UsageError where two are the same."""
    names = [path.absolute().parent.name if path.stem == "recipe" else path.stem for path in recipes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two recipes are called {clean(name, 200)}", fix="run them apart: their reports would replace each other")
    return names


def _asking(job: Job, act: Callable[[Job, Progress], Report], screen: Screen, *, ask: bool) -> Report:
    """Where a file wants consent and somebody is there to give it, ask once and start again."""
    try:
        return act(job, screen)
    except Untrusted as error:
        files = [c.model.text for c in job.candidates if Path(c.model.text).exists()]
        if not ask or len(set(files)) != 1 or not is_terminal(sys.stdin) or not is_terminal(sys.stderr):
            raise
        screen.pause()
        from gpuopt.trust import consent

        tell(f"{clean(error.message, 2000)}\n")
        if not confirmed(f"Let {clean(files[0], 200)} run its code, now and in future?"):
            raise
        tell(f"remembered sha256:{consent.record(files[0])}\n")
        return act(job, screen)


def rendered(report: Report, view: View | None = None) -> str:
    """A report as text for this stdout: its width, and colours where it has them."""
    from gpuopt.reports import console

    out = sys.stdout
    columns = os.environ.get("COLUMNS", "")
    if not is_terminal(out):
        return console.text(report, view, width=int(columns) if columns.isdigit() and int(columns) > 0 else PLAIN_WIDTH)
    width = shutil.get_terminal_size().columns
    return console.coloured(report, view, width=width) if has_colour(out) else console.text(report, view, width=width)


class JsonSink:
    """Where --json goes: a file that is whole at every moment, or stdout at the end, or nowhere."""

    def __init__(self, target: Path | None, *, to_stdout: bool = False) -> None:
        self.target = target
        self.to_stdout = to_stdout

    def write_partial(self, report: Report) -> None:
        """The report so far; stdout gets only the last one."""
        if self.target is not None:
            self._replace(report)

    def write(self, report: Report) -> None:
        """The last one. Raises ResourceError when the disk is full."""
        if self.target is not None:
            self._replace(report)
        elif self.to_stdout:
            emit(_json(report))

    def _replace(self, report: Report) -> None:
        assert self.target is not None
        write_whole(self.target, _json(report))


@contextlib.contextmanager
def json_sink(where: str | None, *, force: bool = False) -> Iterator[JsonSink]:
    """Open what --json names before any work. Raises UsageError for something that is not ours to replace, ResourceError for what cannot be written."""
    if where is None:
        yield JsonSink(None)
    elif where == "-":
        yield JsonSink(None, to_stdout=True)
    else:
        target = Path(where)
        require_writable(target)
        if not force and target.is_file() and not _is_report(target):
            raise UsageError(f"{clean(where, 200)} is there and is no report of gpuopt", fix="another file, or --force")
        yield JsonSink(target)


def _is_report(path: Path) -> bool:
    """Empty, or one of ours: cheap to tell by the keys at both ends, as keys are sorted."""
    try:
        with path.open("rb") as file:
            text = file.read(4096)
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 4096))
            text += file.read()
    except OSError:
        return False
    return size == 0 or (text.lstrip()[:1] == b"{" and b'"command"' in text and b'"verb"' in text)


def _json(report: Report) -> str:
    from gpuopt.reports import json

    return json.render(report)


def _failed(job: Job, last: Report | None, error: BaseException) -> Report:
    """What is known when a command fails: the report so far, with the error in it."""
    if isinstance(error, GpuoptError):
        failure = Failure(id=error.error_id, type=type(error).__name__, message=error.message, fix=error.fix, exit_code=error.exit_code)
    else:
        told = getattr(error, "code", None)  # SystemExit and app.Terminated know theirs
        ending = told if isinstance(told, int) and not isinstance(error, Exception) else 70
        code = 130 if isinstance(error, KeyboardInterrupt) else ending
        failure = Failure(id="GPO000", type=type(error).__name__, message=str(error) or type(error).__name__, exit_code=code)
    if last is not None:
        return replace(last, error=failure)
    environment = Environment(gpuopt=__version__, python=platform.python_version(), platform=f"{platform.system()} {platform.machine()}")
    return Report(schema_version=SCHEMA_VERSION, command=job.command, verb=job.verb, environment=environment, error=failure)
