"""Videos: what the API does with a client's videos, over the job store and the artifact store.

Owns admission (numbers, prediction, submit, copies of a source), what a client may see, and what a
watcher is told. Knows nothing about HTTP, Ray or stages. Raises the errors of errors.py, and lets
those of the two stores through.

A cancelled video is unknown from then on, though its row lives until its worker has stopped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal

from serve_app import create_video, derived_jobs, openai_api
from serve_app.artifacts import ArtifactMissing, Artifacts
from serve_app.create_video import CreateVideo
from serve_app.derived_jobs import RemixVideo
from serve_app.errors import Conflict, InvalidRequest, NotFound
from serve_app.jobs import (
    IdempotencyConflict,
    Job,
    JobNotFound,
    JobStore,
    NewJob,
    QueueFull,
    StoreUnavailable,
    new_job_id,
)
from serve_app.openai_api import Variant, Video, VideoDeleted, VideoEvent
from serve_app.request_images import RequestImages
from serve_app.served_model import ServedModel
from serve_app.topology import HttpSettings

_VIDEO_ID = re.compile(r"video_[0-9a-f]{24}")
_FILES: dict[Variant, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.webp", "image/webp"),
    "preview": ("preview.webp", "image/webp"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """One file of a video; `key` is its artifact."""

    key: str
    file_name: str
    media_type: str
    size_bytes: int


class Videos:
    """Holds no job and no client: every method reads the store. `owner` sees its own videos."""

    def __init__(
        self,
        *,
        store: JobStore,
        artifacts: Artifacts,
        models: Mapping[str, ServedModel],
        settings: HttpSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._models = models
        self._settings = settings
        self._images = RequestImages(settings)
        self._clock = clock

    async def create(
        self,
        owner: str,
        request: CreateVideo,
        uploads: Mapping[str, bytes],
        *,
        idempotency_key: str | None,
        announced: bool = True,
        job_id: str | None = None,
    ) -> Video:
        """Accept a job. `uploads` holds the images (of IMAGE_FIELDS) that came as bytes;
        `announced`: whether a webhook tells its end; `job_id`: a new one that the caller knows."""
        if request.branch_from is not None:
            return await self._branch(owner, request, uploads, idempotency_key=idempotency_key)
        model = self.model(request.model)
        images = await self._images.read(request, uploads)
        sizes = await self._images.sizes(images)
        params = create_video.video_params(
            request,
            model,
            seed=secrets.randbits(63),
            # A model without images refuses the image below, not its aspect here.
            image_size=sizes.get("input_reference") if model.config.accepts_image else None,
        )
        create_video.check_images(model.config, set(images), params.num_frames)
        if request.preview:
            create_video.check_preview(model.config, params)
        job_id = job_id or new_job_id()
        keys = {name: f"{job_id}/{key}" for name, key in _IMAGE_KEYS.items() if name in images}
        new = NewJob(
            id=job_id,
            owner=owner,
            user=request.user,
            model=model.name,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or model.config.negative_prompt,
            params=dataclasses.asdict(params),
            num_steps=params.num_steps,
            predicted_s=model.predict_s(params, has_image=bool(images)),
            priority=request.priority or 0,
            input_image=keys.get("input_reference"),
            last_image=keys.get("last_image"),
            idempotency_key=idempotency_key,
            request_hash=create_video.request_hash(request, images),
            cinematography=request.cinematography and request.cinematography.chosen(),
            extend_prompt=self._extends_prompt(request),
            preview=bool(request.preview),
            announced=announced,
        )
        return await self._accept(new, {keys[name]: data for name, data in images.items()})

    async def remix(
        self, owner: str, video_id: str, request: RemixVideo, *, idempotency_key: str | None
    ) -> Video:
        """The same video with another prompt; the other's images become the new one's own."""
        source = await self.get(owner, video_id)
        model = self.model(source.model)
        new = derived_jobs.remix(source, request, model, idempotency_key=idempotency_key)
        return await self._accept(self._extended_if_possible(new), derived_jobs.copies(source, new))

    async def _branch(
        self,
        owner: str,
        request: CreateVideo,
        uploads: Mapping[str, bytes],
        *,
        idempotency_key: str | None,
    ) -> Video:
        self._extends_prompt(request)
        if uploads:
            field = min(uploads)
            raise InvalidRequest(
                f"{field}: a branch has its source's image: leave it out", param=field
            )
        try:
            source = await self.get(owner, request.branch_from)
        except NotFound as error:
            raise InvalidRequest(
                f"branch_from: {error.message}", param="branch_from", code=error.code
            ) from error
        new = derived_jobs.branch(
            source,
            request,
            self.model(source.model),
            self.model(request.model or source.model),
            request_hash=create_video.request_hash(request, {}),
            idempotency_key=idempotency_key,
        )
        return await self._accept(self._extended_if_possible(new), derived_jobs.copies(source, new))

    def _extended_if_possible(self, new: NewJob) -> NewJob:
        """A derived job does not fail for an extender that its source had and is no more."""
        extends = new.extend_prompt and self._settings.extends_prompts
        return dataclasses.replace(new, extend_prompt=extends)

    async def _accept(self, new: NewJob, inputs: Mapping[str, bytes | str]) -> Video:
        job = await self._submit(new, inputs)
        if _hidden(job):
            raise Conflict(
                "the video that this Idempotency-Key made was deleted: use another key",
                code="idempotency_key_reused",
            )
        return await self.video(job)

    async def _submit(self, new: NewJob, inputs: Mapping[str, bytes | str]) -> Job:
        """`inputs` by their keys: bytes, or the key of another video's artifact to copy. They are
        stored before the row, which a worker may claim at once."""
        try:
            for key, data in inputs.items():
                if isinstance(data, str):
                    await self._artifacts.copy(data, key)
                else:
                    await self._artifacts.put(key, data)
        except ArtifactMissing as error:
            await self._artifacts.delete_prefix(new.id)
            raise Conflict(
                "the files of the video that this one begins with are gone", code="content_gone"
            ) from error
        except BaseException:
            await self._artifacts.delete_prefix(new.id)
            raise
        try:
            job = await self._store.submit(
                new,
                max_queued_jobs=self._settings.max_queued_jobs,
                max_queued_s=self._settings.max_queued_s,
            )
        except (QueueFull, IdempotencyConflict):
            # Only these: after any other failure the row may be there, and needs its images.
            await self._artifacts.delete_prefix(new.id)
            raise
        if inputs and job.id != new.id:
            await self._artifacts.delete_prefix(new.id)
        return job

    async def get(self, owner: str, video_id: str) -> Job:
        """Raises NotFound for another owner's video as for none."""
        job = None
        if _VIDEO_ID.fullmatch(video_id):
            job = await self._store.get(video_id, owner=owner)
        if job is None or _hidden(job):
            raise NotFound(f"no video {video_id[:64]!r}", code="video_not_found")
        return job

    async def page(
        self, owner: str, *, limit: int, after: str | None, order: Literal["asc", "desc"]
    ) -> tuple[list[Video], bool]:
        """At most `limit` videos that follow `after`, and whether more do."""
        jobs: list[Job] = []
        cursor = after
        if after is not None and not _VIDEO_ID.fullmatch(after):
            raise _unknown_cursor(after)
        while len(jobs) <= limit:
            try:
                found = await self._store.list(
                    owner=owner, limit=limit + 1, after=cursor, order=order
                )
            except JobNotFound as error:
                if cursor == after:
                    raise _unknown_cursor(after) from error
                break  # the last of the previous batch was deleted meanwhile
            jobs += [job for job in found if not _hidden(job)]
            if len(found) <= limit:
                break
            cursor = found[-1].id
        videos = [self._video(job, None, None) for job in jobs[:limit]]
        return videos, len(jobs) > limit

    async def delete(self, owner: str, video_id: str) -> None:
        """Gone for the client now. A running job's worker learns it at its next step."""
        await self.get(owner, video_id)
        job = await self._store.request_cancel(video_id, owner=owner)
        if job is not None and job.finished:
            await self._artifacts.delete_prefix(video_id)
            await self._store.delete(video_id, owner=owner)

    async def video(self, job: Job) -> Video:
        return self._video(job, *await self._queue(job))

    async def watch(
        self, owner: str, video_id: str, *, poll_s: float
    ) -> AsyncIterator[VideoEvent | VideoDeleted]:
        """Tells what is, then every change, until the job is finished or deleted."""
        last: VideoEvent | None = None
        while True:
            try:
                job = await self.get(owner, video_id)
                queue_position, queued_before_s = await self._queue(job)
            except NotFound:
                yield VideoDeleted(id=video_id)
                return
            except StoreUnavailable:
                await asyncio.sleep(poll_s)
                continue
            if job.status == "queued" and queue_position is None:
                continue  # it moved on between the two reads: tell what it is now
            event = openai_api.video_event(
                job,
                queue_position=queue_position,
                seconds_left=self._seconds_left(job, queued_before_s),
            )
            if last is None or _told(event) != _told(last):
                yield event
                last = event
            if job.finished:
                return
            await asyncio.sleep(poll_s)

    async def content(self, owner: str, video_id: str, variant: Variant) -> Content:
        job = await self.get(owner, video_id)
        name, media_type = _FILES[variant]
        key = job.artifacts.get(variant)
        if key is None:
            raise _no_content(job, variant)
        try:
            size_bytes = await self._artifacts.size(key)
        except ArtifactMissing as error:
            raise NotFound("the content of this video is gone", code="content_gone") from error
        return Content(
            key=key, file_name=f"{job.id}-{name}", media_type=media_type, size_bytes=size_bytes
        )

    def model(self, name: str | None) -> ServedModel:
        """The model a request names; the first when it names none."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise InvalidRequest(
                f"no model {name[:64]!r}; there are {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    def _extends_prompt(self, request: CreateVideo) -> bool:
        if request.prompt_extend and not self._settings.extends_prompts:
            raise InvalidRequest(
                "prompt_extend: this service extends no prompts: remove it, or configure"
                " prompt_extension",
                param="prompt_extend",
            )
        return bool(request.prompt_extend)

    async def _queue(self, job: Job) -> tuple[int | None, float | None]:
        """(jobs before this one, their predicted seconds); both None unless it is queued."""
        if job.status != "queued":
            return None, None
        position = await self._store.queue_position(job.id)
        if not position:
            return position, 0.0
        num_queued, queued_s = await self._store.queue_size()
        return position, queued_s * min(1.0, position / max(1, num_queued))

    def _seconds_left(self, job: Job, queued_before_s: float | None) -> float | None:
        return openai_api.seconds_left(job, now=self._clock(), queued_before_s=queued_before_s)

    def _video(self, job: Job, position: int | None, queued_before_s: float | None) -> Video:
        return openai_api.video(
            job,
            queue_position=position,
            seconds_left=self._seconds_left(job, queued_before_s),
        )


_IMAGE_KEYS = {"input_reference": "input", "last_image": "last_input"}


def _hidden(job: Job) -> bool:
    return job.cancel_requested or job.status == "cancelled"


def _no_content(job: Job, variant: Variant) -> Conflict | NotFound:
    if variant == "preview" and not job.preview:
        return NotFound("no preview was asked for (preview: true)", code="content_gone")
    if job.status == "failed":
        return Conflict(f"there is no {variant}: the job failed", code="video_failed")
    if not job.finished:
        return Conflict(f"no {variant} yet: the video is {job.status}", code="video_not_ready")
    return NotFound(f"this video has no {variant}", code="content_gone")


def _told(event: VideoEvent) -> dict[str, object]:
    """What a change of is worth an event; the estimate alone is not."""
    return event.model_dump(exclude={"seconds_left"})


def _unknown_cursor(after: str | None) -> InvalidRequest:
    return InvalidRequest(f"no video {str(after)[:64]!r} to list from", param="after")
