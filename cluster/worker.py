"""One rank in its own process: the Ray actor around a Rank.

Owns the rank's place in the process group and the sign of life that the leader watches. Knows no
model and no order of calls beyond "one at a time, as the leader sends them".
"""

import os
from dataclasses import dataclass
from typing import Any

import ray

from cluster import lifeline, process_group
from cluster.lifeline import LifelineAddress
from cluster.rank import Outcome, Rank, outcome_of
from cluster.spec import GroupSpec


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """Where a rank runs. `gpu_ids` are the node's ids of the GPUs that Ray gave it."""

    rank: int
    pid: int
    node_id: str
    node_ip: str
    gpu_ids: tuple[str, ...]


@ray.remote(concurrency_groups={"ctl": 1}, max_restarts=0, max_task_retries=0)
class Worker:
    """A Rank in its own process. Calls run in the order the leader sends them, one at a time."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        self._spec = spec
        self._rank_index = rank
        self._rank = Rank(spec)
        self._store: Any = None

    @ray.method(concurrency_group="ctl")
    def alive(self, address: LifelineAddress) -> None:
        """Hold the lifeline; returns only when the leader lets go of it."""
        lifeline.hold(address, self._rank_index)

    def info(self) -> WorkerInfo:
        context = ray.get_runtime_context()
        return WorkerInfo(
            rank=self._rank_index,
            pid=os.getpid(),
            node_id=context.get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            gpu_ids=tuple(context.get_accelerator_ids().get("GPU", ())),
        )

    def host_store(self) -> str:
        """Rank 0 of a group of several: open the meeting point and say where it is."""
        self._store, address = process_group.host_store(
            ray.util.get_node_ip_address(),
            world_size=self._spec.num_workers,
            timeout_s=self._spec.start_timeout_s,
        )
        return address

    def load(self, address: str | None) -> Outcome:
        """Join the process group that meets at `address` (None: a group of one), then load."""
        if address is not None:
            joined = outcome_of(lambda: self._join(address))
            if joined.raised:
                return joined
        return self._rank.load()

    def run(self, method: str, payload: tuple, *, keep_value: bool) -> Outcome:
        """`payload` is (args, kwargs); large arrays in it are read-only views of shared memory."""
        args, kwargs = payload
        return self._rank.run(method, args, kwargs, keep_value=keep_value)

    def _join(self, address: str) -> None:
        process_group.init(
            rank=self._rank_index,
            world_size=self._spec.num_workers,
            address=address,
            store=self._store,
            backend=self._spec.backend,
            timeout_s=self._spec.collective_timeout_s,
        )
