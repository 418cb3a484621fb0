"""The weights of an expert divided over the ranks of its group (FSDP2).

Owns which parameters are divided (the blocks' large ones, a block at a time) and how a rank comes
to its part. The forward is the one of an undivided model: torch gathers a block's weights before
its turn and drops them after it. Knows nothing about sequences or degrees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from wan_model.transformer import WanTransformer, is_float32_island


def load_sharded(load: Callable[[str], WanTransformer], device: str) -> WanTransformer:
    """`load("cpu")`, divided over all ranks, this rank's part on `device`. Collective.

    A card never holds more than its part and one whole block. The ranks take turns, so that one
    whole expert at a time is in a host's memory.
    """
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    model = None
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            model = shard(load("cpu"), device, mesh)
        dist.barrier()
    return model


def shard(model: WanTransformer, device: str, mesh: dist.DeviceMesh) -> WanTransformer:
    """Divides each block's linear weights along their rows; all else is small and everywhere."""
    whole = {p for n, p in model.named_parameters() if not _is_divided(n)}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        register_fsdp_forward_method(block, "keys_and_values")
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "embed_text")
    model.fused = False  # the fused path reads weights without asking torch for them
    return model


def local_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters that this rank keeps between two uses."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)


def _is_divided(name: str) -> bool:
    inside_block = name.startswith("blocks.") and name.split(".", 2)[2]
    return bool(inside_block) and not is_float32_island(inside_block)
