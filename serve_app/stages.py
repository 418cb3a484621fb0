"""The stages: the deployments whose replicas each lead one GPU group.

Owns what a stage does with a job between receiving arrays and returning them: caching embeddings,
turns between jobs, progress, checkpoints. The computing is the engine's, named by import string
and loaded inside the group's workers. Knows nothing about HTTP, retries or the order of stages.

A stage's answer is a StageResult. The pipeline passes it on without looking at its arrays, so they
travel from replica to replica through the object store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.deadline import StepDeadlines
from cluster.group import Group, exit_on_death
from cluster.ray_group import RayGroup
from cluster.spec import GroupSpec
from serve_app.artifacts import Arrays, Artifacts
from serve_app.jobs import JobStore, Renewal, StoreUnavailable
from serve_app.line import Line, Place
from serve_app.logs import log_as_serve_does

logger = logging.getLogger(__name__)

CACHED_PROMPTS = 256


@dataclass(frozen=True, kw_only=True)
class JobTicket:
    """What a stage must know of a job. `params` is a VideoParams as a dict.

    `rank`: where several jobs could go on, the lowest does: (-priority, time of creation).
    `first_step`: where the job began; a branch's own work starts at the boundary.
    """

    id: str
    attempt: int
    rank: tuple[int, float]
    params: dict[str, Any]
    first_step: int = 0


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """When a stage worked for a job (unix seconds), and on which steps [from_step, to_step).

    `busy_s` is the work alone: between two steps of a job another one may have had the group.
    `num_reused` of the steps cost next to nothing (the job's `cache`).
    """

    stage: str
    replica: str
    started_at: float
    ended_at: float
    busy_s: float
    from_step: int = 0
    to_step: int = 0
    num_reused: int = 0


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage hands over: arrays for the next stage, small values for the pipeline."""

    report: StageReport
    arrays: Arrays = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageStores:
    """Where a stage's replica finds the job table and the artifacts."""

    job_store_url: str
    artifacts_url: str


class JobCancelled(Exception):
    """The job's client asked for its end."""


class LeaseLost(Exception):
    """Another attempt owns the job: this one must stop and write nothing."""


StartGroup = Callable[..., Awaitable[Group]]


class Stage:
    """One replica: starts its group, warms it up, and only then is ready.

    The replica asks for no GPU itself and never touches CUDA. When the group dies, callers get
    GroupDead and the process exits, so that Serve replaces it.
    """

    async def __init__(
        self,
        name: str,
        spec: GroupSpec,
        stores: StageStores,
        start_group: StartGroup = RayGroup.start,
    ) -> None:
        log_as_serve_does()
        self.name = name
        self.artifacts = Artifacts(stores.artifacts_url)
        self.store = await JobStore.open(stores.job_store_url)
        self.group = await start_group(spec, on_death=exit_on_death())
        self.replica = _replica_id()
        self.turns = Line()
        await self.group.call("warm_up", timeout_s=spec.start_timeout_s)
        self.open = True

    async def check_health(self) -> None:
        await self.group.check()

    def __del__(self) -> Awaitable[None] | None:
        """Serve calls and awaits this once, Python calls it again at the end: that does nothing."""
        if getattr(self, "open", False):
            self.open = False
            return self._close()
        return None

    async def _close(self) -> None:
        await self.group.aclose()
        await self.store.close()

    def report(self, started_at: float, **steps: Any) -> StageReport:
        now = time.time()
        return StageReport(
            stage=self.name,
            replica=self.replica,
            started_at=started_at,
            ended_at=now,
            **({"busy_s": now - started_at} | steps),
        )


class TextEncoder(Stage):
    """Prompts -> embeddings. Remembers the last ones: a default negative prompt costs once."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cache: OrderedDict[str, Any] = OrderedDict()
        await super().__init__(*args, **kwargs)

    async def encode(self, job: JobTicket, prompt: str, negative_prompt: str) -> StageResult:
        prompts = (prompt, negative_prompt)
        async with self.turns.place(job.rank):
            started_at = time.time()
            missing = [text for text in dict.fromkeys(prompts) if text not in self.cache]
            found = {text: self.cache[text] for text in prompts if text in self.cache}
            if missing:
                found |= zip(missing, await self.group.call("encode", missing), strict=True)
            report = self.report(started_at)
        for text, embeds in found.items():
            self.cache[text] = embeds
            self.cache.move_to_end(text)
        while len(self.cache) > CACHED_PROMPTS:
            self.cache.popitem(last=False)
        return StageResult(
            report=report,
            arrays={
                "prompt_embeds": found[prompt],
                "negative_prompt_embeds": found[negative_prompt],
            },
        )


class Expert(Stage):
    """Denoising segments. The job of the lowest rank has the group; the next one steps only while
    the first is away, handing over its state. A step that takes several times as long as its like
    did here is stuck, and ends the group long before step_timeout_s."""

    async def __init__(self, name: str, spec: GroupSpec, *args: Any, **kwargs: Any) -> None:
        self.deadlines = StepDeadlines(spec.step_timeout_s)
        await super().__init__(name, spec, *args, **kwargs)

    async def run(
        self,
        job: JobTicket,
        text: StageResult,
        image: StageResult | None,
        earlier: StageResult | None,
        *,
        checkpoint: str | None,
        from_step: int,
        to_step: int,
        store_as: str,
    ) -> StageResult:
        """Steps [from_step, to_step) of a job; its new state, also stored under `store_as`.

        The state comes from the segment before (`earlier`), else from the stored `checkpoint`,
        else from the seed. Raises JobCancelled or LeaseLost between two steps.
        """
        state = earlier.arrays if earlier is not None else None
        if state is None and checkpoint is not None:
            state = await self.artifacts.get_arrays(checkpoint)
        conditioning = text.arrays | (image.arrays if image is not None else {})
        key = f"{job.id}/{job.attempt}/{from_step}"
        try:
            await self.group.call(
                "open", key, params=job.params, conditioning=conditioning, state=state
            )
            async with self.turns.place(job.rank) as place:
                report = await self._steps(job, key, place, from_step, to_step)
            arrays = await self.group.call("export", key, ranks="first")
        finally:
            if self.group.dead is None:
                await asyncio.shield(self.group.call("close", key))
        await self.artifacts.put_arrays(store_as, arrays)
        return StageResult(report=report, arrays=arrays, artifacts={"checkpoint": store_as})

    async def _steps(
        self, job: JobTicket, key: str, place: Place, from_step: int, to_step: int
    ) -> StageReport:
        """Progress is written while the next step runs; a job with a lower rank goes first."""
        started_at, busy_s, num_reused = time.time(), 0.0, 0
        recorded: asyncio.Task | None = None
        kind = _kind_of_step(job)
        try:
            for _ in range(from_step, to_step):
                await place.give_way()
                began = time.time()
                stepped = await self.group.call("step", key, timeout_s=self.deadlines.of(kind))
                if stepped["reused"]:  # says nothing about how long a step takes
                    num_reused += 1
                else:
                    self.deadlines.record(kind, stepped["seconds"])
                busy_s += time.time() - began
                if recorded is not None:
                    await recorded
                recorded = asyncio.create_task(self._record(job, stepped["step_index"]))
            await recorded
        finally:
            if recorded is not None:
                await asyncio.gather(recorded, return_exceptions=True)
        steps = {"from_step": from_step, "to_step": to_step, "num_reused": num_reused}
        return self.report(started_at, busy_s=busy_s, **steps)

    async def _record(self, job: JobTicket, step: int) -> None:
        """Moves the job's progress and learns whether to stop."""
        progress = progress_at(step - job.first_step, job.params["num_steps"] - job.first_step)
        try:
            renewal: Renewal = await self.store.record_progress(
                job.id,
                job.attempt,
                stage=self.name,
                step=step,
                progress=progress,
            )
        except StoreUnavailable as error:
            # Progress may lag; the pipeline's fenced writes decide whether the work counts.
            logger.warning("progress of %s is not recorded: %s", job.id, error)
            return
        if not renewal.held:
            raise LeaseLost(job.id)
        if renewal.cancel_requested:
            raise JobCancelled(job.id)


class VAE(Stage):
    """Images -> conditioning; states -> videos and their pictures in the artifact store."""

    async def encode_image(
        self, job: JobTicket, task: str, image: str, last_image: str | None
    ) -> StageResult:
        """`image`, `last_image`: artifact keys. Raises ValueError when they hold no image."""
        data = await self.artifacts.get(image)
        last_data = await self.artifacts.get(last_image) if last_image else None
        async with self.turns.place(job.rank):
            started_at = time.time()
            arrays = await self.group.call(
                "encode_image", task=task, params=job.params, image=data, last_image=last_data
            )
            report = self.report(started_at)
        return StageResult(report=report, arrays=arrays)

    async def decode(
        self, job: JobTicket, final: StageResult | None, checkpoint: str
    ) -> StageResult:
        state = final.arrays if final is not None else await self.artifacts.get_arrays(checkpoint)
        async with self.turns.place(job.rank):
            started_at = time.time()
            made = await self.group.call(
                "decode", params=job.params, state={"latents": state["latents"]}
            )
            report = self.report(started_at)
        keys = {}
        for name, (artifact, suffix) in _DECODED.items():
            if name in made:
                keys[artifact] = await self._put(job, artifact, suffix, made[name])
        return StageResult(report=report, artifacts=keys | {"num_frames": made["num_frames"]})

    async def preview(
        self, job: JobTicket, boundary: StageResult | None, checkpoint: str
    ) -> StageResult:
        """What the state at the boundary promises, small; the low-noise expert runs meanwhile."""
        arrays = boundary.arrays if boundary is not None else None
        if arrays is None:
            arrays = await self.artifacts.get_arrays(checkpoint)
        predicted = {"x0_history.0": arrays["x0_history.0"]}
        async with self.turns.place(job.rank):
            started_at = time.time()
            webp = await self.group.call("preview", params=job.params, state=predicted)
            report = self.report(started_at)
        key = await self._put(job, "preview", "webp", webp)
        return StageResult(report=report, artifacts={"preview": key})

    async def _put(self, job: JobTicket, artifact: str, suffix: str, data: bytes) -> str:
        # Under the attempt's name: a fenced-off attempt must not replace the winner's file.
        key = f"{job.id}/{artifact}-{job.attempt}.{suffix}"
        await self.artifacts.put(key, data)
        return key


_DECODED = {
    "mp4": ("video", "mp4"),
    "thumbnail": ("thumbnail", "webp"),
    "spritesheet": ("spritesheet", "webp"),
    "png": ("image", "png"),
}
"""What the engine's `decode` gives: the artifact's name and its file's suffix."""


def checkpoints_of(job_id: str) -> str:
    """The prefix of a job's checkpoints among its artifacts; they end with the job."""
    return f"{job_id}/checkpoints"


def checkpoint_key(job: JobTicket, step: int) -> str:
    return f"{checkpoints_of(job.id)}/{job.attempt}-{step}.safetensors"


def boundary_key(job: JobTicket) -> str:
    """Of the checkpoint at the boundary when it is kept as long as the job's video."""
    return f"{job.id}/boundary-{job.attempt}.safetensors"


def progress_at(step: int, num_steps: int) -> int:
    """0..100: encoding ends at 2, denoising at 95, decoding at 100."""
    return 2 + 93 * step // num_steps


def _kind_of_step(job: JobTicket) -> tuple:
    """Jobs whose steps are equally much work."""
    size = (job.params[name] for name in ("width", "height", "num_frames"))
    guidance = (job.params[name] for name in ("guidance_high_noise", "guidance_low_noise"))
    return (*size, *(scale != 1.0 for scale in guidance))


def _replica_id() -> str:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:  # outside Serve: tests that make a stage by hand
        return "local"
