"""One thread that follows another: pieces are worked on in order while the next are being made.

Owns the bounded queue between the two and the passing on of errors. Knows nothing about the pieces.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Piece = TypeVar("Piece")


class Follower(Generic[Piece]):
    """Calls `work(piece)` for every piece put, in order, in a thread of its own.

        with Follower(write, max_waiting=2) as follower:
            for piece in pieces:
                follower.put(piece)

    At most `max_waiting` pieces wait; `put` waits while they do. What `work` raises is raised by
    the next `put` or at the end, and what is still waiting is dropped, as it is when the block is
    left by an exception.
    """

    def __init__(self, work: Callable[[Piece], object], *, max_waiting: int) -> None:
        self._work = work
        self._waiting: queue.Queue[tuple[Piece] | None] = queue.Queue(max_waiting)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def put(self, piece: Piece) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.put((piece,))

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._dropping:
                continue
            try:
                self._work(*item)
            except BaseException as error:  # raised in the thread that is followed
                self._error, self._dropping = error, True

    def __enter__(self) -> Follower[Piece]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._dropping = self._dropping or kind is not None
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error
