"""A live module + its inputs -> workers in this process, for a search over a module that no other process can be given.

They answer what `isolate.Child` answers, in the same words, and fail the same way; what is lost is the isolation: a backend that crashes takes the caller
with it, and one that hangs is not ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from gpuopt.converters import precision as precisions
from gpuopt.core.errors import GpuoptError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, ModelRef, Precision
from gpuopt.pipeline import drawn, facts, isolate, matrix, traits, worker
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.session import Session

T = TypeVar("T")

_pids = itertools.count(1)


class LocalSession(Session):
    """A session whose model is already here. `more`: other calls of the same sizes, which candidates are verified on as well."""

    def __init__(self, model: Model, inputs: Inputs, *, more: tuple[Inputs, ...] = (), progress: facts.ProgressCall | None = None) -> None:
        super().__init__(progress)
        self._live, self._own_inputs, self._more = model, inputs, more

    def load(self, candidate: Candidate) -> facts.Loaded:
        """Whatever the candidate names: the live module."""
        found = self.adopt(candidate, self._live, self._own_inputs)
        if self._more and self._inputs is not None:
            loaded, _ = self._loaded()
            self._inputs = _Recorded(loaded, self._live, self._own_inputs, self._more)
        return found

    def build(self, *, build_only: bool = False) -> facts.Built:
        """As everywhere; the memory of this process is its caller's too, so it says nothing about the build."""
        return replace(super().build(build_only=build_only), host_peak_bytes=None)

    def traits(self, ref: ModelRef) -> traits.Traits:
        """Of the live module."""
        return traits.of(self._live)

    def matrix(self, device_id: str, candidate: Candidate | None = None) -> facts.Matrix:
        """For the live module."""
        return matrix.matrix(device_id, model=self._live)

    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of each input as the runner was built with it, in order."""
        given = self._given()
        return tuple(tuple(t.stride()) for t in (*given.args, *given.kwargs.values()))

    @property
    def precision(self) -> Precision:
        """What it computes in."""
        return self._precision


class _Recorded(drawn.Drawn):
    """The caller's own tensors, of several calls."""

    def __init__(self, candidate: Candidate, model: Model, first: Inputs, more: tuple[Inputs, ...]) -> None:
        super().__init__(candidate, model, first)
        self._more = more

    def batches(self) -> tuple[list[Inputs], tuple[int, ...]]:
        """Every call that was recorded."""
        found = [self.first, *self._more]
        return found, tuple(range(len(found)))


class LocalChild:
    """`isolate.Child` without the process."""

    def __init__(self, model: Model, inputs: Inputs, more: tuple[Inputs, ...] = ()) -> None:
        self._session: LocalSession | None = LocalSession(model, inputs, more=more)
        self.pid = next(_pids)
        self._is_built = False

    @property
    def alive(self) -> bool:
        """Until it is closed."""
        return self._session is not None

    def call(
        self,
        verb: str,
        result: type[T],
        *,
        timeout_s: float,
        on_progress: Callable[[float | None, str], None] | None = None,
        **arguments: Any,
    ) -> T:
        """One step, here and now; `timeout_s` cannot be kept. Raises ChildFailed for whatever a child would have answered with."""
        session = self._session
        if session is None:
            raise AssertionError(f"{verb} was asked of a worker that had ended")
        session._progress = on_progress or (lambda fraction, note: None)
        # Several candidates are alive at once: each computes under its own switches, and the caller's are there between two steps.
        with precisions.switches_kept(), precisions.flags(session.precision if self._is_built else None):
            try:
                found: T = getattr(session, verb)(**arguments)
            except Exception as error:  # every failure of a candidate is a result, as in worker.serve
                raise told(error, verb) from error
        self._is_built = self._is_built or verb == "build"
        return found

    def close(self) -> None:
        """Give back what it holds. Harmless twice."""
        session, self._session = self._session, None
        if session is not None:
            with precisions.switches_kept():
                session.close()
            _release()

    def pause(self) -> None:
        """It never does anything beside its caller."""

    def resume(self) -> None:
        """See `pause`."""

    def kill(self) -> None:
        """There is no process to end."""
        self.close()

    def __enter__(self) -> LocalChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def told(error: Exception, verb: str) -> ChildFailed:
    """The failure as it would have crossed a process; the user's own error stays the one that was raised."""
    failed = isolate._failed(worker.describe(error, verb))
    if isinstance(error, GpuoptError):
        failed.error = error
    return failed


def _release() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
