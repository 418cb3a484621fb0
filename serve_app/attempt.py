"""One attempt: a claimed job on its way through the stages, one segment after another.

Owns the order of stages, the length of segments, what is stored in between, and how the attempt
ends in the job table. Holds no tensors: it passes a stage's unresolved answer on to the next one.
Knows nothing about HTTP or how a stage computes. A job is always an attempt from its last
checkpoint; the first one has none, but a branch has its source's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from serve_app.artifacts import ArtifactCorrupt, ArtifactError, ArtifactMissing
from serve_app.job_schema import FINISHED
from serve_app.jobs import Job, Renewal, StoreUnavailable
from serve_app.line import Line
from serve_app.preview import Preview
from serve_app.prompt_extension import prompt_to_encode
from serve_app.retry_policy import (
    BRANCH_LOST_MESSAGE,
    INTERNAL_MESSAGE,
    STORAGE_DELAY_S,
    is_blameless,
    is_retryable,
    is_storage_down,
    reason_of,
    retry_delay_s,
)
from serve_app.served_model import ServedModel
from serve_app.stages import (
    JobCancelled,
    JobTicket,
    LeaseLost,
    StageReport,
    StageResult,
    boundary_key,
    checkpoint_key,
    checkpoints_of,
)
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule

if TYPE_CHECKING:
    from serve_app.pipeline import Pipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelStages:
    """The deployments (handles) that one model's jobs go through; experts by name."""

    served: ServedModel
    text_encoder: Any
    vae: Any
    experts: Mapping[str, Any]
    lines: Mapping[str, Line]
    segment_s: Mapping[str, float]


class Attempt:
    """One claim of one job, from its last checkpoint to its video."""

    def __init__(self, pipeline: Pipeline, job: Job) -> None:
        self.pipeline = pipeline
        self.store = pipeline.store
        self.job = job
        self.stages = pipeline.models[job.model]
        self.params = VideoParams(**job.params)
        self.schedule = build_schedule(self.params)
        self.ticket = JobTicket(
            id=job.id,
            attempt=job.attempt,
            rank=(-job.priority, job.created_at),
            params=job.params,
            first_step=self.schedule.boundary_step if job.branch_from is not None else 0,
        )
        self.boundary_state = job.boundary_state
        self.preview = Preview(job, pipeline.store)
        self.stop: type[Exception] | None = None
        self.reports: list[StageReport] = []

    async def run(self) -> None:
        """Ends the attempt in the job table, whatever happens in it; raises nothing.

        A job that ended loses its checkpoints; a cancelled one all else as it expires, at once.
        """
        try:
            written = await self._work()
        except StoreUnavailable as error:  # the next claim ends it
            logger.warning("%s: attempt given up, no job store: %s", self.job.id, error)
            return
        if written.status in FINISHED:
            logger.info("%s: %s in attempt %d", self.job.id, written.status, self.job.attempt)
            await cleaned_up(self.pipeline.artifacts.delete_prefix(checkpoints_of(self.job.id)))

    async def _work(self) -> Renewal:
        """The whole attempt. Returns the write that ended it."""
        job_id, number = self.job.id, self.job.attempt
        try:
            try:
                artifacts = await self._make()
            finally:
                self.preview.cancel()
            return await self.store.complete(job_id, number, artifacts=artifacts)
        except asyncio.CancelledError:
            if self.stop is JobCancelled:
                return await self.store.cancelled(job_id, number)
        except LeaseLost:
            logger.info("%s: attempt %d lost its lease", job_id, number)
        except JobCancelled:
            return await self.store.cancelled(job_id, number)
        except StoreUnavailable:
            raise
        except Exception as error:
            return await self._failed(error)
        return Renewal(held=False)

    async def _make(self) -> dict[str, Any]:
        """The stages in order. Returns the artifacts of the finished job."""
        job, stages = self.job, self.stages
        config = stages.served.config
        prompt = await prompt_to_encode(
            job,
            self.ticket,
            extender=self.pipeline.extender,
            store=self.store,
            call=self._call,
            progress=self._progress,
        )
        await self._progress("TextEncoder", 0)
        negative_prompt = job.negative_prompt or config.negative_prompt
        text, _ = await self._call(stages.text_encoder.encode, self.ticket, prompt, negative_prompt)
        image = None
        if job.input_image is not None:
            image, _ = await self._call(
                stages.vae.encode_image, self.ticket, config.task, job.input_image, job.last_image
            )
        final, checkpoint = await self._denoise(text, image)
        await self._progress("VAE", 96)
        _, decoded = await self._call(stages.vae.decode, self.ticket, final, checkpoint)
        artifacts = await self.preview.artifacts() | decoded.artifacts
        return artifacts | {"timings": [asdict(report) for report in self.reports]}

    async def _denoise(self, text: Any, image: Any) -> tuple[Any, str | None]:
        """All remaining segments. Returns the last one's unresolved answer and its checkpoint."""
        schedule = self.schedule
        step, checkpoint, earlier = self.job.checkpoint_step, self.job.checkpoint, None
        if self.boundary_state is not None:  # an earlier attempt came so far
            self._start_preview(None, self.boundary_state)
        while step < schedule.num_steps:
            expert = schedule.expert_at(step).value
            to_step = min(schedule.end_of(step), step + self._segment_length(expert))
            at_boundary = schedule.has_boundary and to_step == schedule.boundary_step
            kept = at_boundary and self.pipeline.settings.keep_boundary_states
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
                    store_as=(
                        boundary_key(self.ticket) if kept else checkpoint_key(self.ticket, to_step)
                    ),
                )
            self._learn_step_s(expert, result.report)
            step, superseded, checkpoint = to_step, checkpoint, result.artifacts["checkpoint"]
            if not await self.store.record_checkpoint(
                self.job.id, self.job.attempt, key=checkpoint, step=step, is_boundary=kept
            ):
                raise LeaseLost(self.job.id)
            if at_boundary:
                self._start_preview(earlier, checkpoint)
            if kept:
                self.boundary_state = checkpoint
            if superseded not in (None, self.boundary_state):
                await cleaned_up(self.pipeline.artifacts.delete(superseded))
        return earlier, checkpoint

    def _start_preview(self, boundary: Any, checkpoint: str) -> None:
        async def make() -> StageResult:
            _, result = await self._call(self.stages.vae.preview, self.ticket, boundary, checkpoint)
            return result

        self.preview.start(make)

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
        num_computed = report.to_step - report.from_step - report.num_reused
        if num_computed:
            self.pipeline.step_s[self._step_key(expert)] = max(1e-3, report.busy_s / num_computed)

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

    async def _failed(self, error: Exception) -> Renewal:
        job_id, number = self.job.id, self.job.attempt
        logger.warning("%s: attempt %d: %s", job_id, number, error, exc_info=error)
        if is_storage_down(error):
            self.pipeline.pause_claims()
            return await self.store.release(job_id, number, delay_s=STORAGE_DELAY_S)
        if is_blameless(error):
            return await self.store.release(job_id, number)
        if is_retryable(error) or await self._starts_over(error):
            return await self.store.retry(
                job_id,
                number,
                reason=reason_of(error),
                max_attempts=self.pipeline.settings.max_attempts,
                max_failures=self.pipeline.settings.max_failures,
                delay_s=retry_delay_s(self.job.failures),
            )
        code, message = self._verdict(error)
        return await self.store.fail(job_id, number, code=code, message=message)

    def _verdict(self, error: Exception) -> tuple[str, str]:
        """(code, message) of a failure that no other attempt would help."""
        if isinstance(error, ArtifactMissing | ArtifactCorrupt) and self.job.branch_from:
            return "boundary_state_gone", BRANCH_LOST_MESSAGE
        if isinstance(error, ValueError):
            return "invalid_request", str(getattr(error, "cause", error))
        return "internal_error", INTERNAL_MESSAGE

    async def _starts_over(self, error: Exception) -> bool:
        """Forgets a checkpoint that cannot be read: the next attempt begins from the state at the
        boundary, or else from the seed. A branch has no seed to begin from."""
        job = self.job
        if job.checkpoint is None or not isinstance(error, ArtifactMissing | ArtifactCorrupt):
            return False
        key, step = job.boundary_state, self.schedule.boundary_step
        if key is None or key == job.checkpoint:
            if job.branch_from is not None:
                return False
            key, step = None, 0
        await self.store.record_checkpoint(job.id, job.attempt, key=key, step=step)
        return True


async def cleaned_up(deletion: Awaitable[None]) -> bool:
    """Whether it is deleted. What cannot be now stays: no job's end waits for it."""
    try:
        await deletion
    except ArtifactError as error:
        logger.warning("not deleted: %s", error)
        return False
    return True
