"""The two handles stages hand on, Model and Runner. They are live: they never leave their process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import TensorSpec


@dataclass(slots=True, kw_only=True)
class Model:
    """A loaded model. `form` says which of the fields below holds it."""

    form: str
    """`module` (nn.Module), `torchscript` (ScriptModule), `exported` (ExportedProgram; `module` holds its callable), `onnx` (`path`) or `bundle` (`path`)."""
    name: str
    """Short, printable: the factory's or file's name."""
    module: Any = None
    """torch.nn.Module for `module`, `torchscript` and `exported`; None otherwise."""
    exported: Any = None
    """torch.export.ExportedProgram for `exported`."""
    path: Path | None = None
    """The file of an `onnx` model, the folder of a `bundle`."""
    signature: tuple[TensorSpec, ...] = ()
    """What the file or configuration itself says about inputs; free dimensions are letters."""
    sha256: str | None = None
    config: Any = None
    """The transformers configuration where there is one."""
    dtype: str | None = None
    """Commonest floating dtype of the parameters."""
    num_parameters: int | None = None
    notes: list[str] = field(default_factory=list)
    """What loading changed or noticed, for stderr: eval mode forced, a key ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Bound tensors for one call: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    specs: tuple[TensorSpec, ...] = ()
    """One for each tensor, free dimensions still letters; order: args, then kwargs."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Values of the free dimensions; `N` is the batch."""
    source: str = ""
    """Where they came from: `--inputs f.npz`, `the file's signature`, `configuration`, `guess: …`."""

    @property
    def batch(self) -> int:
        """Samples a call: the value of N, 1 where there is no N."""
        return self.dims.get("N", 1)

    def map(self, change: Callable[[Any], Any]) -> Inputs:
        """The same inputs with `change` applied to every tensor."""
        return Inputs(
            args=tuple(change(a) for a in self.args),
            kwargs={k: change(v) for k, v in self.kwargs.items()},
            specs=self.specs,
            dims=self.dims,
            source=self.source,
        )


@runtime_checkable
class Runner(Protocol):
    """Something that can be called like the model and timed. Timers and verifiers never learn its backend.

    A profile also asks for what only some have: `launches() -> tuple[Launch, ...]`, what one call launches, in order, where a trace names no modules; and
    `ungraphed() -> (module, call) | None`, the module a CUDA graph was recorded from and a call of it.
    """

    device: str
    """Where its tensors live: `cpu`, `cuda:0`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run once; asynchronous where the device is. Outputs have the model's own nesting, or a tuple or dict of tensors."""

    def audit(self) -> PrecisionAudit | None:
        """What the built artifact really runs in; None where the backend cannot be read back."""

    def save(self, folder: Path) -> Mapping[str, str]:
        """Write the artifact into an existing empty folder: role -> file name. Raises Unsupported where there is nothing to ship."""

    def close(self) -> None:
        """Give back device memory and files. Harmless twice."""
