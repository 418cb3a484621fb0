"""Line: who goes next where there are few places. Pure asyncio.

Owns the order (lowest rank first, then who came first) and the number of places. Knows nothing
about what is done inside. Without it jobs would take turns segment by segment, move in lockstep and
leave one expert idle while the other has a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator
from typing import Any


class Line:
    """`async with line.place(rank)`: the lowest rank that waits gets the next free place."""

    def __init__(self, num_places: int = 1) -> None:
        self._num_places = num_places
        self._num_inside = 0
        self._tickets = itertools.count()
        self._waiting: list[tuple[Any, int, asyncio.Future[None]]] = []

    @property
    def num_places(self) -> int:
        return self._num_places

    @contextlib.asynccontextmanager
    async def place(self, rank: Any) -> AsyncIterator[Place]:
        place = Place(self, rank)
        try:
            await place.enter()
            yield place
        finally:
            place.leave()

    def resize(self, num_places: int) -> None:
        """Takes effect at once upwards; downwards as those inside leave. At least one."""
        self._num_places = max(1, num_places)
        self._admit()

    def _admit(self) -> None:
        while self._num_inside < self._num_places and self._first_waiting() is not None:
            _, _, turn = heapq.heappop(self._waiting)
            self._num_inside += 1
            turn.set_result(None)

    def _first_waiting(self) -> Any | None:
        """The rank of who goes next."""
        while self._waiting and self._waiting[0][2].done():  # gave up
            heapq.heappop(self._waiting)
        return self._waiting[0][0] if self._waiting else None


class Place:
    """One visitor's place in a line; held from `enter` to `leave`."""

    def __init__(self, line: Line, rank: Any) -> None:
        self._line = line
        self._rank = rank
        self._held = False

    async def enter(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._line._waiting, (self._rank, next(self._line._tickets), turn))
        self._line._admit()
        try:
            await turn
        finally:
            # Also when cancelled between being admitted and noticing it: `leave` gives it on.
            self._held = turn.done() and not turn.cancelled()
            if not self._held:
                turn.cancel()

    async def give_way(self) -> None:
        """Lets whoever waits with a lower rank go first, and comes back after."""
        first = self._line._first_waiting()
        if first is not None and first < self._rank:
            self.leave()
            await self.enter()

    def leave(self) -> None:
        if self._held:
            self._held = False
            self._line._num_inside -= 1
            self._line._admit()
