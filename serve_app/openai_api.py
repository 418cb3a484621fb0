"""The wire form of answers: Job -> Video, ServedModel -> Model, and the error's shape.

Owns the names that clients read (those of the OpenAI videos API, then this service's own). Pure:
knows nothing about fastapi, the store or time's passing. What clients write is create_video.py.

A cancelled job has no status of its own here, since SDKs know only four: DELETE makes a video
unknown (404) at once, whatever it was doing; one cancelled otherwise is `failed` with code
"cancelled".
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, Field

from serve_app.job_schema import CANCELLED, FAILED, IN_PROGRESS, Job
from serve_app.served_model import ServedModel
from wan_model.params import VideoParams

CANCELLED_CODE = "cancelled"


class VideoError(BaseModel):
    code: str
    message: str


class Timing(BaseModel):
    """One stage's work on a video; an expert's covers the steps [from_step, to_step). Unix seconds.

    The wait for the stage lies between two of these. `busy_s` is the work alone: an expert may have
    served a more urgent video between two steps.
    """

    stage: str
    replica: str
    started_at: float
    ended_at: float
    busy_s: float
    from_step: int
    to_step: int


class Video(BaseModel):
    """A video job. After `remixed_from_video_id` follow this service's own fields.

    `seconds` is the time from the first frame to the last, (num_frames - 1) / fps.
    `queue_position` counts the jobs before this one and is null in lists; `seconds_left` is an
    estimate; `timings` is there once the video is completed.
    """

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None
    expires_at: int | None
    status: Literal["queued", "in_progress", "completed", "failed"]
    model: str
    progress: int = Field(ge=0, le=100)
    prompt: str
    seconds: str
    size: str
    error: VideoError | None
    remixed_from_video_id: None = None

    queue_position: int | None
    stage: str | None
    step: int
    seconds_left: float | None
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    negative_prompt: str
    seed: int
    flow_shift: float
    boundary_ratio: float | None
    solver: str
    priority: int
    user: str | None
    timings: list[Timing]


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class VideoEvent(BaseModel):
    """The data of one server-sent event."""

    id: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    queue_position: int | None
    stage: str | None
    step: int
    num_steps: int
    progress: int
    seconds_left: float | None
    error: VideoError | None


class Model(BaseModel):
    """A served model and the defaults of its requests."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["wan-serve"] = "wan-serve"
    task: Literal["t2v", "i2v", "ti2v"]
    size: str
    num_frames: int
    fps: int
    num_inference_steps: int
    max_num_frames: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: ErrorDetail


def video(job: Job, *, queue_position: int | None, seconds_left: float | None) -> Video:
    params = VideoParams(**job.params)
    return Video(
        id=job.id,
        created_at=int(job.created_at),
        completed_at=_whole(job.completed_at),
        expires_at=_whole(job.expires_at),
        status=_status(job),
        model=job.model,
        progress=job.progress,
        prompt=job.prompt,
        seconds=f"{(params.num_frames - 1) / params.fps:.6g}",
        size=f"{params.width}x{params.height}",
        error=_error(job),
        queue_position=queue_position,
        stage=job.stage,
        step=job.step,
        seconds_left=seconds_left,
        num_frames=params.num_frames,
        fps=params.fps,
        num_inference_steps=params.num_steps,
        guidance_scale=params.guidance_high_noise,
        guidance_scale_2=params.guidance_low_noise,
        negative_prompt=job.negative_prompt or "",
        seed=params.seed,
        flow_shift=params.shift,
        boundary_ratio=params.boundary_ratio,
        solver=params.solver,
        priority=job.priority,
        user=job.user,
        timings=job.artifacts.get("timings", []),
    )


def video_event(job: Job, *, queue_position: int | None, seconds_left: float | None) -> VideoEvent:
    return VideoEvent(
        id=job.id,
        status=_status(job),
        queue_position=queue_position,
        stage=job.stage,
        step=job.step,
        num_steps=job.num_steps,
        progress=job.progress,
        seconds_left=seconds_left,
        error=_error(job),
    )


def model(served: ServedModel) -> Model:
    config = served.config
    return Model(
        id=served.name,
        created=served.created,
        task=config.task,
        size=f"{config.width}x{config.height}",
        num_frames=config.num_frames,
        fps=config.fps,
        num_inference_steps=config.num_steps,
        max_num_frames=served.max_num_frames,
    )


def seconds_left(job: Job, *, now: float, queued_before_s: float | None) -> float | None:
    """Prediction and pace so far, the more of the latter the further the job is.

    None when finished or nothing is known. `queued_before_s`: work that a queued job waits for.
    """
    if job.finished:
        return None
    left_s = job.predicted_s * (1 - job.progress / 100)
    if job.status != IN_PROGRESS:
        return round(left_s + (queued_before_s or 0.0), 1) if job.predicted_s else None
    if job.progress and job.started_at is not None:
        done = job.progress / 100
        pace_s = max(0.0, now - job.started_at) * (1 - done) / done
        left_s = pace_s if not job.predicted_s else done * pace_s + (1 - done) * left_s
    elif not job.predicted_s:
        return None
    return round(left_s, 1)


def poll_after_ms(seconds_left: float | None) -> int:
    """When to ask again: after a tenth of the time left. Clients keep the first answer's interval,
    so it has narrow bounds."""
    if seconds_left is None:
        return 1000
    return round(min(max(seconds_left * 100, 500), 5000))


def _status(job: Job) -> Literal["queued", "in_progress", "completed", "failed"]:
    return FAILED if job.status == CANCELLED else job.status


def _error(job: Job) -> VideoError | None:
    if job.status == CANCELLED:
        return VideoError(code=CANCELLED_CODE, message="the job was cancelled")
    if job.status != FAILED:
        return None
    message = _PATH.sub("(path)", job.error_message or "the job failed")
    return VideoError(code=job.error_code or "failed", message=message)


_PATH = re.compile(r"(?<![\w:/])(?:/[\w.@+-]+){2,}/?")
"""An absolute path in a failure's text is the server's business."""


def _whole(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)
