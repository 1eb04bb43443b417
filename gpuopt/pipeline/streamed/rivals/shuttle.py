"""A module -> the same moved by mmgp: as many blocks as the budget holds stay, evenly spread, the others one ahead through locked memory. Imports torch."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import Unsupported
from gpuopt.core.streaming import Anatomy
from gpuopt.pipeline.streamed.rivals.putback import put_back, settle

MODEL = "model"
"""Its name for the only module it is given."""
MIB = 2**20
PIN_SHARE = 0.5
"""Of physical memory, which is what it locks at most by itself."""
SPARE = 1.2


@contextmanager
def shuttled(module: nn.Module, device: str, weight_bytes: int, anatomy: Anatomy) -> Iterator[str]:
    """Its fastest setting (that of its profile HighRAM_LowVRAM, without quantisation): everything locked, transfers ahead on a stream of their own.

    Raises Unsupported for a module of several dtypes, which it does not take.
    """
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) > 1:
        raise Unsupported(
            f"mmgp takes a module of one dtype, and this one has {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}",
            fix="leave it out: --rival accelerate-pinned",
        )
    offload: Any = importlib.import_module("mmgp.offload")
    whole = anatomy.weight_bytes
    with contextlib.ExitStack() as stack:
        if torch.device(device).type == "cuda":  # it always means the current one
            stack.enter_context(torch.cuda.device(device))
        stack.callback(settle, device)
        stack.enter_context(put_back(module))
        stack.callback(torch.set_default_device, None)
        with contextlib.redirect_stdout(io.StringIO()):
            manager = offload.all(
                {MODEL: module},
                pinnedMemory=True,
                quantizeTransformer=False,
                budgets={MODEL: weight_bytes // MIB},
                asyncTransfers=True,
                convertWeightsFloatTo=None,
                # A machine whose memory grows as it is touched says it has little: then it would lock a part, and be slower than it is.
                perc_reserved_mem_max=max(PIN_SHARE, SPARE * whole / max(1, int(offload.physical_memory))),
                verboseLevel=0,
            )
        stack.callback(manager.release)
        # It leaves `cuda` as the default device, a detour for each call of torch that nothing here needs: its forwards are faster without.
        torch.set_default_device(None)
        kept = len(manager.preloaded_blocks_per_model.get(MODEL, ()))
        yield f"{kept} of {len(anatomy.units)} blocks stay, as it spreads them within {weight_bytes // MIB} MiB"
