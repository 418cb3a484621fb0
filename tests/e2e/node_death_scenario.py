"""Run by test_node_death.py: a job of the real pipeline on groups of two GPU nodes; one node dies.

Real: the pipeline, the job table, the artifacts, both expert stages, their groups on Ray and the
engines in them. In Serve's place a Handle starts a stage's replacement when its group is dead; the
text encoder and the VAE are one step of nothing. Writes what happened as JSON and the final
latents beside it.
"""

import asyncio
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cluster")]
os.environ["PYTHONPATH"] = str(ROOT)

import numpy as np  # noqa: E402
import ray  # noqa: E402
from nodes_scenario import STORE_BYTES, Cluster, kill_node  # noqa: E402
from one_start import one_start_at_a_time  # noqa: E402

from cluster.ray_group import RayGroup  # noqa: E402
from serve_app import pipeline as pipeline_module  # noqa: E402
from serve_app.app import group_spec  # noqa: E402
from serve_app.config import ServiceConfig  # noqa: E402
from serve_app.jobs import NewJob  # noqa: E402
from serve_app.pipeline import Pipeline  # noqa: E402
from serve_app.stages import Expert, StageReport, StageResult, StageStores  # noqa: E402
from wan_model.config import WAN_TINY  # noqa: E402
from wan_model.params import VideoParams  # noqa: E402

KILL_AT_STEP = 4
REPORT = StageReport(stage="Fake", replica="r", started_at=0.0, ended_at=1.0, busy_s=1.0)


class Response:
    """A DeploymentResponse: awaitable, cancellable, and resolved where it is passed on."""

    def __init__(self, work):
        self.task = asyncio.create_task(work)

    def __await__(self):
        return asyncio.shield(self.task).__await__()

    def cancel(self):
        self.task.cancel()


class Handle:
    """A deployment of one replica; `deaths` are the moments at which its groups' ends were told."""

    def __init__(self, make_stage):
        self.make_stage = make_stage
        self.stage = None
        self.deaths = []

    async def start(self):
        async def start_group(spec, on_death):
            return await RayGroup.start(spec, on_death=self.replace)

        self.stage = asyncio.create_task(self.make_stage(start_group))
        return await self.stage

    def replace(self, dead):
        self.deaths.append((time.monotonic(), type(dead).__name__))
        self.restarting = asyncio.create_task(self.start())

    def __getattr__(self, method):
        async def call(args, kwargs):
            stage = await self.stage
            args = [await arg if isinstance(arg, Response) else arg for arg in args]
            return await getattr(stage, method)(*args, **kwargs)

        handle = type("Method", (), {})()
        handle.remote = lambda *args, **kwargs: Response(call(args, kwargs))
        return handle


class Ends:
    """The text encoder and the VAE: fixed embeddings in, the final latents out."""

    def __init__(self, text_dim):
        draw = np.random.default_rng(1)
        self.arrays = {
            name: draw.standard_normal((5, text_dim)).astype(np.float32)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        self.final = None

    async def encode(self, job, prompt, negative_prompt):
        return StageResult(report=REPORT, arrays=self.arrays)

    async def decode(self, job, final, checkpoint):
        self.final = final.arrays["latents"]
        return StageResult(report=REPORT, artifacts={"video": "none"})

    async def preview(self, job, boundary, checkpoint):
        return StageResult(report=REPORT, artifacts={"preview": "none"})


async def scenario(cluster, folder, service, text_dim, params):
    stores = StageStores(job_store_url=service.job_store_url, artifacts_url=service.artifacts_url)
    ends = Ends(text_dim)
    handles = {}
    for groups in service.stages:
        if not hasattr(groups, "expert"):

            async def ends_stage(start_group):
                return ends

            handles[groups.name] = Handle(ends_stage)
            continue
        spec = group_spec(Expert, groups, "wan_model.engine")
        # The GPUs are not real: they are placed and given out, and the ranks compute on CPUs.
        kwargs = spec.engine_kwargs | {"device": "cpu", "dtype": "float32"}
        spec = dataclasses.replace(spec, engine_kwargs=kwargs, collective_backend="gloo")

        async def expert_stage(start_group, name=groups.name, spec=spec):
            stage = Expert.__new__(Expert)
            await stage.__init__(name, spec, stores, start_group)
            return stage

        handles[groups.name] = Handle(expert_stage)
    for handle in handles.values():
        await handle.start()
    pipeline = Pipeline.__new__(Pipeline)
    await pipeline.__init__(service, handles)
    for line in pipeline.lines.values():
        line.resize(1)
        line.resize = lambda num_places: None

    job = await pipeline.store.submit(
        NewJob(
            model="m", prompt="p", params=dataclasses.asdict(params),
            num_steps=params.num_steps, predicted_s=1.0,
        )
    )  # fmt: skip
    high = handles["HighNoiseExpert"]
    while (job := await pipeline.store.get(job.id)).step < KILL_AT_STEP:
        assert job.status != "failed", job.error_message
        await asyncio.sleep(0.01)
    [victim] = {info.node_id for info in (await high.stage).group.workers}
    num_ranks = len((await high.stage).group.workers)
    [node] = [node for node in cluster.worker_nodes if node.node_id == victim]
    kill_node(node)
    killed = time.monotonic()
    seen = {"stage_at_death": job.stage, "step_at_death": job.step, "num_ranks": num_ranks}
    while not high.deaths:
        await asyncio.sleep(0.005)
    seen["detected_s"] = high.deaths[0][0] - killed
    seen["death"] = high.deaths[0][1]
    cluster.remove_node(node, allow_graceful=False)
    while (job := await pipeline.store.get(job.id)).status not in ("completed", "failed"):
        await asyncio.sleep(0.05)
    seen |= {"status": job.status, "attempt": job.attempt, "error": job.error_message}
    [now_on] = {info.node_id for info in (await high.stage).group.workers}
    seen["moved"] = now_on != victim
    np.save(Path(folder) / "latents.npy", ends.final)
    await pipeline.__del__()
    for name in ("HighNoiseExpert", "LowNoiseExpert"):
        await (await handles[name].stage).__del__()
    return seen


def main():
    """Arguments: a folder, and JSON of the checkpoint, its width of text and the params."""
    folder, given = sys.argv[1], json.loads(sys.argv[2])
    pipeline_module._num_running_replicas = lambda: {"Pipeline": 1}
    expert = {"num_cpus": 0.5}
    service = ServiceConfig.model_validate(
        {
            "models": {
                "m": {
                    "checkpoint": given["checkpoint"],
                    "high_noise_expert": expert | {"ulysses_degree": 2},
                    "low_noise_expert": expert,
                }
            },
            "data_dir": folder,
            "jobs": {"lease_s": 5},
        }
    ).resolve({"m": WAN_TINY}, environ={})
    params = VideoParams(**given["params"])
    node = {"num_cpus": 2, "num_gpus": 3, "object_store_memory": STORE_BYTES}
    head = {
        "num_cpus": 1, "num_gpus": 0, "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        with one_start_at_a_time():
            for _ in range(2):
                cluster.add_node(**node)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
        job = scenario(cluster, folder, service, given["text_dim"], params)
        seen = asyncio.run(asyncio.wait_for(job, timeout=200))
        (Path(folder) / "seen.json").write_text(json.dumps(seen))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
