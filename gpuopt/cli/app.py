"""`gpuopt`: words -> a command -> an exit code. The last line of defence against tracebacks and half-closed streams.

0    done                                     4    a package, driver, device or version is missing
1    a verdict against the model              5    memory, disk, time or a port ran out
2    the command line or a recipe is wrong    70   a bug of gpuopt, with its traceback
3    a file was refused                       129, 130, 143    hang-up, interrupt, termination
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import typer

from gpuopt._version import __version__
from gpuopt.cli import streams
from gpuopt.cli.backends import backends
from gpuopt.cli.bench import bench
from gpuopt.cli.compare import compare
from gpuopt.cli.compile import compile as compile_
from gpuopt.cli.convert import convert
from gpuopt.cli.device import device
from gpuopt.cli.doctor import doctor
from gpuopt.cli.optimize import optimize
from gpuopt.cli.profile import profile
from gpuopt.cli.report import report
from gpuopt.cli.run import run as run_recipe
from gpuopt.cli.stream import stream
from gpuopt.cli.trust import trust
from gpuopt.core.errors import GpuoptError

BUG = 70
UsageProblem: type[Exception] = cast(type[Exception], typer.BadParameter.__mro__[2])
"""Typer's own base of a wrong command line; its module has moved between versions."""

app = typer.Typer(
    name="gpuopt",
    help="Profile, optimize, compile and bench PyTorch models against the roofline, with proof.",
    epilog="Start with: gpuopt profile MODEL",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, dict[str, Callable[..., int]]] = {
    "Ask about a model": {"profile": profile, "doctor": doctor, "bench": bench, "compare": compare},
    "Make it faster": {"optimize": optimize, "compile": compile_, "convert": convert},
    "Make it fit": {"stream": stream},
    "This machine": {"device": device, "backends": backends, "trust": trust},
    "Again": {"run": run_recipe, "report": report},
}
"""Panel of the help -> command -> function."""


def _unwrapped(command: Callable[..., int]) -> str:
    """Its docstring with one line a paragraph: Typer keeps the line ends of the source, which are not those of a terminal."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(command.__doc__ or "").split("\n\n"))


for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, help=_unwrapped(_command), rich_help_panel=_panel)(_command)


def _print_version(asked: bool) -> None:
    if asked:
        streams.emit(f"gpuopt {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Profile, optimize, compile and bench PyTorch models against the roofline, with proof."""


class Terminated(BaseException):
    """A signal asked the process to end; `code` is 128 + its number."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ended by signal {signal.Signals(code - 128).name}")
        self.code = code


def main(words: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    _fill_missing_streams()
    _catch_signals()
    code = run(words)
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            streams.abandon(sys.stdout)
        except OSError as error:
            streams.abandon(sys.stdout)
            streams.error(f"stdout cannot be written: {error.strerror or error}", "free some space, or write elsewhere", "GPO400")
            code = code or 5
    sys.exit(code)


def run(words: Sequence[str] | None = None) -> int:
    """One command; returns its exit code. Every exception ends here."""
    try:
        code = app(args=None if words is None else list(words), prog_name="gpuopt", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except GpuoptError as error:
        streams.error(error.message, error.fix, error.error_id)
        return error.exit_code
    except UsageProblem as problem:
        return _usage(problem)
    except (KeyboardInterrupt, typer.Abort):
        streams.tell("interrupted\n")
        return 130
    except Terminated as end:
        streams.tell(f"{end}\n")
        return end.code
    except BrokenPipeError:
        return 0
    except SystemExit as end:  # typer's answer to a reader that went away
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:  # noqa: BLE001 - the outermost net: whatever nobody classified is a bug of ours, and keeps its traceback
        streams.tell(traceback.format_exc())
        streams.error(
            f"this is a bug of gpuopt: {type(error).__name__}: {error}",
            f"report it with the lines above and `gpuopt --version` ({__version__})",
            "GPO000",
        )
        return BUG


def _usage(problem: Any) -> int:
    """Typer's complaints in our two lines."""
    text = problem.format_message().strip()
    if not text:  # `gpuopt` alone: its help has been shown
        return 0 if problem.exit_code == 0 else 2
    context = getattr(problem, "ctx", None)
    streams.error(" ".join(text.split()), f"{context.command_path if context else 'gpuopt'} --help", "GPO100")
    return 2


def _fill_missing_streams() -> None:
    """With a standard stream closed, the next file opened would take its number, and a child would write its chatter into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def _catch_signals() -> None:
    """SIGTERM and SIGHUP unwind like an interrupt, so that children are killed and temporary folders go; a second interrupt does not wait for that."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, lambda number, frame: os._exit(128 + number))
        raise Terminated(128 + number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, lambda number, frame: os._exit(130))
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, interrupt)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(signal.SIGHUP, end)
