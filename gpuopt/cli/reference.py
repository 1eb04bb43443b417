"""The commands -> docs/commands.md, and a list of every option. `python -m gpuopt.cli.reference docs` writes the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from gpuopt.cli.app import COMMANDS, app


def page() -> str:
    """Every command with its text, arguments and options, from the same source as --help."""
    lines = [
        "# Commands",
        "",
        "Made from the help texts by `python -m gpuopt.cli.reference docs`. The report goes to stdout, progress and warnings to stderr.",
        "",
        "| exit code | meaning |",
        "|--:|---|",
        "| 0 | done |",
        "| 1 | a verdict against the model: a gate missed, accuracy lost, a regression, or a comparison that could not decide |",
        "| 2 | the command line, the recipe or the inputs do not fit |",
        "| 3 | a file was refused: corrupt, unsupported, or wanting to run code nobody consented to |",
        "| 4 | a package, driver, device or version is missing, or the combination cannot be |",
        "| 5 | memory, disk, time or a port ran out; stdout could not be written |",
        "| 70 | a bug of gpuopt, with its traceback |",
        "| 129, 130, 143 | ended by hang-up, interrupt, termination |",
        "",
        "Colours follow NO_COLOR and TERM, for each stream alone; without a terminal nothing is animated and nothing is asked.",
    ]
    group = _group()
    for panel, commands in COMMANDS.items():
        lines += ["", f"## {panel}"]
        for name in commands:
            lines += ["", *_command(name, group.commands[name])]
    return "\n".join(lines) + "\n"


def options() -> str:
    """One line for every argument and option of every command: what may not change without being noticed."""
    group = _group()
    lines = [f"gpuopt {_names(param)}" for param in group.params]
    for commands in COMMANDS.values():
        for name in commands:
            lines += [f"gpuopt {name} {_names(param)}{' (required)' if param.required else ''}" for param in group.commands[name].params]
    return "\n".join(lines) + "\n"


def _group() -> Any:
    return typer.main.get_command(app)


def _command(name: str, command: Any) -> list[str]:
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    usage = " ".join(["gpuopt", name, *(_names(param) for param in command.params if param.param_type_name == "argument"), "[OPTIONS]"])
    lines = [f"### gpuopt {name}", "", f"`{usage}`", ""]
    for paragraph in paragraphs:
        example = paragraph.removeprefix("Example: ")
        lines += ["```", example, "```", ""] if example != paragraph else [paragraph, ""]
    panels: dict[str, list[Any]] = {}
    for param in command.params:
        if param.param_type_name != "argument":
            panels.setdefault(param.rich_help_panel or "Options", []).append(param)
    for panel, params in panels.items():
        lines += [f"*{panel}*", "", "| option | what it does |", "|---|---|"]
        for param in params:
            value = f" {param.metavar}" if param.metavar else "" if param.is_flag else " N"
            default = f" Default {param.default}." if param.show_default and param.default is not None else ""
            lines.append(f"| `{_cell(_names(param) + value)}` | {_cell(param.help + default)} |")
        lines.append("")
    return lines[:-1]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        name = f"{param.metavar}..." if param.nargs == -1 else str(param.metavar)
        return name if param.required else f"[{name}]"
    return ", ".join((*param.opts, *param.secondary_opts))


if __name__ == "__main__":
    (Path(sys.argv[1] if len(sys.argv) > 1 else "docs") / "commands.md").write_text(page(), encoding="utf-8")
