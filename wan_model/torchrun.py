"""The processes of one `torchrun`: their meeting, their devices, and one voice for their errors.

Owns joining and leaving the process group that torchrun prepared. Without torchrun every function
is that of a single process. Knows nothing about degrees or models.
"""

from __future__ import annotations

import datetime
import sys

import torch
import torch.distributed as dist

from wan_model.parallel import make_mesh

FIRST_RANK_SPEAKS_S = 10.0
"""How long another rank's error waits for rank 0 to report the same one."""

COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank may wait this long for another one that still loads its weights."""

_SPOKEN = "wan_model/error"


class Processes:
    """This process and those torchrun started beside it.

    The store is torchrun's own and outlives every rank, so that errors before the process group
    exists (a wrong option, a missing file) are said once too.
    """

    def __init__(self) -> None:
        self._store: dist.Store | None = None
        self.rank, self.num_ranks = 0, 1
        if dist.is_torchelastic_launched():
            self._store, self.rank, self.num_ranks = next(dist.rendezvous("env://"))

    def join(self, device: str) -> str:
        """Resolves "auto" and joins the process group, if there is one to join.

        Returns the device of this rank. Raises ValueError for a device that is not there, and for
        one GPU that all ranks would share.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device}: no CUDA device is available")
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if device not in ("cpu", "cuda", *gpus):
            known = ", ".join(("auto", "cpu", "cuda", *gpus))
            raise ValueError(f"device {device} is not there: use one of {known}")
        if self._store is None:
            return device
        if device in gpus and self.num_ranks > 1:
            raise ValueError(f"device {device} is one GPU for every rank: use cuda under torchrun")
        if device == "cuda":
            device = f"cuda:{self._local_gpu()}"
        if device in gpus:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=dist.PrefixStore("wan_model/group", self._store),
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        return device

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank. After `join`."""
        if self._store is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def report(self, error: str) -> None:
        """Writes `error` to stderr, once: the other ranks are silent when rank 0 has one too."""
        if self._store is not None and self.rank != 0:
            try:
                self._store.wait([_SPOKEN], datetime.timedelta(seconds=FIRST_RANK_SPEAKS_S))
                return
            except RuntimeError:  # the wait ended: rank 0 has no error, or is gone
                error = f"{error} (rank {self.rank})"
        print(f"error: {error}", file=sys.stderr, flush=True)
        if self._store is not None:
            self._store.set(_SPOKEN, "")

    def leave(self) -> None:
        make_mesh.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _local_gpu(self) -> int:
        index, num_gpus = dist.get_node_local_rank(), torch.cuda.device_count()
        if index >= num_gpus:
            raise ValueError(
                f"torchrun started more than {index} processes on a node with {num_gpus} GPU(s):"
                f" use --nproc_per_node {num_gpus}"
            )
        return index
