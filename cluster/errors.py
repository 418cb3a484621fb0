"""What can go wrong with a GPU group, as the caller should see it.

    ClusterError                 retryable: may the same call be made again on another group?
    |-- GroupDead                yes   this group answers nothing any more
    |   |-- RankDied             yes   a worker process is gone
    |   |-- DeadlinePassed       yes   a call (or the start) took longer than it may
    |   |-- RanksDiverged        yes   some ranks raised, others did not
    |   |-- RankBroken           yes   CUDA or the collective library failed under the engine
    |   `-- GroupClosed          yes   closed on purpose, e.g. its replica is being drained
    `-- EngineError              no    an engine's error that cannot travel as its own class

An error raised by the engine itself (ValueError and the like) is not in this tree: it comes back
as it is and the group lives on. Knows nothing about Ray, torch or any model.
"""


class ClusterError(Exception):
    """Root of this package's errors; `retryable` is the whole retry policy."""

    retryable = False


class GroupDead(ClusterError):
    """The group is gone: every pending and every later call on it raises this.

    `was_sent` is False for a call that was still waiting for its turn: it cannot be the cause.
    """

    retryable = True
    was_sent = True


class RankDied(GroupDead):
    """A worker process exited, was killed, lost its node, or cannot answer any more."""


class DeadlinePassed(GroupDead):
    """A call was not answered by every rank in time, so the ranks' state is unknown."""


class RanksDiverged(GroupDead):
    """A call raised on some ranks only; its `__cause__` is the error of the lowest such rank."""


class RankBroken(GroupDead):
    """A rank lives but its CUDA context or process group does not; only a new process helps."""


class GroupClosed(GroupDead):
    """`aclose()` was called."""


class EngineError(ClusterError):
    """Stands in for an engine's exception that cannot be rebuilt here; the text is kept."""
