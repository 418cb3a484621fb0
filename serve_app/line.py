"""Line: who goes next into a deployment with few places. Pure asyncio.

Owns the order (highest priority, then the oldest job) and the number of places. Knows nothing about
what is done inside. Without it jobs would take turns segment by segment, move in lockstep and leave
one expert idle while the other has a queue.
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

    @contextlib.asynccontextmanager
    async def place(self, rank: Any) -> AsyncIterator[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._tickets), turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            # Admitted, even if cancelled before it could notice.
            if turn.done() and not turn.cancelled():
                self._num_inside -= 1
            self._admit()

    def resize(self, num_places: int) -> None:
        """Takes effect at once upwards; downwards as those inside leave. At least one."""
        self._num_places = max(1, num_places)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._num_inside < self._num_places:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._num_inside += 1
                turn.set_result(None)
