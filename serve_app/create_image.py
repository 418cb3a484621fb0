"""Pictures: the OpenAI images shape over jobs of one frame, answered when they are done.

Owns the wire form and the wait. The jobs are ordinary videos until the answer; then, or when nobody
waits any more, they are deleted. Knows nothing about fastapi, the store's tables or stages.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from io import BytesIO
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serve_app.artifacts import ArtifactError, Artifacts
from serve_app.create_video import MAX_PRIORITY, CreateVideo, Solver, Text, invalid
from serve_app.errors import InvalidRequest, JobFailed, NotFound, Unavailable
from serve_app.job_schema import COMPLETED, Job, JobStoreError, StoreUnavailable, new_job_id
from serve_app.openai_api import Video
from serve_app.served_model import ServedModel
from serve_app.videos import Videos
from wan_model.params import MAX_SEED

logger = logging.getLogger(__name__)

POLL_S = 0.2
MAX_IMAGES = 10

OutputFormat = Literal["png", "jpeg", "webp"]


class CreateImage(BaseModel):
    """Pictures to make. Image k of `n` has seed + k. Numbers are those of a video."""

    model_config = ConfigDict(extra="forbid", title="CreateImage", allow_inf_nan=False)

    prompt: Text = Field(min_length=1, max_length=32_000)
    model: Text | None = Field(None, description="Absent: the first that needs no image")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = Field(
        None, pattern=r"^([0-9]{1,5}x[0-9]{1,5}|auto)$", examples=["1024x1024"]
    )
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = Field(None, description="Absent: png")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Absent: random, and reported")
    negative_prompt: Text | None = Field(None, max_length=32_000)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    guidance_scale_2: float | None = Field(None, ge=0)
    flow_shift: float | None = Field(None, gt=0)
    boundary_ratio: float | None = Field(None, ge=0, le=1)
    solver: Solver | None = None
    cache: float | None = Field(None, ge=0, le=1)
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    user: Text | None = Field(None, max_length=256)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        """JSON's true is no number, though Python's is."""
        if isinstance(value, bool):
            raise ValueError("true and false are no values of this field")
        return value

    def as_video(self, model: str, seed: int) -> CreateVideo:
        own = {"model", "n", "size", "response_format", "output_format", "seed"}
        fields = self.model_dump(exclude_none=True, exclude=own)
        size = None if self.size == "auto" else self.size
        return CreateVideo(**fields, model=model, size=size, seed=seed, num_frames=1)


class MadeImage(BaseModel):
    b64_json: str
    revised_prompt: str | None
    seed: int


class ImagesAnswer(BaseModel):
    created: int
    data: list[MadeImage]
    output_format: OutputFormat
    size: str


def parse_create_image(fields: Mapping[str, Any]) -> CreateImage:
    """Raises InvalidRequest whose `param` is the first field that is wrong."""
    try:
        return CreateImage.model_validate(dict(fields))
    except ValidationError as error:
        raise invalid(error) from None


class ImageJobs:
    """Holds nothing between two requests; a request holds its jobs until it is answered."""

    def __init__(
        self,
        videos: Videos,
        artifacts: Artifacts,
        models: Mapping[str, ServedModel],
        *,
        max_wait_s: float,
    ) -> None:
        self._videos = videos
        self._artifacts = artifacts
        self._models = models
        self._max_wait_s = max_wait_s

    async def generate(
        self,
        owner: str,
        request: CreateImage,
        *,
        is_disconnected: Callable[[], Awaitable[bool]],
    ) -> ImagesAnswer | None:
        """The pictures, all or none; None when the client hung up.

        Raises JobFailed, and Unavailable when they were not done in time; whatever happens, no job
        is left running.
        """
        model = self._model(request.model)
        seed = secrets.randbits(48) if request.seed is None else request.seed
        # Under ids known before, and in tasks that end although this one is cancelled: whatever
        # came of a job's creation, it can be forgotten.
        videos = [
            request.as_video(model, (seed + k) % (MAX_SEED + 1)) for k in range(request.n or 1)
        ]
        creating = {
            (job_id := new_job_id()): asyncio.create_task(self._create(owner, job_id, video))
            for video in videos
        }
        try:
            made = await asyncio.gather(*map(asyncio.shield, creating.values()))
            jobs = await self._wait(owner, list(creating), is_disconnected)
            if jobs is None:
                return None
            output_format = request.output_format or "png"
            return ImagesAnswer(
                created=int(time.time()),
                data=[await self._image(job, output_format) for job in jobs],
                output_format=output_format,
                size=made[0].size,
            )
        finally:
            # As a task of its own: this one is being cancelled when the client hung up.
            forgetting = asyncio.create_task(self._forget(owner, creating))
            await asyncio.shield(forgetting)

    async def _create(self, owner: str, job_id: str, video: CreateVideo) -> Video:
        return await self._videos.create(
            owner, video, {}, idempotency_key=None, announced=False, job_id=job_id
        )

    def _model(self, name: str | None) -> str:
        if name is None:
            able = [each.name for each in self._models.values() if not each.config.needs_image]
            if not able:
                raise InvalidRequest(
                    "every model here animates an image: none makes one", param="model"
                )
            return able[0]
        model = self._videos.model(name)
        if model.config.needs_image:
            raise InvalidRequest(
                f"model: {model.name} animates an image and makes none from words", param="model"
            )
        return model.name

    async def _wait(
        self, owner: str, ids: list[str], is_disconnected: Callable[[], Awaitable[bool]]
    ) -> list[Job] | None:
        deadline = time.monotonic() + self._max_wait_s
        done: dict[str, Job] = {}
        while True:
            for video_id in ids:
                if video_id not in done and (job := await self._finished(owner, video_id)):
                    done[video_id] = job
            if len(done) == len(ids):
                return [done[video_id] for video_id in ids]
            if await is_disconnected():
                return None
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"not done within {self._max_wait_s:g} s, and cancelled: try again when fewer"
                    " jobs wait, or queue a video of one frame",
                    code="image_timeout",
                )
            await asyncio.sleep(POLL_S)

    async def _finished(self, owner: str, video_id: str) -> Job | None:
        """The job once it is completed; None before. Raises JobFailed."""
        try:
            job = await self._videos.get(owner, video_id)
        except StoreUnavailable:
            return None
        except NotFound as error:
            raise JobFailed("the job was deleted meanwhile", code="cancelled") from error
        if not job.finished:
            return None
        if job.status != COMPLETED:
            error = (await self._videos.video(job)).error
            raise JobFailed(error.message, code=error.code)
        return job

    async def _image(self, job: Job, output_format: OutputFormat) -> MadeImage:
        data = await self._artifacts.get(job.artifacts["image"])
        if output_format != "png":
            data = await asyncio.to_thread(_converted, data, output_format)
        video = await self._videos.video(job)
        return MadeImage(
            b64_json=base64.b64encode(data).decode(),
            revised_prompt=video.revised_prompt,
            seed=video.seed,
        )

    async def _forget(self, owner: str, creating: Mapping[str, asyncio.Task[Video]]) -> None:
        await asyncio.wait(creating.values())
        for job_id in creating:
            try:
                await self._videos.delete(owner, job_id)
            except NotFound:
                pass
            except (JobStoreError, ArtifactError) as error:
                logger.warning("%s was for a picture and is not deleted: %s", job_id, error)


def _converted(png: bytes, output_format: OutputFormat) -> bytes:
    buffer = BytesIO()
    Image.open(BytesIO(png)).save(buffer, format=output_format.upper(), quality=95)
    return buffer.getvalue()
