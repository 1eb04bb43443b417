"""A module -> the same moved by diffusers' group offload: a block at a time, the next one prefetched on a stream of its own. Imports torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import Unsupported
from gpuopt.core.streaming import Anatomy
from gpuopt.pipeline.streamed.rivals.putback import moved, put_back, settle

HOOK = "group_offloading"
"""Under which its registry keeps a group."""


@contextmanager
def grouped(module: nn.Module, device: str, weight_bytes: int, anatomy: Anatomy) -> Iterator[str]:
    """Its fastest setting: locked copies of all blocks from the beginning, `record_stream` instead of waits, and everything outside blocks resident.

    It has no notion of a budget: all blocks are moved in each forward, whatever `weight_bytes` says. Left to itself it also moves what is outside blocks, to the
    device and back, from pageable memory; that group is emptied here.

    Raises Unsupported for a model whose blocks are no members of a list.
    """
    owners = owners_of(module, anatomy)
    hooks: Any = importlib.import_module("diffusers.hooks")
    on_gpu = torch.device(device).type == "cuda"
    with put_back(module):
        try:
            for owner in owners:
                hooks.apply_group_offloading(
                    module.get_submodule(owner),
                    onload_device=torch.device(device),
                    offload_device=torch.device("cpu"),
                    offload_type="block_level",
                    num_blocks_per_group=1,
                    use_stream=on_gpu,
                    record_stream=on_gpu,
                    low_cpu_mem_usage=False,
                )
            _keep_the_rest(module, owners, anatomy, device)
            yield f"all {len(anatomy.units)} blocks are moved: it cannot be told a budget"
        finally:
            settle(device)
    settle(device)


def owners_of(module: nn.Module, anatomy: Anatomy) -> list[str]:
    """Modules whose children are the lists of blocks. Raises Unsupported where there is none."""
    rings = dict.fromkeys(unit.ring for unit in anatomy.units)
    lists = [ring for ring in rings if ring and isinstance(module.get_submodule(ring), nn.ModuleList | nn.Sequential)]
    if not lists:
        raise Unsupported(
            "diffusers groups members of nn.ModuleList and nn.Sequential, and this model's blocks are none",
            fix="leave it out: --rival accelerate-pinned",
        )
    return list(dict.fromkeys(ring.rpartition(".")[0] for ring in lists))


def _keep_the_rest(module: nn.Module, owners: list[str], anatomy: Anatomy, device: str) -> None:
    """What is in no block goes to the device and stays: its group is emptied, and still starts the prefetch."""
    blocks: set[int] = set()
    for owner in owners:
        within = module.get_submodule(owner)
        registry = getattr(within, "_diffusers_hook", None)
        hook = registry.get_hook(HOOK) if registry is not None else None
        if hook is not None:
            hook.group.modules, hook.group.parameters, hook.group.buffers = [], [], []
        for part in within.modules():
            held = getattr(part, "_diffusers_hook", None)
            if part is not within and held is not None and held.get_hook(HOOK) is not None:
                blocks |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in blocks:
            moved(tensor, device)
