"""What happened in a run, as values, and the figures that follow from it.

Owns the form of a result file and every formula: percentiles, busy shares, overlap. Pure: knows
nothing about HTTP, Ray or plots. Times are unix seconds; a stage's are the service's clock, a job's
`submitted_at` and `completed_at` the client's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One stage's work on one job; an expert's covers the steps [from_step, to_step).

    `busy_s` <= `seconds`: between two steps of a job an expert may work for another one.
    """

    stage: str
    replica: str
    started_at: float
    ended_at: float
    busy_s: float
    from_step: int = 0
    to_step: int = 0

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass(frozen=True, kw_only=True)
class JobTrace:
    """One job as its client saw it. `submitted_at` is before the first attempt to submit;
    `num_refusals` counts the 429s before it was accepted. `timings` may be empty."""

    id: str
    model: str
    status: str
    submitted_at: float
    completed_at: float
    num_refusals: int = 0
    error: str | None = None
    timings: tuple[Span, ...] = ()

    @property
    def latency_s(self) -> float:
        return self.completed_at - self.submitted_at

    @property
    def queue_s(self) -> float | None:
        """From the submit until a stage first worked for it."""
        if not self.timings:
            return None
        return min(span.started_at for span in self.timings) - self.submitted_at


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a load: how it was made (`options`, `environment`), and its jobs."""

    name: str
    options: dict[str, Any]
    environment: dict[str, Any]
    jobs: tuple[JobTrace, ...]
    started_at: float

    def save(self, path: Path) -> None:
        """The run and, for people who read the file, its figures."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"figures": figures(self.jobs)}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Raises ValueError naming the file when it is none of ours."""
        try:
            content = json.loads(path.read_text())
            content.pop("figures", None)
            jobs = [
                JobTrace(**job | {"timings": tuple(Span(**span) for span in job["timings"])})
                for job in content.pop("jobs")
            ]
            return cls(**content, jobs=tuple(jobs))
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of benchmarks.loadgen: {error}") from error


def figures(jobs: Sequence[JobTrace]) -> dict[str, Any]:
    """Everything that a report shows. None where there is nothing to say, e.g. no job completed.

    Throughput counts from the first submit to the last completion, busy shares and overlap from
    the first stage's start to the last one's end.
    """
    completed = [job for job in jobs if job.status == "completed"]
    latencies = [job.latency_s for job in completed]
    queue = [job.queue_s for job in completed if job.queue_s is not None]
    duration_s = None
    if completed:
        ended = max(job.completed_at for job in completed)
        duration_s = ended - min(job.submitted_at for job in jobs)
    spans = [span for job in completed for span in job.timings]
    return {
        "num_jobs": len(jobs),
        "num_completed": len(completed),
        "num_failed": len(jobs) - len(completed),
        "num_refusals": sum(job.num_refusals for job in jobs),
        "duration_s": duration_s,
        "jobs_per_hour": len(completed) / duration_s * 3600 if duration_s else None,
        "latency_s": distribution(latencies),
        "queue_s": distribution(queue),
        "stages_busy_at_once": overlap(spans),
        "stages": stage_figures(spans),
    }


def stage_figures(spans: Sequence[Span]) -> dict[str, dict[str, Any]]:
    """Per stage, in order of first use. A replica that never worked is not known here.

    `busy_s` counts a moment once per replica, `call_s` all of each call, also where calls overlap.
    """
    if not spans:
        return {}
    window = window_of(spans)
    length_s = window[1] - window[0]
    found: dict[str, dict[str, Any]] = {}
    for stage in dict.fromkeys(s.stage for s in sorted(spans, key=lambda s: s.started_at)):
        mine = [span for span in spans if span.stage == stage]
        shares = busy_share_by_replica(mine, window)
        found[stage] = {
            "num_replicas": len(shares),
            "busy_share": sum(shares.values()) / len(shares),
            "busy_s": sum(shares.values()) * length_s,
            "num_calls": len(mine),
            "call_s": distribution([span.seconds for span in mine]),
        }
    return found


def busy_share_by_replica(spans: Iterable[Span], window: Interval) -> dict[str, float]:
    """The share of `window` in which a replica works.

    Two bounds, of which the lower holds: the time covered by any span (an expert may pause in it),
    and the sum of `busy_s` (calls of the other stages wait for each other within theirs). A span
    that the window cuts counts in proportion.
    """
    of_replica: dict[str, list[Span]] = {}
    for span in spans:
        of_replica.setdefault(span.replica, []).append(span)
    length_s = window[1] - window[0]
    return {
        replica: min(_covered_s(mine, window), _worked_s(mine, window)) / length_s
        if length_s > 0
        else 0.0
        for replica, mine in of_replica.items()
    }


def _covered_s(spans: Sequence[Span], window: Interval) -> float:
    return union_s(clipped([(span.started_at, span.ended_at) for span in spans], window))


def _worked_s(spans: Sequence[Span], window: Interval) -> float:
    inside = (
        (span, union_s(clipped([(span.started_at, span.ended_at)], window))) for span in spans
    )
    return sum(span.busy_s * part_s / span.seconds for span, part_s in inside if part_s)


def overlap(spans: Sequence[Span]) -> dict[str, float] | None:
    """How many different stages work at once: the mean over time, and the most at any moment."""
    if not spans:
        return None
    start, end = window_of(spans)
    by_stage = {span.stage: [] for span in spans}
    for span in spans:
        by_stage[span.stage].append((span.started_at, span.ended_at))
    unions = [union for intervals in by_stage.values() for union in merged(intervals)]
    busy_s = sum(b - a for a, b in unions)
    return {"mean": busy_s / (end - start) if end > start else 0.0, "most": most_at_once(unions)}


def most_at_once(intervals: Iterable[Interval]) -> int:
    """An interval that ends when another starts does not meet it."""
    edges = sorted(edge for a, b in intervals if b > a for edge in ((a, 1), (b, -1)))
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


def window_of(spans: Iterable[Span]) -> Interval:
    spans = list(spans)
    return min(span.started_at for span in spans), max(span.ended_at for span in spans)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as disjoint intervals, rising."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        elif end > start:
            union.append((start, end))
    return union


def union_s(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in merged(intervals))


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    return [(start, end) for start, end in cut if end > start]


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": sum(values) / len(values),
        "p50": percentile(values, 50),
        "p95": percentile(values, 95),
        "p99": percentile(values, 99),
        "max": max(values),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values have no percentile")
    if not 0 <= percent <= 100:
        raise ValueError(f"a percentile is 0..100, got {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spans_of(timings: Iterable[Mapping[str, Any]]) -> tuple[Span, ...]:
    """Timings as the service tells them; fields that are not known here are left out."""
    names = Span.__dataclass_fields__
    return tuple(Span(**{k: v for k, v in timing.items() if k in names}) for timing in timings)
