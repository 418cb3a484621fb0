"""Ways to lay T2V-A14B over the GPUs of one node, as Serve configs, and their run under a load.

Owns the layouts that `headline` compares and the service that runs each: its start, its load
through HTTP, and the kill of one of its groups. The figures are trace.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.client import connect
from benchmarks.loadgen import Load, run_load
from benchmarks.trace import JobTrace
from benchmarks.workload import Weighted, Workload
from serve_app import demo

MODEL = "t2v"
SIZES = {"480p": ("832x480", 81), "720p": ("1280x720", 81), "dry-run": ("64x64", 9)}
FEW_STEPS = {
    "num_inference_steps": 4, "solver": "euler", "flow_shift": 5,
    "guidance_scale": 1, "guidance_scale_2": 1,
}  # fmt: skip
"""The distilled models' use: of four steps each expert takes two."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`high` and `low` groups of `ulysses_degree` GPUs. With `shared`, both experts are to lie on
    every GPU: a job's experts then never work at the same time, and at most as many jobs are under
    way as there are pairs."""

    name: str
    high: int
    low: int
    ulysses_degree: int = 1
    shared: bool = False

    @property
    def num_gpus(self) -> int:
        groups = max(self.high, self.low) if self.shared else self.high + self.low
        return groups * self.ulysses_degree

    @property
    def gpus_as_ray_counts_them(self) -> list[int]:
        """Where experts share them, each GPU three times over: for one expert, for the other and
        for what lies beside. A rank asks for a whole one: a group of several may not ask for
        fractions, of which Ray would put all on one GPU. That replicas made one after another get
        neighbours in this list was seen, and is not promised."""
        return list(range(self.num_gpus)) * (3 if self.shared else 1)


def layouts(num_gpus: int) -> list[Layout]:
    """The balanced split first, then what it is compared with, then the other splits."""
    half = num_gpus // 2
    found = [
        Layout(name=f"split {half}:{num_gpus - half}", high=half, low=num_gpus - half),
        Layout(name=f"{num_gpus} whole models", high=num_gpus, low=num_gpus, shared=True),
        Layout(name="one group", high=1, low=1, ulysses_degree=num_gpus, shared=True),
    ]
    if num_gpus >= 4:
        for high in (half + 1, half - 1):
            found.append(Layout(name=f"split {high}:{num_gpus - high}", high=high,
                                low=num_gpus - high))  # fmt: skip
    return found


def serve_config(layout: Layout, checkpoint: Path, *, on_cpu: bool) -> dict[str, Any]:
    """A tenth of a GPU each for text encoder and VAE, which lie beside the experts."""

    def stage(num_gpus: float, **more: Any) -> dict[str, Any]:
        where = {"num_gpus": 0, "num_cpus": 0.1} if on_cpu else {"num_gpus": num_gpus}
        return where | more

    def expert(num_groups: int) -> dict[str, Any]:
        degree = {"ulysses_degree": layout.ulysses_degree} if layout.ulysses_degree > 1 else {}
        jobs = 1 if layout.shared else 2
        return stage(
            1 if layout.shared else 0.8, num_replicas=num_groups, max_active_jobs=jobs, **degree
        )

    args = {
        "models": {
            MODEL: {
                "checkpoint": str(checkpoint),
                "high_noise_expert": expert(layout.high),
                "low_noise_expert": expert(layout.low),
            }
        },
        "text_encoder": stage(0.1),
        "vae": stage(0.1, num_replicas=max(1, layout.num_gpus // 4)),
        "pipeline": {"num_cpus": 0, "max_active": layout.high if layout.shared else 64},
        "ingress": {"num_cpus": 0, "max_active": 500},
    }
    app = {"name": "wan", "route_prefix": "/", "import_path": "serve_app.app:build", "args": args}
    return {
        "http_options": {"host": demo.HOST, "port": demo.PORT},
        "applications": [app],
    }


@contextmanager
def running(
    layout: Layout, checkpoint: Path, folder: Path, *, on_cpu: bool
) -> Iterator[dict[str, Any]]:
    """The service of a layout, ready and without jobs. Raises demo.DemoFailed when it does not
    become so."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "data").exists():
        shutil.rmtree(folder / "data")
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(serve_config(layout, checkpoint, on_cpu=on_cpu)))
    environ = os.environ | {"WAN_DATA_DIR": str(folder / "data")}
    if layout.shared and not on_cpu:
        gpus = layout.gpus_as_ray_counts_them
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"GPU": len(gpus)})
    started = time.monotonic()
    with demo.service(config, folder / "serve.log", environ):
        yield {"start_s": time.monotonic() - started}


def load(case: str, *, num_jobs: int, concurrency: int) -> list[JobTrace]:
    """`num_jobs` few-step videos of a size, `concurrency` in flight, after one that warms up."""

    async def run() -> list[JobTrace]:
        async with connect(demo.URL, patience_s=120) as client:
            warm_up = _workload(case).one_of_each(first_index=10**6)
            await run_load(client, Load.closed(concurrency=1, num_jobs=1), warm_up)
            closed = Load.closed(concurrency=concurrency, num_jobs=num_jobs)
            return await run_load(client, closed, _workload(case).bodies(num_jobs, seed=0))

    return asyncio.run(run())


def load_and_kill(
    case: str, *, num_jobs: int, concurrency: int, after_s: float, folder: Path
) -> tuple[list[JobTrace], float]:
    """The load with a worker of the high-noise expert killed in it; and when that was."""

    async def kill() -> float:
        await asyncio.sleep(after_s)
        _worker("HighNoiseExpert", folder / "data").kill()
        return time.time()

    async def run() -> tuple[list[JobTrace], float]:
        async with connect(demo.URL, patience_s=120) as client:
            killing = asyncio.create_task(kill())
            closed = Load.closed(concurrency=concurrency, num_jobs=num_jobs)
            bodies = _workload(case).bodies(num_jobs, seed=1, first_index=num_jobs)
            jobs = await run_load(client, closed, bodies)
            return jobs, await killing

    return asyncio.run(run())


def recovery(jobs: list[JobTrace], killed_at: float) -> dict[str, Any]:
    """Seconds until the group's successor worked, and what the kill cost. A replica that first
    works after the kill is the successor."""
    spans = [span for job in jobs for span in job.timings if span.stage.startswith("HighNoise")]
    before = {span.replica for span in spans if span.started_at < killed_at}
    after = [span.started_at for span in spans if span.replica not in before]
    return {
        "num_jobs": len(jobs),
        "num_lost": sum(job.status != "completed" for job in jobs),
        "seconds_to_recovery": min(after) - killed_at if after else None,
    }


def _workload(case: str) -> Workload:
    size, num_frames = SIZES[case]
    prompt = "a sailing boat in a storm, take {index}"
    body = {"prompt": prompt, "size": size, "num_frames": num_frames} | FEW_STEPS
    return Workload(entries=(Weighted(body=body),))


def _worker(stage: str, data_dir: Path) -> psutil.Process:
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except (psutil.Error, OSError):
            continue
        if environ.get("WAN_STAGE") == stage and environ.get("WAN_DATA_DIR") == str(data_dir):
            return process
    raise LookupError(f"no worker of {stage} runs")
