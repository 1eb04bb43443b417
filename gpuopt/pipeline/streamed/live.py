"""A caller's module and a budget -> the same module, streamed, in this process: called as before, with its plan, and weights given back at the end. Imports torch."""

from __future__ import annotations

import atexit
import weakref
from types import TracebackType
from typing import Any

import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, ModelRef
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import Plan, StreamSpec
from gpuopt.devices import info
from gpuopt.pipeline import livemodel
from gpuopt.pipeline.streamed.device import StreamDevice, parse
from gpuopt.pipeline.streamed.session import StreamSession


class StreamedModule:
    """A module whose weights are streamed. Call it, or any of its methods (`generate`); everything but `plan`, `notes`, `module` and `close` is the module's own.

    A context manager: leaving it closes it.
    """

    def __init__(self, session: StreamSession, plan: Plan, notes: tuple[str, ...]) -> None:
        self._session = session
        self.module: Any = session.work.module
        self.plan = plan
        """As it came out: what stays, what moves through which slot, and what a forward should take."""
        self._notes = notes
        _open.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward without gradients. Inputs lie on the plan's device."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("module", "_session"):  # not yet, or not any more: a copy is being made
            raise AttributeError(name)
        return getattr(self.module, name)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the model and of its plan; of CUDA graphs, once it was called."""
        return tuple(dict.fromkeys((*self._notes, *self._session.notes)))

    @property
    def demand_fetches(self) -> int:
        """Units that were not where the order of a forward said: correct, and slow."""
        return self._session.demand_fetches

    def close(self) -> None:
        """Give the device's memory back; the weights are the module's own again, on the CPU. Harmless twice."""
        self._session.close()

    def __enter__(self) -> StreamedModule:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"StreamedModule({type(self.module).__name__}: {len(plan.resident)} units stay, {len(plan.binding)} stream, "
            f"{plan.predicted_ms:.4g} ms a forward predicted, at least {plan.bound_ms:.4g})"
        )


_open: weakref.WeakSet[StreamedModule] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A program that ends without `close`: what is taken apart by Python's last garbage collection, views of slots among it, ends the process with an assertion of torch's."""
    for module in list(_open):
        module.close()


def streamed(module: torch.nn.Module, inputs: Any, spec: StreamSpec, *, device: str, generate: int | None) -> StreamedModule:
    """Calibrated on `inputs` where they are given, planned, bound. Raises what planning raises; the module is as before then."""
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"a torch.nn.Module is wanted, not {type(module).__name__}", fix="pass the module itself")
    if generate is not None and inputs is None:
        raise UsageError("generation is planned on a prompt", fix="inputs={'input_ids': ids}")
    where = parse(device)
    if not where.is_simulated:
        found = info.resolve(where.id)
        if not found.startswith("cuda"):
            raise UsageError("there is no CUDA device here to stream to", fix='device="simulated" streams to a device on paper')
        where = StreamDevice(id=found)
    if any(p.is_cuda for p in module.parameters()):
        module.to("cpu")
    given = Inputs() if inputs is None else inputs if isinstance(inputs, Inputs) else _sized(livemodel.of_call(inputs))
    model = Model(form="module", name=type(module).__name__, module=module)
    candidate = Candidate(model=ModelRef(text=""), device=device)
    session = StreamSession()
    try:
        opened = session.adopt(candidate, StreamRequest(action="run", specs=(spec,), generate=generate), model, where, given)
        ready = session.bind(spec)
    except BaseException:
        session.close()
        raise
    assert ready.plan is not None
    return StreamedModule(session, ready.plan, (*opened.notes, *ready.notes))


def _sized(inputs: Inputs) -> Inputs:
    """With the length of a sequence of ids as S: how many rows a product has."""
    first = next(iter((*inputs.args, *inputs.kwargs.values())), None)
    if first is None or first.dim() != 2 or first.is_floating_point():
        return inputs
    return Inputs(
        args=inputs.args, kwargs=inputs.kwargs, specs=inputs.specs, dims={**inputs.dims, "S": int(first.shape[1])}, source=inputs.source
    )
