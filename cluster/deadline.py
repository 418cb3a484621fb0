"""How long one more step may take, learned from those that were taken.

Owns the rule and nothing else: pure numbers, no clock, no group. The first steps of a kind may be
slow for good reasons (compilation, autotuning, the first collectives), so they have the whole
configured time; then a step that takes several times as long as any before it counts as stuck.
"""

from collections.abc import Hashable
from dataclasses import dataclass

FACTOR = 5.0
"""Times the slowest step seen: cards slow down by heat or neighbours, by less than this."""

FLOOR_S = 20.0
"""No deadline is shorter: a garbage collection or a full disk cache takes seconds."""

NUM_FIRST = 2
"""Steps of a kind that have the whole configured time and are not yet measured against."""

MAX_KINDS = 256


@dataclass(frozen=True, kw_only=True)
class Measured:
    num_steps: int = 0
    slowest_s: float = 0.0


class StepDeadlines:
    """One deadline per kind of step; a kind is whatever decides how much work a step is.

    `longest_s` is the configured limit: what is learned only ever shortens it.
    """

    def __init__(self, longest_s: float, *, factor: float = FACTOR, floor_s: float = FLOOR_S):
        self.longest_s = longest_s
        self.factor = factor
        self.floor_s = floor_s
        self._measured: dict[Hashable, Measured] = {}

    def of(self, kind: Hashable) -> float:
        """Seconds that the next step of this kind may take."""
        measured = self._measured.get(kind, Measured())
        if measured.num_steps < NUM_FIRST:
            return self.longest_s
        return min(self.longest_s, max(self.floor_s, self.factor * measured.slowest_s))

    def record(self, kind: Hashable, seconds: float) -> None:
        """A step of this kind took so long. The very first one does not set the measure."""
        before = self._measured.pop(kind, Measured())
        slowest_s = max(before.slowest_s, seconds) if before.num_steps else 0.0
        self._measured[kind] = Measured(num_steps=before.num_steps + 1, slowest_s=slowest_s)
        while len(self._measured) > MAX_KINDS:  # the one not seen for longest
            del self._measured[next(iter(self._measured))]
