"""Videos: what the API does with a client's videos, over the job store and the artifact store.

Owns admission (images, numbers, prediction, submit), what a client may see, and the progress that a
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

from serve_app import create_video, openai_api
from serve_app.artifacts import ArtifactMissing, Artifacts
from serve_app.create_video import IMAGE_FIELDS, CreateVideo
from serve_app.errors import BodyTooLarge, Conflict, InvalidRequest, NotFound
from serve_app.images import ImageTooLarge, decode_data_uri, fetch_image, upright_size
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
from serve_app.openai_api import Video, VideoDeleted, VideoEvent
from serve_app.served_model import ServedModel
from serve_app.topology import HttpSettings

Variant = Literal["video", "thumbnail"]

_VIDEO_ID = re.compile(r"video_[0-9a-f]{24}")
_FILES: dict[Variant, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """One file of a finished video; `key` is its artifact."""

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
        self._clock = clock

    async def create(
        self,
        owner: str,
        request: CreateVideo,
        uploads: Mapping[str, bytes],
        *,
        idempotency_key: str | None,
    ) -> Video:
        """Accept a job. `uploads` holds the images (of IMAGE_FIELDS) that came as bytes."""
        model = self.model(request.model)
        images = await self._images(request, uploads)
        sizes = {
            name: await self._upright_size(name, data) for name, data in sorted(images.items())
        }
        params = create_video.video_params(
            request,
            model,
            seed=secrets.randbits(63),
            # A model without images refuses the image below, not its aspect here.
            image_size=sizes.get("input_reference") if model.config.accepts_image else None,
        )
        create_video.check_images(model.config, set(images), params.num_frames)
        job_id = new_job_id()
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
        )
        job = await self._submit(new, {keys[name]: data for name, data in images.items()})
        if _hidden(job):
            raise Conflict(
                "the video that this Idempotency-Key made was deleted: use another key",
                code="idempotency_key_reused",
            )
        return await self.video(job)

    async def _submit(self, new: NewJob, inputs: Mapping[str, bytes]) -> Job:
        """The images are stored before the row: a worker may claim it at once."""
        try:
            for key, data in inputs.items():
                await self._artifacts.put(key, data)
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
        await self._store.request_cancel(video_id, owner=owner)
        if await self._store.delete(video_id, owner=owner) is not None:
            await self._artifacts.delete_prefix(video_id)

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
        if job.status == "failed":
            raise Conflict("the video has no content: its job failed", code="video_failed")
        if not job.finished:
            raise Conflict(f"the video is {job.status}, not completed", code="video_not_ready")
        name, media_type = _FILES[variant]
        key = job.artifacts.get(variant)
        if key is None:
            raise NotFound(f"this video has no {variant}", code="content_gone")
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

    async def _images(self, request: CreateVideo, uploads: Mapping[str, bytes]) -> dict[str, bytes]:
        images = dict(uploads)
        for name in IMAGE_FIELDS:
            reference = getattr(request, name)
            if reference is None:
                continue
            if name in images:
                raise InvalidRequest(f"{name} is given twice", param=name)
            try:
                images[name] = await self._referenced(reference.image_url)
            except ValueError as error:
                raise _image_error(name, error) from error
        return images

    async def _referenced(self, url: str) -> bytes:
        max_bytes, hosts = self._settings.max_image_bytes, self._settings.image_url_hosts
        if url[:5].lower() == "data:":
            return decode_data_uri(url, max_bytes=max_bytes)
        if not hosts:
            raise ValueError("only data: URIs are taken here, as data:image/png;base64,...")
        return await fetch_image(url, allowed_hosts=hosts, max_bytes=max_bytes)

    async def _upright_size(self, name: str, data: bytes) -> tuple[int, int]:
        limit = self._settings.max_image_bytes
        try:
            if len(data) > limit:
                raise ImageTooLarge(f"the image has more than {limit} bytes")
            return await asyncio.to_thread(
                upright_size, data, max_pixels=self._settings.max_image_pixels
            )
        except ValueError as error:
            raise _image_error(name, error) from error

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


def _told(event: VideoEvent) -> dict[str, object]:
    """What a change of is worth an event; the estimate alone is not."""
    return event.model_dump(exclude={"seconds_left"})


def _image_error(name: str, error: ValueError) -> InvalidRequest | BodyTooLarge:
    kind = BodyTooLarge if isinstance(error, ImageTooLarge) else InvalidRequest
    return kind(f"{name}: {error}", param=name, code="invalid_image")


def _unknown_cursor(after: str | None) -> InvalidRequest:
    return InvalidRequest(f"no video {str(after)[:64]!r} to list from", param="after")
