"""nn.Module + inputs -> `model.pt2` and `accepts.json` in a bundle's folder, and back.

Example inputs are dropped before saving: they are the user's data, and loading them is one of the paths by which a .pt2 runs code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpuopt.core import codec
from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs
from gpuopt.programs import ops
from gpuopt.programs.export import export
from gpuopt.trust import gate

PROGRAM = "model.pt2"
ACCEPTS = "accepts.json"


def save(module: torch.nn.Module, inputs: Inputs, dynamic: Mapping[str, Sequence[int]] | None, folder: Path) -> dict[str, str]:
    """Export and write both files; role -> file name. Raises Unsupported where the module cannot be exported."""
    program = export(module, inputs, dynamic)
    program._example_inputs = None  # the public setter refuses None
    torch.export.save(program, folder / PROGRAM)
    write_accepts(Accepts.of(inputs, dynamic), folder)
    return {"exported": PROGRAM, "accepts": ACCEPTS}


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any]) -> tuple[torch.nn.Module, Accepts]:
    """The callable of a saved program and what it accepts. `options`: `trust` and `signed_by_us` as the gate takes them."""
    ops.register()
    program = gate.load_exported(folder / files["exported"], **consent(options))
    return program.module(), read_accepts(folder, files)


def write_accepts(accepts: Accepts, folder: Path) -> None:
    """Beside an artifact: what it was built for."""
    (folder / ACCEPTS).write_text(codec.to_json(accepts, indent=2), encoding="utf-8")


def read_accepts(folder: Path, files: Mapping[str, str]) -> Accepts:
    """Raises BadInput when the file is missing or is not ours."""
    if "accepts" not in files:
        raise BadInput("the bundle does not say which inputs its artifact takes", fix="build it again with this version of gpuopt")
    return codec.read_json(Accepts, folder / files["accepts"])


def consent(options: Mapping[str, Any]) -> dict[str, Any]:
    """The gate's arguments out of a backend's options."""
    return {"trust": tuple(options.get("trust", ())), "signed_by_us": bool(options.get("signed_by_us", False))}
