"""The pipeline: claims jobs and takes each through its stages, one segment after another.

Owns the order of stages, the length of segments, retries, cancellation and leases. Holds no
tensors: it passes a stage's unresolved answer on to the next one. Knows nothing about HTTP or how
a stage computes. A job is always an attempt from its last checkpoint; the first one has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import GroupDead
from serve_app.artifacts import ArtifactCorrupt, ArtifactError, ArtifactMissing, Artifacts
from serve_app.jobs import Job, JobStore, StoreUnavailable
from serve_app.line import Line
from serve_app.served_model import ServedModel
from serve_app.stages import (
    JobCancelled,
    JobTicket,
    LeaseLost,
    StageReport,
    StageResult,
    checkpoints_of,
)
from serve_app.topology import ExpertGroups, JobSettings, ResolvedService
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule

logger = logging.getLogger(__name__)

CLAIM_POLL_S = 0.1
RENEW_AT_MOST_S = 1.0
EXPIRE_POLL_S = 60.0
READY_POLL_S = 1.0
RETRY_DELAY_S = 0.5
RETRY_DELAY_GROWTH = 4  # per failure: five attempts outlast 40 s without storage

INTERNAL_MESSAGE = "the video could not be made because of an error in the service"


@dataclass(frozen=True, kw_only=True)
class ModelStages:
    """The deployments (handles) that one model's jobs go through; experts by name."""

    served: ServedModel
    text_encoder: Any
    vae: Any
    experts: Mapping[str, Any]
    lines: Mapping[str, Line]
    segment_s: Mapping[str, float]


class Pipeline:
    """One replica: up to `max_active` jobs in flight, each with its own asyncio task.

    `handles` maps deployment names (topology.py) to Serve handles.
    """

    async def __init__(self, service: ResolvedService, handles: Mapping[str, Any]) -> None:
        self.handles = dict(handles)
        experts = {g.name: g for g in service.stages if isinstance(g, ExpertGroups)}
        self.max_active_jobs = {name: groups.max_active_jobs for name, groups in experts.items()}
        self.lines = {name: Line(count) for name, count in self.max_active_jobs.items()}
        self.models = {
            name: ModelStages(
                served=model.served,
                text_encoder=handles[model.text_encoder],
                vae=handles[model.vae],
                experts={e.value: handles[g.name] for e, g in model.experts.items()},
                lines={e.value: self.lines[g.name] for e, g in model.experts.items()},
                segment_s={e.value: g.segment_s for e, g in model.experts.items()},
            )
            for name, model in service.models.items()
        }
        self.settings: JobSettings = service.jobs
        self.max_active = service.pipeline.max_active
        self.artifacts = Artifacts(service.artifacts_url)
        self.store = await JobStore.open(
            service.job_store_url, retention_s=service.jobs.retention_s
        )
        self.worker = f"pipeline-{uuid.uuid4().hex[:12]}"
        self.step_s: dict[tuple[str, str, int], float] = {}
        self.attempts: dict[Attempt, asyncio.Task] = {}
        self.ready = dict.fromkeys(handles, False)
        loops = (self._claim_loop, self._renew_loop, self._expire_loop, self._ready_loop)
        self.loops = [asyncio.create_task(_forever(loop)) for loop in loops]
        self.open = True

    async def readiness(self) -> dict[str, bool]:
        """For every stage, whether it has a running replica: its group has really run once."""
        return self.ready

    def check_health(self) -> None:
        ended = [loop for loop in self.loops if loop.done()]
        if ended:
            raise RuntimeError(f"a loop of the pipeline ended: {ended}")

    def __del__(self) -> Awaitable[None] | None:
        """Serve calls and awaits this once, Python calls it again at the end: that does nothing."""
        if getattr(self, "open", False):
            self.open = False
            return self._close()
        return None

    async def _close(self) -> None:
        """Gives the unfinished jobs back, so that another replica need not wait for the leases."""
        for loop in self.loops:
            loop.cancel()
        await asyncio.wait(self.loops)  # a claim that was under way gives its job back
        for attempt, task in list(self.attempts.items()):
            task.cancel()
            with contextlib.suppress(StoreUnavailable):
                await self.store.release(attempt.job.id, attempt.job.attempt)
        await self.store.close()

    async def _claim_loop(self) -> None:
        job = None
        if len(self.attempts) < self.max_active:
            job = await self.store.claim(
                self.worker,
                lease_s=self.settings.lease_s,
                max_attempts=self.settings.max_attempts,
                models=self.models,
            )
        if job is None:
            await asyncio.sleep(CLAIM_POLL_S)
            return
        try:
            attempt = Attempt(self, job)
        except (TypeError, ValueError) as error:  # a row of another version: it fails alone
            logger.warning("%s is not understood: %s", job.id, error)
            await self.store.fail(
                job.id, job.attempt, code="internal_error", message=INTERNAL_MESSAGE
            )
            return
        task = asyncio.create_task(attempt.run())
        self.attempts[attempt] = task
        task.add_done_callback(lambda _: self.attempts.pop(attempt))

    async def _renew_loop(self) -> None:
        """Keeps the leases, and stops attempts that lost theirs or whose job is cancelled."""
        await asyncio.sleep(min(RENEW_AT_MOST_S, self.settings.lease_s / 3))
        attempts = list(self.attempts)
        # After a lost lease there may be two of one job here: the later one has the lease.
        numbers = {attempt.job.id: attempt.job.attempt for attempt in attempts}
        renewals = await self.store.renew_many(numbers, lease_s=self.settings.lease_s)
        for attempt in attempts:
            renewal = renewals[attempt.job.id]
            held = renewal.held and numbers[attempt.job.id] == attempt.job.attempt
            if (held and not renewal.cancel_requested) or attempt.stop is not None:
                continue
            if (task := self.attempts.get(attempt)) is not None:
                attempt.stop = JobCancelled if held else LeaseLost
                task.cancel()

    async def _expire_loop(self) -> None:
        for job in await self.store.expire(time.time()):
            await _cleaned_up(self.artifacts.delete_prefix(job.id))
        await asyncio.sleep(EXPIRE_POLL_S)

    async def _ready_loop(self) -> None:
        # Asks Serve, not the stages: a question to a busy stage would wait behind its jobs.
        try:
            running = await asyncio.to_thread(_num_running_replicas)
        except (RayError, RayServeException) as error:
            logger.warning("the stages' readiness is not known: %s", error)
        else:
            self.ready = {name: running.get(name, 0) > 0 for name in self.handles}
            num_pipelines = max(1, running.get("Pipeline", 1))
            for name, line in self.lines.items():
                places = running.get(name, 0) * self.max_active_jobs[name]
                line.resize(places // num_pipelines)
        await asyncio.sleep(READY_POLL_S)


class Attempt:
    """One claim of one job, from its last checkpoint to its video."""

    def __init__(self, pipeline: Pipeline, job: Job) -> None:
        self.pipeline = pipeline
        self.store = pipeline.store
        self.job = job
        self.stages = pipeline.models[job.model]
        self.params = VideoParams(**job.params)
        self.ticket = JobTicket(
            id=job.id,
            attempt=job.attempt,
            rank=(-job.priority, job.created_at),
            params=job.params,
        )
        self.stop: type[Exception] | None = None
        self.reports: list[StageReport] = []

    async def run(self) -> None:
        """Ends the attempt in the job table, whatever happens in it; raises nothing."""
        try:
            await self._finish(await self._make())
        except asyncio.CancelledError:
            if self.stop is JobCancelled:
                await self._cancelled()
        except LeaseLost:
            logger.info("%s: attempt %d lost its lease", self.job.id, self.job.attempt)
        except JobCancelled:
            await self._cancelled()
        except StoreUnavailable as error:
            logger.warning("%s: attempt given up, no job store: %s", self.job.id, error)
        except Exception as error:
            await self._failed(error)

    async def _make(self) -> dict[str, Any]:
        """The stages in order. Returns the artifacts of the finished job."""
        job, stages = self.job, self.stages
        config = stages.served.config
        await self._progress("TextEncoder", 0)
        negative_prompt = job.negative_prompt or config.negative_prompt
        text, _ = await self._call(
            stages.text_encoder.encode, self.ticket, job.prompt, negative_prompt
        )
        image = None
        if job.input_image is not None:
            image, _ = await self._call(
                stages.vae.encode_image, self.ticket, config.task, job.input_image, job.last_image
            )
        final, checkpoint = await self._denoise(text, image)
        await self._progress("VAE", 96)
        _, decoded = await self._call(stages.vae.decode, self.ticket, final, checkpoint)
        return decoded.artifacts | {"timings": [asdict(report) for report in self.reports]}

    async def _denoise(self, text: Any, image: Any) -> tuple[Any, str | None]:
        """All remaining segments. Returns the last one's unresolved answer and its checkpoint."""
        schedule = build_schedule(self.params)
        step, checkpoint, earlier = self.job.checkpoint_step, self.job.checkpoint, None
        while step < schedule.num_steps:
            expert = schedule.expert_at(step).value
            end = schedule.boundary_step if step < schedule.boundary_step else schedule.num_steps
            to_step = min(end, step + self._segment_length(expert))
            async with self.stages.lines[expert].place(self.ticket.rank):
                earlier, result = await self._call(
                    self.stages.experts[expert].run,
                    self.ticket,
                    text,
                    image,
                    earlier,
                    checkpoint=checkpoint,
                    from_step=step,
                    to_step=to_step,
                )
            self._learn_step_s(expert, result.report)
            step, superseded, checkpoint = to_step, checkpoint, result.artifacts["checkpoint"]
            if not await self.store.record_checkpoint(
                self.job.id, self.job.attempt, key=checkpoint, step=step
            ):
                raise LeaseLost(self.job.id)
            if superseded is not None:
                await _cleaned_up(self.pipeline.artifacts.delete(superseded))
        return earlier, checkpoint

    async def _call(self, method: Any, *args: Any, **kwargs: Any) -> tuple[Any, StageResult]:
        """A stage call: (the answer to pass on, the answer itself). Cancelled with this task."""
        response = method.remote(*args, **kwargs)
        try:
            result: StageResult = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        self.reports.append(result.report)
        return response, result

    def _segment_length(self, expert: str) -> int:
        """Steps that fill `segment_s`; one while the step time is not known yet."""
        step_s = self.pipeline.step_s.get(self._step_key(expert))
        return max(1, round(self.stages.segment_s[expert] / step_s)) if step_s else 1

    def _learn_step_s(self, expert: str, report: StageReport) -> None:
        self.pipeline.step_s[self._step_key(expert)] = max(
            1e-3, report.busy_s / (report.to_step - report.from_step)
        )

    def _step_key(self, expert: str) -> tuple[str, str, int]:
        return self.job.model, expert, self.params.num_tokens(self.stages.served.config)

    async def _progress(self, stage: str, progress: int) -> None:
        step = 0 if progress == 0 else self.params.num_steps
        renewal = await self.store.record_progress(
            self.job.id, self.job.attempt, stage=stage, step=step, progress=progress
        )
        if not renewal.held:
            raise LeaseLost(self.job.id)
        if renewal.cancel_requested:
            raise JobCancelled(self.job.id)

    async def _finish(self, artifacts: dict[str, Any]) -> None:
        if await self.store.complete(self.job.id, self.job.attempt, artifacts=artifacts):
            logger.info("%s: completed in attempt %d", self.job.id, self.job.attempt)
            await _cleaned_up(self.pipeline.artifacts.delete_prefix(checkpoints_of(self.job.id)))

    async def _cancelled(self) -> None:
        with contextlib.suppress(StoreUnavailable):  # the next claim ends it
            if await self.store.cancelled(self.job.id, self.job.attempt):
                await _cleaned_up(self.pipeline.artifacts.delete_prefix(self.job.id))

    async def _failed(self, error: Exception) -> None:
        job_id, number = self.job.id, self.job.attempt
        logger.warning("%s: attempt %d: %s", job_id, number, error, exc_info=error)
        with contextlib.suppress(StoreUnavailable):
            if is_blameless(error):
                await self.store.release(job_id, number)
            elif is_retryable(error) or await self._starts_over(error):
                await self.store.retry(
                    job_id,
                    number,
                    reason=_reason(error),
                    max_attempts=self.pipeline.settings.max_attempts,
                    delay_s=RETRY_DELAY_S * RETRY_DELAY_GROWTH**self.job.failures,
                )
            elif isinstance(error, ValueError):
                message = str(getattr(error, "cause", error))
                await self.store.fail(job_id, number, code="invalid_request", message=message)
            else:
                await self.store.fail(
                    job_id, number, code="internal_error", message=INTERNAL_MESSAGE
                )

    async def _starts_over(self, error: Exception) -> bool:
        """Forgets a checkpoint that cannot be read: the next attempt begins from the seed."""
        if self.job.checkpoint is None or not isinstance(error, ArtifactMissing | ArtifactCorrupt):
            return False
        await self.store.record_checkpoint(self.job.id, self.job.attempt, key=None, step=0)
        return True


async def _cleaned_up(deletion: Awaitable[None]) -> None:
    """What cannot be deleted now stays: no job's end waits for it."""
    try:
        await deletion
    except ArtifactError as error:
        logger.warning("not deleted: %s", error)


def _num_running_replicas() -> dict[str, int]:
    """By deployment. A replica runs once its constructor is done, its group's warm-up included."""
    app_name = serve.get_replica_context().app_name
    app = serve.status().applications.get(app_name)
    return {
        name: deployment.replica_states.get("RUNNING", 0)
        for name, deployment in (app.deployments.items() if app else ())
    }


def is_blameless(error: BaseException) -> bool:
    """The group died while this job only waited for its turn in it."""
    cause = getattr(error, "cause", error)
    return isinstance(cause, GroupDead) and not cause.was_sent


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may go better: the error says so itself, or a process was lost."""
    if isinstance(error, RayActorError | RayServeException):
        return True
    if hasattr(error, "retryable"):
        return bool(error.retryable)
    cause = getattr(error, "cause", None)
    if cause is not None and cause is not error:
        return is_retryable(cause)
    return isinstance(error, RayError) and cause is None


def _reason(error: BaseException) -> str:
    if isinstance(error, ArtifactError):
        return "the artifact store failed"
    return "a process that worked on it was lost"


async def _forever(loop: Any) -> None:
    """Runs `loop` again and again; a job store that does not answer is waited for."""
    while True:
        try:
            await loop()
        except StoreUnavailable as error:
            logger.warning("%s waits: %s", loop.__name__, error)
            await asyncio.sleep(1.0)
