"""A load on a running service, and what came of it: `python -m benchmarks.loadgen`.

    --concurrency 8 --jobs 48      closed loop: eight jobs in flight, the next one follows each end
    --rate 30 --duration 300       open loop: Poisson arrivals, which never wait for answers
    --sequential                   the closed loop with one job in flight
    --compare                      the load, then the same jobs one at a time, and the ratio

Owns the loops and the command line. Talks HTTP only (client.py); the figures are trace.py's, their
presentation report.py's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.client import ServiceClient, ServiceFailed, connect
from benchmarks.machine import describe_machine
from benchmarks.report import comparison
from benchmarks.trace import JobTrace, Run, percentile, spans_of
from benchmarks.workload import Body, Workload, poisson_arrivals

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Load:
    """When jobs are submitted: at `arrivals` (s from the start), else `concurrency` at a time."""

    name: str
    num_jobs: int
    concurrency: int | None = None
    arrivals: tuple[float, ...] | None = None

    @classmethod
    def closed(cls, *, concurrency: int, num_jobs: int) -> Load:
        if concurrency < 1 or num_jobs < 1:
            raise ValueError("--concurrency and --jobs must be at least 1")
        name = "sequential" if concurrency == 1 else f"closed-{concurrency}"
        return cls(name=name, num_jobs=num_jobs, concurrency=concurrency)

    @classmethod
    def open(cls, *, jobs_per_minute: float, duration_s: float, seed: int) -> Load:
        arrivals = poisson_arrivals(
            jobs_per_minute=jobs_per_minute, duration_s=duration_s, seed=seed
        )
        if not arrivals:
            raise ValueError(
                f"no job arrives in {duration_s:g} s at {jobs_per_minute:g} per minute: "
                "raise --rate or --duration"
            )
        name = f"open-{jobs_per_minute:g}"
        return cls(name=name, num_jobs=len(arrivals), arrivals=tuple(arrivals))

    @property
    def sequential(self) -> Load:
        """The same jobs, one at a time."""
        return Load.closed(concurrency=1, num_jobs=self.num_jobs)


class Progress:
    """The bar: jobs ended, jobs in flight, the pace and the median latency so far."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.started = time.monotonic()
        self.num_in_flight = 0
        self.latencies: list[float] = []

    def submitted(self) -> None:
        self.num_in_flight += 1
        self._show()

    def ended(self, job: JobTrace) -> None:
        self.num_in_flight -= 1
        self.latencies.append(job.latency_s)
        self.bar.update()
        self._show()

    def _show(self) -> None:
        facts = [f"{self.num_in_flight} in flight"]
        if self.latencies:
            pace = len(self.latencies) / (time.monotonic() - self.started) * 3600
            facts += [f"{pace:.0f} jobs/h", f"p50 {percentile(self.latencies, 50):.1f} s"]
        self.bar.set_postfix_str(", ".join(facts))


async def run_load(
    client: ServiceClient,
    load: Load,
    bodies: Sequence[Body],
    *,
    progress: Progress | None = None,
) -> list[JobTrace]:
    """Every job of the load, ended. Raises ServiceFailed when the service refuses one for good."""
    run_id = uuid.uuid4().hex[:12]
    places = asyncio.Semaphore(load.concurrency or load.num_jobs)
    started = time.monotonic()

    async def one(position: int, body: Body) -> JobTrace:
        if load.arrivals is not None:
            await asyncio.sleep(max(0.0, started + load.arrivals[position] - time.monotonic()))
        async with places:
            return await follow(client, body, key=f"{run_id}-{position}", progress=progress)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*numbered)) for numbered in enumerate(bodies)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def follow(
    client: ServiceClient, body: Body, *, key: str, progress: Progress | None
) -> JobTrace:
    """One job from its submit to its end."""
    submitted_at = time.time()
    if progress is not None:
        progress.submitted()
    video, num_refusals = await client.submit(body, idempotency_key=key)
    completed_at = await client.ended(video["id"])
    video = await client.retrieve(video["id"])
    job = JobTrace(
        id=video["id"],
        model=video["model"],
        status=video["status"],
        submitted_at=submitted_at,
        completed_at=completed_at,
        num_refusals=num_refusals,
        error=video["error"] and video["error"]["message"],
        timings=spans_of(video.get("timings", ())),
    )
    if progress is not None:
        progress.ended(job)
    return job


async def measure(args: argparse.Namespace, workload: Workload, load: Load) -> list[Run]:
    """The load's run and, for a comparison, the sequential one; each after a warm-up."""
    loads = [load, load.sequential] if args.compare else [load]
    runs, next_index = [], int(time.time()) % 1_000_000 * 1000  # prompts nobody has asked for
    async with connect(args.url, api_key=args.api_key, poll_s=args.poll_s) as client:
        if not args.no_warm_up:
            bodies = workload.one_of_each(first_index=next_index)
            warm_up = Load.closed(concurrency=1, num_jobs=len(bodies))
            with _bar("warm-up", len(bodies)) as progress:
                await run_load(client, warm_up, bodies, progress=progress)
            next_index += len(bodies)
        for each in loads:
            machine, started_at = describe_machine(), time.time()
            bodies = workload.bodies(each.num_jobs, seed=args.seed, first_index=next_index)
            with _bar(each.name, each.num_jobs) as progress:
                jobs = await run_load(client, each, bodies, progress=progress)
            next_index += each.num_jobs
            run = Run(
                name=each.name, options=_options(args), environment=machine,
                jobs=tuple(jobs), started_at=started_at,
            )  # fmt: skip
            runs.append(run)
    return runs


@contextmanager
def _bar(name: str, num_jobs: int):
    with tqdm(total=num_jobs, desc=name, unit="job") as bar:
        yield Progress(bar)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The command line without the key, and without folders of this machine."""
    kept = {k: v for k, v in vars(args).items() if k not in ("api_key", "output")}
    return kept | {"workload": args.workload and args.workload.name}


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Load]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loadgen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="sent as Authorization: Bearer")
    parser.add_argument("--concurrency", type=int, help="jobs in flight (default 8)")
    parser.add_argument("--jobs", type=int, help="jobs in all (default 24)")
    parser.add_argument("--rate", type=float, help="open loop: jobs per minute")
    parser.add_argument("--duration", type=float, help="open loop: seconds in which jobs arrive")
    parser.add_argument("--sequential", action="store_true", help="one job at a time")
    parser.add_argument(
        "--compare", action="store_true", help="and one job at a time, and the ratio"
    )
    parser.add_argument("--workload", type=Path, help="what is asked for; see workload.py")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals and the mix")
    parser.add_argument("--poll-s", type=float, default=0.1, help="and the exactness of latencies")
    parser.add_argument(
        "--no-warm-up", action="store_true", help="skip one job of each kind before"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)
    is_open = args.rate is not None or args.duration is not None
    if is_open and (args.rate is None or args.duration is None):
        parser.error("an open loop needs both --rate and --duration")
    if is_open and (args.concurrency is not None or args.jobs is not None):
        parser.error("--concurrency and --jobs have no effect on an open loop")
    if args.sequential and (args.concurrency is not None or args.compare):
        parser.error("--sequential is --concurrency 1; --compare runs it besides another load")
    try:
        if is_open:
            load = Load.open(jobs_per_minute=args.rate, duration_s=args.duration, seed=args.seed)
        else:
            concurrency = 8 if args.concurrency is None else args.concurrency
            load = Load.closed(
                concurrency=concurrency, num_jobs=24 if args.jobs is None else args.jobs
            )
    except ValueError as error:
        parser.error(str(error))
    return args, load.sequential if args.sequential else load


def main(argv: Sequence[str] | None = None) -> int:
    args, load = parse(argv)
    try:
        workload = Workload.read(args.workload) if args.workload else Workload()
        runs = asyncio.run(measure(args, workload, load))
    except (ServiceFailed, ValueError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for run in runs:
        path = args.output / f"loadgen-{run.name}-{stamp}.json"
        run.save(path)
        print(f"saved {path}", file=sys.stderr)
    print(comparison(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
