"""A group whose ranks are Ray actors, one process each.

Owns where the workers are placed and how their deaths are noticed; order, deadlines and
cancellation are Group's. Knows no model, and of Serve only that a placement group may already
surround this process (a replica that has the spec's deployment_options()).
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import DeadlinePassed, RanksDiverged
from cluster.group import Group, OnDeath, awaitable
from cluster.lifeline import Lifeline
from cluster.spec import GroupSpec
from cluster.worker import Worker, WorkerInfo

# Arguments above this many bytes go into the object store once; Ray sends smaller ones in the call.
_STORE_ABOVE_BYTES = 100 * 1024

# The lifeline says first that a rank is gone; Ray, asked this much longer, often says why.
_EXPLANATION_S = 0.2


class RayGroup(Group):
    """A group whose ranks are Ray actors, one process each."""

    def __init__(self, spec: GroupSpec) -> None:
        super().__init__(spec)
        self.workers: tuple[WorkerInfo, ...] = ()
        self._handles: list[Any] = []
        self._lifeline = Lifeline(spec.num_workers)
        self._watches: list[asyncio.Task] = []
        self._own_placement_group: PlacementGroup | None = None

    @classmethod
    async def start(cls, spec: GroupSpec, *, on_death: OnDeath | None = None) -> Self:
        """Start the ranks in the placement group around this process, or in one of its own.

        Returns when every engine is constructed. Raises what an engine's constructor raised, or
        GroupDead (a worker died, or start_timeout_s passed); nothing is left behind then.
        """
        group = cls(spec)
        try:
            async with asyncio.timeout(spec.start_timeout_s):
                await group._start()
        except TimeoutError:
            await group.aclose()
            raise DeadlinePassed(
                f"the {group._name} did not start in {spec.start_timeout_s:g} s "
                f"({spec.strategy} bundles {spec.bundles()})"
            ) from None
        except RanksDiverged as diverged:  # one constructor raised and others waited for its rank
            await group.aclose()
            raise diverged.__cause__ from None
        except BaseException:
            await group.aclose()
            raise
        group._on_death = on_death
        return group

    async def aclose(self) -> None:
        await super().aclose()
        self._lifeline.close()
        if self._watches:
            await asyncio.wait(self._watches, timeout=2.0)
        if self._own_placement_group is not None:
            ray.util.remove_placement_group(self._own_placement_group)
            self._own_placement_group = None

    async def _start(self) -> None:
        spec = self.spec
        placement_group = ray.util.get_current_placement_group()
        if placement_group is None:
            placement_group = ray.util.placement_group(spec.bundles(), strategy=spec.strategy)
            self._own_placement_group = placement_group
            while not await asyncio.to_thread(placement_group.wait, 1):
                pass  # in short waits, so that a start that is given up leaves no thread behind
        elif placement_group.bundle_count != spec.num_workers:
            raise ValueError(
                f"num_workers {spec.num_workers} != {placement_group.bundle_count} bundles of the "
                "placement group around this process; take both from one GroupSpec"
            )
        env_vars = {"OMP_NUM_THREADS": str(max(1, int(spec.num_cpus_per_worker)))}
        for rank in range(spec.num_workers):
            options = {
                "num_cpus": spec.num_cpus_per_worker,
                "num_gpus": spec.num_gpus_per_worker,
                "runtime_env": {"env_vars": {**env_vars, **spec.worker_env}},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group, placement_group_bundle_index=rank
                ),
            }
            self._handles.append(Worker.options(**options).remote(spec, rank))
        address = await self._lifeline.open(ray.util.get_node_ip_address())
        for rank, handle in enumerate(self._handles):
            explanation = awaitable(handle.alive.remote(address).future())
            self._watches.append(asyncio.create_task(self._watch(rank, explanation)))
        self.workers = tuple(await self._ask("info", self._handles))
        meeting_point = None
        if spec.num_workers > 1:
            [meeting_point] = await self._ask("host_store", self._handles[:1])
        for outcome in await self._ask("load", self._handles, meeting_point):
            if outcome.raised:
                raise outcome.raised.rebuild()

    async def _ask(self, method: str, handles: list[Any], *args: Any) -> list[Any]:
        futures = [getattr(handle, method).remote(*args).future() for handle in handles]
        return await self._answers(futures, self.spec.start_timeout_s, f"worker.{method}()")

    async def _watch(self, rank: int, explanation: asyncio.Future) -> None:
        """Notice the end of a rank's process, also while no call is running."""
        cut = self._lifeline.cut[rank]
        await asyncio.wait({cut, explanation}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({explanation}, timeout=_EXPLANATION_S)
        error = explanation.exception() if explanation.done() else None
        self._die(self._rank_died(rank, error or ConnectionError("the lifeline was cut")))

    def _send(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int
    ) -> list[Future]:
        payload: Any = (args, kwargs)
        if _num_bytes(payload) > _STORE_ABOVE_BYTES:
            payload = ray.put(payload)
        return [
            handle.run.remote(method, payload, keep_value=rank == 0).future()
            for rank, handle in enumerate(self._handles[:num_ranks])
        ]

    def _end_ranks(self) -> None:
        for handle in self._handles:
            ray.kill(handle)

    def _rank_name(self, rank: int) -> str:
        if not self.workers:
            return super()._rank_name(rank)
        info = self.workers[rank]
        return f"{super()._rank_name(rank)} (process {info.pid} on {info.node_ip})"


def _num_bytes(value: Any) -> int:
    """The bytes of the arrays and byte strings in `value`; everything else counts as nothing."""
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, bytes | bytearray) else getattr(value, "nbytes", 0)
