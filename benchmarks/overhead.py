"""What orchestration costs: the real service around engines that sleep a known time.

    python -m benchmarks.overhead                            hand-overs of small states
    python -m benchmarks.overhead --size 1280x720 --num-frames 81      of a 720p video's (74 MiB)

Pipeline, JobStore, Serve deployments and RayGroups are the production ones, on a Ray of their own;
only the engines are not (sleeping_engines.py). Two figures, each from the jobs' own timings:

    hand-over    of jobs that run alone: the time in which no stage works, per hand-over; the claim
                 of the queued job and its completion are hand-overs too
    busy share   of the bottleneck stage while many jobs wait: the share of the time between its
                 first start and its last end in which its ranks were called; and the smaller share
                 in which they slept, i.e. a GPU would have computed
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.report import markdown
from benchmarks.sleeping_engines import SleepTimes
from benchmarks.trace import (
    JobTrace,
    Run,
    busy_share_by_replica,
    distribution,
    spans_of,
    window_of,
)
from wan_model.config import WAN_TINY
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule

RESULT = Path(__file__).parent / "results" / "overhead.json"
MODEL = "sleeper"
MIN_BUSY_SHARE, MAX_HAND_OVER_S = 0.97, 0.050
JOB_TIMEOUT_S = 300.0


# --- what is known of a job, and what follows from its timings ------------------------------------


def slept_s(times: SleepTimes, params: VideoParams) -> dict[str, float]:
    """What each stage sleeps for one job with a prompt of its own."""
    schedule = build_schedule(params)
    num_high = schedule.boundary_step
    return {
        "TextEncoder": times.text_encode_s,
        "HighNoiseExpert": num_high * times.step_high_noise_s,
        "LowNoiseExpert": (schedule.num_steps - num_high) * times.step_low_noise_s,
        "VAE": times.decode_s,
    }


def hand_overs(job: JobTrace) -> list[tuple[str, float]]:
    """(from -> to, seconds) of each time in which no stage works for this job, in order."""
    spans = sorted(job.timings, key=lambda span: span.started_at)
    names = ["submit", *(span.stage for span in spans), "completed"]
    ends = [job.submitted_at, *(span.ended_at for span in spans)]
    starts = [*(span.started_at for span in spans), job.completed_at]
    kinds = [f"{a} -> {b}" for a, b in pairwise(names)]
    return [(k, start - end) for k, end, start in zip(kinds, ends, starts, strict=True)]


def solo_figures(jobs: Sequence[JobTrace], slept: dict[str, float]) -> dict[str, Any]:
    """Of jobs that ran alone. `in_stages_s`: what a job's stages took beyond what they slept."""
    gaps = [gap for job in jobs for gap in hand_overs(job)]
    kinds = dict.fromkeys(kind for kind, _ in gaps)
    beyond = [sum(s.seconds for s in job.timings) - sum(slept.values()) for job in jobs]
    return {
        "num_jobs": len(jobs),
        "num_hand_overs": len(gaps),
        "per_hand_over_s": sum(gap_s for _, gap_s in gaps) / len(gaps),
        "hand_overs_s": {
            kind: distribution([gap_s for other, gap_s in gaps if other == kind]) for kind in kinds
        },
        "in_stages_s": sum(beyond) / len(beyond),
    }


def saturation_figures(jobs: Sequence[JobTrace], slept: dict[str, float]) -> dict[str, Any]:
    """Of jobs that were submitted at once. `busy_share`: as the stage tells it, which includes the
    calls to its ranks; `slept_share`: what the engine slept, which is less."""
    bottleneck = max(slept, key=lambda stage: slept[stage])
    spans = [span for job in jobs for span in job.timings if span.stage == bottleneck]
    window = window_of(spans)
    [busy_share] = busy_share_by_replica(spans, window).values()
    return {
        "num_jobs": len(jobs),
        "bottleneck": bottleneck,
        "window_s": window[1] - window[0],
        "busy_share": busy_share,
        "slept_share": len(jobs) * slept[bottleneck] / (window[1] - window[0]),
    }


# --- the service around the engines ---------------------------------------------------------------


def start_service(folder: Path, times: SleepTimes, *, segment_s: float) -> str:
    """Ray and the graph, ready. Returns the URL of its job store."""
    # Ray reads these when it is imported, so neither it nor serve_app.app may be before.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    import ray
    from ray import serve

    from serve_app.app import graph
    from serve_app.config import ServiceConfig

    on_cpu = {"num_gpus": 0, "num_cpus": 0.1}
    expert = on_cpu | {"segment_s": segment_s}
    model = {"checkpoint": times.to_checkpoint()}
    model |= {"high_noise_expert": expert, "low_noise_expert": expert}
    config = ServiceConfig.model_validate(
        {
            "models": {MODEL: model},
            "text_encoder": on_cpu,
            "vae": on_cpu,
            "ingress": {"num_cpus": 0, "max_active": 10},
            "pipeline": {"num_cpus": 0, "max_active": 16},
            "data_dir": folder,
        }
    )
    service = config.resolve({MODEL: WAN_TINY}, environ={})
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    serve.run(graph(service, engine_module="benchmarks.sleeping_engines"), route_prefix=None)
    return service.job_store_url


def stop_service() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():  # else Serve would start a Ray in order to shut down in it
        serve.shutdown()
        ray.shutdown()


async def run_jobs(store: Any, params: VideoParams, *, num_jobs: int, name: str) -> list[JobTrace]:
    """Submits all at once, and returns when all have ended."""
    from serve_app.jobs import NewJob

    unique = uuid.uuid4().hex
    submitted = []
    for number in range(num_jobs):
        job = NewJob(
            model=MODEL, prompt=f"{unique} {number}", params=asdict(params),
            num_steps=params.num_steps, predicted_s=0.0,
        )  # fmt: skip
        submitted.append((await store.submit(job)).id)
    deadline = time.monotonic() + JOB_TIMEOUT_S
    with tqdm(total=num_jobs, desc=name, unit="job", leave=False) as bar:
        while bar.n < num_jobs:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{num_jobs - bar.n} jobs have not ended: see Serve's logs")
            # Seldom and in one query: the times are the jobs' own, and asking takes CPU from them.
            await asyncio.sleep(0.25)
            latest = {job.id: job for job in await store.list(limit=num_jobs)}
            bar.update(sum(job.finished for job in latest.values()) - bar.n)
    return [_trace(latest[job_id]) for job_id in submitted]


def _trace(job: Any) -> JobTrace:
    if job.status != "completed":
        raise RuntimeError(f"{job.id} ended {job.status}: {job.error_message}")
    return JobTrace(
        id=job.id, model=job.model, status=job.status,
        submitted_at=job.created_at, completed_at=job.completed_at,
        timings=spans_of(job.artifacts["timings"]),
    )  # fmt: skip


async def measure(url: str, params: VideoParams, *, num_solo: int, num_jobs: int):
    """(the jobs that ran alone, the jobs that ran together)."""
    from serve_app.jobs import JobStore

    store = await JobStore.open(url)
    try:
        # The first job teaches the pipeline the seconds of a step, and warms every path.
        await run_jobs(store, params, num_jobs=1, name="warm-up")
        solo = []
        for _ in range(num_solo):
            solo += await run_jobs(store, params, num_jobs=1, name="alone")
        return solo, await run_jobs(store, params, num_jobs=num_jobs, name="together")
    finally:
        await store.close()


def table(result: dict[str, Any]) -> str:
    solo, together = result["solo"], result["saturation"]
    rows = [["orchestration overhead", "measured", "wanted"]]
    rows.append(["per hand-over, ms", _ms(solo["per_hand_over_s"]), f"< {_ms(MAX_HAND_OVER_S)}"])
    rows += [[f"  {kind}, ms", _ms(d["mean"]), ""] for kind, d in solo["hand_overs_s"].items()]
    rows.append(["inside all stages of a job, ms", _ms(solo["in_stages_s"]), ""])
    for share, wanted in (("busy_share", f">= {MIN_BUSY_SHARE:.0%}"), ("slept_share", "")):
        name = share.replace("_share", "")
        rows.append([f"{together['bottleneck']} {name}", f"{together[share]:.2%}", wanted])
    return markdown(rows)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", default="128x128", help="decides the size of the states")
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--step-s", type=float, default=1.0, help="of the low-noise expert")
    parser.add_argument("--segment-s", type=float, default=3.0)
    parser.add_argument("--solo-jobs", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=12, help="together")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--trace", type=Path, help="keep the jobs that ran together here, as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    width, height = map(int, args.size.split("x"))
    params = VideoParams.for_model(
        WAN_TINY, width=width, height=height, num_frames=args.num_frames, num_steps=args.num_steps
    )
    times = SleepTimes(
        text_encode_s=0.05, step_high_noise_s=args.step_s / 2, step_low_noise_s=args.step_s,
        decode_s=0.1,
    )  # fmt: skip
    machine, started_at = describe_machine(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            url = start_service(Path(folder), times, segment_s=args.segment_s)
            solo, together = asyncio.run(
                measure(url, params, num_solo=args.solo_jobs, num_jobs=args.jobs)
            )
        finally:
            stop_service()
    options = {k: v for k, v in vars(args).items() if k not in ("output", "trace")}
    slept = slept_s(times, params)
    result = {
        "options": options,
        "sleeps_s": slept,
        "environment": machine,
        "solo": solo_figures(solo, slept),
        "saturation": saturation_figures(together, slept),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"saved {args.output}", file=sys.stderr)
    if args.trace:
        Run(
            name="together", options=options, environment=machine,
            jobs=tuple(together), started_at=started_at,
        ).save(args.trace)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
