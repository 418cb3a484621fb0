"""How ranks meet without Ray, and which errors mean that a process cannot go on."""

import subprocess
import sys

import pytest

from cluster import process_group
from cluster.process_group import breaks_the_rank

# Joins as rank 1, takes part in one collective, and is gone before the second.
PEER = """
import os, sys, torch
import torch.distributed as dist
from cluster import process_group
process_group.init(
    rank=1, world_size=2, address=sys.argv[1], store=None, backend="gloo", timeout_s=20
)
total = torch.tensor([2.0])
dist.all_reduce(total)
os._exit(0 if total.item() == 3.0 else 1)
"""


def test_two_processes_meet_and_the_loss_of_one_breaks_the_other():
    import torch
    import torch.distributed as dist

    store, address = process_group.host_store("127.0.0.1", world_size=2, timeout_s=20)
    with subprocess.Popen([sys.executable, "-c", PEER, address]) as peer:
        process_group.init(
            rank=0, world_size=2, address=address, store=store, backend="gloo", timeout_s=20
        )
        try:
            total = torch.tensor([1.0])
            dist.all_reduce(total)
            assert total.item() == 3.0
            assert peer.wait(timeout=20) == 0
            with pytest.raises(RuntimeError) as caught:
                dist.all_reduce(total)
        finally:
            dist.destroy_process_group()
    assert breaks_the_rank(caught.value), caught.value


class DistError(RuntimeError):
    """Named like torch's root of its distributed errors."""


@pytest.mark.parametrize(
    ("error", "breaks"),
    [
        (DistError("NCCL watchdog"), True),
        (type("DistBackendError", (DistError,), {})("timed out"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (ValueError("CUDA error: a caller's text"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_only_a_lost_context_or_process_group_breaks_a_rank(error, breaks):
    assert breaks_the_rank(error) is breaks
