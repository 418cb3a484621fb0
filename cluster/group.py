"""The leader's side of a group: all ranks run the same calls in the same order, or the group dies.

Group owns order, deadlines, cancellation and death, on one asyncio loop. How a call reaches the
ranks is the subclasses' matter: InProcessGroup here, RayGroup in ray_group. Knows no Ray, no model.
"""

import asyncio
import contextvars
import logging
import os
import pickle
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Self

from cluster.errors import (
    DeadlinePassed,
    GroupClosed,
    GroupDead,
    RankBroken,
    RankDied,
    RanksDiverged,
)
from cluster.rank import Outcome, Raised, Rank
from cluster.spec import GroupSpec

logger = logging.getLogger(__name__)

OnDeath = Callable[[GroupDead], None]


def exit_on_death(delay_s: float = 0.2) -> OnDeath:
    """An `on_death` that ends this process `delay_s` later, when its callers have been answered.

    Serve replaces a replica whose process is gone sooner than one that only fails its checks.
    """

    def exit_soon(dead: GroupDead) -> None:
        logger.error("this process exits in %.1f s: %s", delay_s, dead)
        timer = threading.Timer(delay_s, os._exit, args=(1,))
        timer.daemon = True
        timer.start()

    return exit_soon


class Group(ABC):
    """Calls engine methods on all ranks of one group; made by a subclass' `start`.

    Any number of coroutines may call at once: calls run one after the other, first come first
    served. `on_death` is called once, after every pending call has been failed.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self._name = f"group of {spec.num_workers} x {spec.engine}"
        self._on_death: OnDeath | None = None
        self._turn = asyncio.Lock()
        self._death: asyncio.Future[GroupDead] = asyncio.get_running_loop().create_future()
        self._calls: set[asyncio.Task] = set()
        self._last_rites: asyncio.Task | None = None

    @property
    def dead(self) -> GroupDead | None:
        """Why the group answers no more, or None while it lives."""
        return self._death.result() if self._death.done() else None

    async def check(self) -> None:
        """Raise GroupDead if the group is dead. Never waits, however long the running step is."""
        if self._death.done():
            raise self._death_again()

    async def call(
        self,
        method: str,
        *args: Any,
        ranks: Literal["all", "first"] = "all",
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `engine.method(*args, **kwargs)` on every rank, or on rank 0 only; rank 0's result.

        `timeout_s` (default: the spec's step_timeout_s) counts from when the call's turn comes.
        If every rank that was called raised, rank 0's exception is raised as it is and the group
        lives on; anything else that goes wrong raises GroupDead. Arrays come back read-only.

        A caller that is cancelled abandons only its wait: a call already sent finishes on every
        rank, a call still waiting for its turn is sent to none.
        """
        num_ranks = self.spec.num_workers if ranks == "all" else 1
        deadline_s = self.spec.step_timeout_s if timeout_s is None else timeout_s
        sent = asyncio.Event()
        # In a context of its own: Ray finds the caller's request in the context and would cancel
        # with it what the ranks have not begun yet.
        task = asyncio.create_task(
            self._in_turn(sent, method, args, kwargs, num_ranks, deadline_s),
            context=contextvars.Context(),
        )
        self._calls.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not sent.is_set():
                task.cancel()
            raise
        except GroupDead as dead:
            dead.was_sent = sent.is_set()
            raise

    async def aclose(self) -> None:
        """End the ranks now. Pending calls raise GroupClosed; `on_death` is not called."""
        self._on_death = None
        self._die(GroupClosed(f"{self._name} was closed"))
        if self._calls:
            await asyncio.wait(self._calls)

    @abstractmethod
    def _send(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int
    ) -> list[Future]:
        """Hand one call to ranks 0..num_ranks-1 without waiting; futures of their Outcomes."""

    @abstractmethod
    def _end_ranks(self) -> None:
        """End every rank, without waiting."""

    def _rank_name(self, rank: int) -> str:
        return f"rank {rank} of the {self._name}"

    async def _in_turn(
        self,
        sent: asyncio.Event,
        method: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        num_ranks: int,
        timeout_s: float,
    ) -> Any:
        what = f"{method}()"
        async with self._turn:
            await self.check()
            futures = self._send(method, args, kwargs, num_ranks)
            sent.set()
            outcomes: list[Outcome] = await self._answers(futures, timeout_s, what)
            raised = [outcome.raised for outcome in outcomes if outcome.raised]
            if any(one.breaks_the_rank for one in raised):
                self._die(self._because(RankBroken, f"{what} broke a rank", raised))
            elif 0 < len(raised) < len(outcomes):
                self._die(self._because(RanksDiverged, f"{what} failed on some ranks only", raised))
            await self.check()
        if raised:
            raise raised[0].rebuild()
        return outcomes[0].value

    async def _answers(self, futures: list[Future], timeout_s: float, what: str) -> list[Any]:
        """What every rank returned, in rank order; a rank that is gone or late ends the group."""
        loop = asyncio.get_running_loop()
        answers = [awaitable(future) for future in futures]
        waiting = set(answers)
        deadline = loop.time() + timeout_s
        raised: list[Raised] = []
        while waiting:
            done, _ = await asyncio.wait(
                {*waiting, self._death},
                timeout=max(0.0, deadline - loop.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            await self.check()
            if not done and raised:
                self._die(self._because(RanksDiverged, f"{what} failed on some ranks only", raised))
            elif not done:
                self._die(DeadlinePassed(f"{what} took over {timeout_s:g} s on the {self._name}"))
            for answer in done:
                if error := answer.exception():
                    self._die(self._rank_died(answers.index(answer), error))
                elif getattr(answer.result(), "raised", None):
                    raised.append(answer.result().raised)
                    # The others raise at about the same time, or wait for this rank in vain.
                    deadline = min(deadline, loop.time() + self.spec.divergence_grace_s)
            waiting -= done
            await self.check()
        return [answer.result() for answer in answers]

    def _because(self, kind: type[GroupDead], what: str, raised: list[Raised]) -> GroupDead:
        dead = kind(f"{what} of the {self._name}: {raised[0].summary}")
        dead.__cause__ = raised[0].rebuild()
        return dead

    def _rank_died(self, rank: int, error: BaseException) -> RankDied:
        dead = RankDied(
            f"{self._rank_name(rank)} is gone or cannot answer ({type(error).__name__})"
        )
        dead.__cause__ = error
        return dead

    def _death_again(self) -> GroupDead:
        """The death as a new exception: one object raised in many tasks mixes their tracebacks."""
        dead = self._death.result()
        again = type(dead)(*dead.args)
        again.__cause__ = dead.__cause__
        return again

    def _die(self, dead: GroupDead) -> None:
        if self._death.done():
            return
        self._death.set_result(dead)
        self._end_ranks()
        if self._on_death:
            self._last_rites = asyncio.create_task(self._tell(self._on_death, dead))

    async def _tell(self, on_death: OnDeath, dead: GroupDead) -> None:
        if self._calls:
            await asyncio.wait(self._calls)
        on_death(dead)

    def _forget(self, task: asyncio.Task) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where the caller has gone


class InProcessGroup(Group):
    """A group of one rank in a thread of this process, without Ray: for tests and small uses.

    Values are pickled on their way in and out as they would be between processes, so an engine
    that keeps or changes its arguments behaves as it does in a worker.
    """

    def __init__(self, spec: GroupSpec) -> None:
        if spec.num_workers != 1:
            raise ValueError(
                f"an in-process group has 1 worker, got num_workers {spec.num_workers}"
            )
        super().__init__(spec)
        self._rank = Rank(spec)
        self._work: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        # A daemon: a call that never returns must not keep the interpreter from exiting.
        threading.Thread(target=self._run_rank, name=self._name, daemon=True).start()

    @classmethod
    async def start(cls, spec: GroupSpec, *, on_death: OnDeath | None = None) -> Self:
        """Construct the engine in its thread; raises what its constructor raised."""
        group = cls(spec)
        future: Future = Future()
        group._work.put((future, group._rank.load))
        try:
            [outcome] = await group._answers([future], spec.start_timeout_s, "the start")
            if outcome.raised:
                raise outcome.raised.rebuild()
        except BaseException:
            await group.aclose()
            raise
        group._on_death = on_death
        return group

    def _run_rank(self) -> None:
        while (item := self._work.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

    def _send(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int
    ) -> list[Future]:
        payload = _over_the_wire((args, kwargs))

        def call() -> Outcome:
            args, kwargs = payload
            return _over_the_wire(self._rank.run(method, args, kwargs, keep_value=True))

        future: Future = Future()
        self._work.put((future, call))
        return [future]

    def _end_ranks(self) -> None:
        self._work.put(None)


def awaitable(future: Future) -> asyncio.Future:
    """`future` on the running loop; its exception counts as seen even if nobody awaits it."""
    answer = asyncio.wrap_future(future)
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
    return answer


def _over_the_wire(value: Any) -> Any:
    """A copy as another process would get it: arrays come out read-only."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
