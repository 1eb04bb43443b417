"""A module + what was built for some of its calls -> a callable in its place: those calls go to what was built, every other one to the module itself, counted."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpuopt.accuracy import compare
from gpuopt.converters import precision as precisions
from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import GateFailed, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, Precision, Tolerance
from gpuopt.pipeline.search.live import calls
from gpuopt.pipeline.search.live.local import LocalSession

ALIGN_BYTES = 16
"""Of the widest loads that compiled code makes."""
MAX_TOLD = 20
"""Signatures that fallbacks are counted under; what comes after them is counted as `others`."""


@dataclass(slots=True, kw_only=True)
class Way:
    """One call of a module, and what was built for it."""

    session: LocalSession
    call: Callable[..., Any]
    accepts: Accepts
    template: calls.Template
    shape: calls.Shape | None
    """None: outputs are handed on as they come."""
    precision: Precision
    device: str
    strides: tuple[tuple[int, ...], ...]
    """Of the inputs it was built with: what is laid out otherwise is copied."""
    text: str
    """Its tensors, for a reader."""
    is_fixed: bool
    """It was built from `calls.Fixed`: it takes the tensors alone."""
    served: int = 0

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Inputs and outputs in the module's own dtypes, whatever is computed in between. Inputs that need no cast are passed on as they are."""
        self.served += 1
        carrier = getattr(torch, self.precision.carrier.dtype)
        given = [
            _laid_out(t.to(device=self.device, dtype=carrier if t.is_floating_point() else t.dtype), strides)
            for t, strides in zip(tensors, self.strides, strict=True)
        ]
        with self._switches():
            if self.is_fixed:
                out = self.call(*given)
            else:
                args, kwargs = calls.filled(self.template, given)
                out = self.call(*args, **kwargs)
        return out if self.shape is None else self.shape.around([t for _, t in compare.flatten(out)])

    @contextlib.contextmanager
    def _switches(self) -> Iterator[None]:
        """As they were when it was built: compiled code is compiled again under others. Autocast, too, was off."""
        kind = self.device.partition(":")[0]
        with contextlib.ExitStack() as stack:
            if kind == "cuda":
                stack.enter_context(precisions.flags(self.precision))
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def _laid_out(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Compiled code reads by the strides and the alignment it was built with."""
    if tensor.data_ptr() % ALIGN_BYTES == 0 and all(
        size <= 1 or got == want for size, got, want in zip(tensor.shape, tensor.stride(), strides, strict=True)
    ):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def way(
    model: Model,
    inputs: Inputs,
    candidate: Candidate,
    *,
    template: calls.Template,
    tensors: Sequence[torch.Tensor],
    shape: calls.Shape | None,
    more: tuple[Inputs, ...] = (),
    tolerance: Tolerance | None = None,
    verify: str = "precision",
) -> Way:
    """Build this candidate here, on the live module, and hold it against the module on every call that was recorded.

    Raises GateFailed where it does not pass here, whatever a search found in other processes; Unsupported, OutOfMemory and what compilers raise.
    """
    session = LocalSession(model, inputs, more=more)
    try:
        with precisions.switches_kept():
            found = session.load(candidate)
            session.build()
            if verify != "off":
                accuracy = session.verify(tolerance or Tolerance(), verify).accuracy
                if not accuracy.passed:
                    raise GateFailed(
                        f"built in this process it is outside the accuracy gate: {accuracy.reason or accuracy.worst_output}",
                        fix="another backend or precision",
                    )
        made = Way(
            session=session,
            call=session.runner(),
            accepts=Accepts.of(Inputs(args=tuple(tensors)), any_layout=True),
            template=template,
            shape=shape,
            precision=session.precision,
            device=found.device,
            strides=session.strides(),
            text=calls.text(tensors),
            is_fixed=isinstance(model.module, calls.Fixed),
        )
        made(tensors)  # its outputs must fit the nest, or it cannot stand in
        made.served = 0
    except ValueError as error:
        session.close()
        raise GateFailed(f"it gives {error}", fix="another backend") from error
    except BaseException:
        session.close()
        raise
    return made


@dataclass(slots=True, kw_only=True)
class StandIn:
    """Called in the place of a module's forward."""

    name: str
    original: Callable[..., Any] | None
    """None: a call that nothing was built for is refused."""
    ways: list[Way] = field(default_factory=list)
    expected: frozenset[str] = frozenset()
    """Signatures that were seen and left to the module: they are counted, and no surprise."""
    fallbacks: Counter[str] = field(default_factory=Counter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What was built for this call; the module itself where nothing was. Raises UsageError where there is no module to fall back to."""
        why = ""
        try:
            tensors, template = calls.taken(args, kwargs)
        except calls.NotPlain as error:
            why = f"called with {error}"
        else:
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                why = "gradients of its inputs are wanted"
            else:
                for one in self.ways:
                    if one.template == template and self._fits(one, tensors):
                        return one(tensors)
                why = calls.text(tensors)
                if any(one.text == why for one in self.ways):
                    why += ", with other arguments beside the tensors"
        return self._elsewhere(why, args, kwargs)

    def _fits(self, one: Way, tensors: Sequence[torch.Tensor]) -> bool:
        try:
            one.accepts.check(tensors, {})
        except UsageError:
            if self.original is None and len(self.ways) == 1:
                raise  # it says what is wrong with the call
            return False
        return True

    def _elsewhere(self, why: str, args: Sequence[Any], kwargs: Any) -> Any:
        if self.original is None:
            raise UsageError(
                f"{self.name} was not built for this call: {why}",
                fix="call it as it was when it was optimized, or optimize it for this call too",
            )
        if why not in self.fallbacks and len(self.fallbacks) >= MAX_TOLD:
            why = "others"
        if why not in self.fallbacks and why not in self.expected:
            warnings.warn(f"gpuopt: {self.name} runs as it was, nothing was built for this call: {why}", stacklevel=4)
        self.fallbacks[why] += 1
        return self.original(*args, **kwargs)

    def close(self) -> None:
        """Give back what was built."""
        for one in self.ways:
            one.session.close()
        self.ways.clear()

    def __deepcopy__(self, memo: Any) -> Any:
        raise UsageError(f"{self.name} runs through gpuopt and cannot be copied", fix="restore() first, then copy")

    def __reduce__(self) -> Any:
        raise UsageError(f"{self.name} runs through gpuopt and cannot be saved", fix="restore() first, then save")
