"""The ranks' torch.distributed process group: how they meet, and which errors end it.

With wan_model.parallel the only owner of torch.distributed. torch is imported inside the
functions, so that a group's leader can import this package without it. Knows no Ray, no engine.
"""

from datetime import timedelta
from typing import Any

# torch's names for a broken process group or CUDA context, and the words by which the plain
# RuntimeErrors of gloo and older CUDA calls are known. "CUDA out of memory" breaks nothing.
_BREAKING_CLASSES = {"DistError", "AcceleratorError"}
_BREAKING_WORDS = ("CUDA error", "NCCL error", "gloo/transport", "[gloo", "/gloo/")


def host_store(host: str, *, world_size: int, timeout_s: float) -> tuple[Any, str]:
    """Rank 0: open the meeting point. Returns the store, to be kept, and its "host:port".

    The system picks the port while the store binds it, so two groups that start at the same
    moment on one node cannot choose the same.
    """
    import torch.distributed as dist

    store = dist.TCPStore(
        host,
        0,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return store, f"{host}:{store.port}"


def init(
    *,
    rank: int,
    world_size: int,
    address: str,
    store: Any,
    backend: str,
    timeout_s: float,
) -> None:
    """Join the group that meets at `address`; `store` is rank 0's own, None elsewhere.

    Returns when every rank has joined. Every collective then fails after `timeout_s` seconds.
    """
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    if store is None:
        host, _, port = address.rpartition(":")
        store = dist.TCPStore(host, int(port), world_size, is_master=False, timeout=timeout)
    device_id = None
    if backend == "nccl":
        device_id = torch.device("cuda:0")  # Ray shows each worker its own GPU only
        torch.cuda.set_device(device_id)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device_id,
    )


def breaks_the_rank(error: BaseException) -> bool:
    """True if its CUDA context or process group is lost: no later call here can succeed."""
    if any(cls.__name__ in _BREAKING_CLASSES for cls in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in _BREAKING_WORDS)
