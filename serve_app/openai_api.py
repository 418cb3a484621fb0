"""The wire form of answers: Job -> Video, ServedModel -> Model, and the error's shape.

Owns the names that clients read (those of the OpenAI videos API, then this service's own). Pure:
knows nothing about fastapi, the store or time's passing. What clients write is create_video.py.

A cancelled job has no status of its own here, since SDKs know only four: DELETE makes a video
unknown (404) at once, whatever it was doing; one cancelled otherwise is `failed` with code
"cancelled".
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from serve_app.cinematography import compose
from serve_app.job_schema import CANCELLED, FAILED, IN_PROGRESS, Job
from serve_app.served_model import ServedModel
from wan_model.params import VideoParams

CANCELLED_CODE = "cancelled"

Variant = Literal["video", "thumbnail", "spritesheet", "preview"]
"""The files that a video may have."""


class VideoError(BaseModel):
    code: str
    message: str


class Timing(BaseModel):
    """One stage's work on a video; an expert's covers the steps [from_step, to_step). Unix seconds.

    The wait for the stage lies between two of these. `busy_s` is the work alone: an expert may have
    served a more urgent video between two steps. `num_reused` of the steps were not computed.
    """

    stage: str
    replica: str
    started_at: float
    ended_at: float
    busy_s: float
    from_step: int
    to_step: int
    num_reused: int = 0


class Video(BaseModel):
    """A video job. After `remixed_from_video_id` follow this service's own fields.

    `seconds` is the time from the first frame to the last, (num_frames - 1) / fps.
    `cache` is 0 when every step is computed. `queue_position` counts its model's jobs before it
    and is null in lists; `seconds_left` is an estimate; `prompt` is what the client wrote,
    `revised_prompt` what the model is given instead (cinematography composed in, extended),
    `prompt_note` why it was not extended although asked for; `variants` names the files that can be
    downloaded now, `preview` among them before the end; `can_branch` says whether `branch_from` may
    name this video; `timings` is there once it is completed. Numbers are null when another version
    of the service made the video and this one does not understand them.
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
    remixed_from_video_id: str | None

    queue_position: int | None
    stage: str | None
    step: int
    seconds_left: float | None
    num_frames: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    negative_prompt: str
    seed: int | None
    flow_shift: float | None
    boundary_ratio: float | None
    solver: str | None
    cache: float | None
    priority: int
    user: str | None
    branch_from: str | None
    preview: bool
    can_branch: bool
    variants: list[Variant]
    prompt_extend: bool
    cinematography: dict[str, str] | None
    revised_prompt: str | None
    prompt_note: str | None
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
    variants: list[Variant]
    error: VideoError | None


class Model(BaseModel):
    """A served model and the defaults of its requests; `extends_prompts`: it takes
    `prompt_extend`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["wan-serve"] = "wan-serve"
    task: Literal["t2v", "i2v", "ti2v"]
    size: str
    num_frames: int
    fps: int
    num_inference_steps: int
    negative_prompt: str
    max_num_frames: int
    extends_prompts: bool


class CinematographyField(BaseModel):
    description: str
    values: list[str]


class CinematographyVocabulary(BaseModel):
    """What `cinematography` may hold, in the order in which it is composed into the prompt."""

    object: Literal["cinematography"] = "cinematography"
    fields: dict[str, CinematographyField]


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
    params = _params(job)
    return Video(
        id=job.id,
        created_at=int(job.created_at),
        completed_at=_whole(job.completed_at),
        expires_at=_whole(job.expires_at),
        status=_status(job),
        model=job.model,
        progress=job.progress,
        prompt=job.prompt,
        seconds=_seconds(params),
        size="x".join(str(params[side] or "?") for side in ("width", "height")),
        error=_error(job),
        remixed_from_video_id=job.remixed_from,
        queue_position=queue_position,
        stage=job.stage,
        step=job.step,
        seconds_left=seconds_left,
        num_frames=params["num_frames"],
        fps=params["fps"],
        num_inference_steps=params["num_steps"],
        guidance_scale=params["guidance_high_noise"],
        guidance_scale_2=params["guidance_low_noise"],
        negative_prompt=job.negative_prompt or "",
        seed=params["seed"] if params["boundary_seed"] is None else params["boundary_seed"],
        flow_shift=params["shift"],
        boundary_ratio=params["boundary_ratio"],
        solver=params["solver"],
        cache=params["cache"] or 0,
        priority=job.priority,
        user=job.user,
        branch_from=job.branch_from,
        preview=job.preview,
        can_branch=job.boundary_state is not None,
        variants=_variants(job),
        prompt_extend=job.extend_prompt,
        cinematography=job.cinematography,
        revised_prompt=_revised_prompt(job),
        prompt_note=job.prompt_note and _PATH.sub("(path)", job.prompt_note),
        timings=_timings(job),
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
        variants=_variants(job),
        error=_error(job),
    )


def model(served: ServedModel, *, extends_prompts: bool) -> Model:
    config = served.config
    return Model(
        id=served.name,
        created=served.created,
        task=config.task,
        size=f"{config.width}x{config.height}",
        num_frames=config.num_frames,
        fps=config.fps,
        num_inference_steps=config.num_steps,
        negative_prompt=config.negative_prompt,
        max_num_frames=served.max_num_frames,
        extends_prompts=extends_prompts,
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


def _params(job: Job) -> dict[str, Any]:
    """Every field of VideoParams; None where the row does not have it as this version writes it."""
    try:
        return dataclasses.asdict(VideoParams(**job.params))
    except (TypeError, ValueError):
        known = dict.fromkeys(field.name for field in dataclasses.fields(VideoParams))
        return known | {
            name: value
            for name, value in job.params.items()
            if isinstance(value, str if name == "solver" else int | float) and name in known
        }


def _seconds(params: dict[str, Any]) -> str:
    if not params["num_frames"] or not params["fps"]:
        return "?"
    return f"{(params['num_frames'] - 1) / params['fps']:.6g}"


def _variants(job: Job) -> list[Variant]:
    return [variant for variant in get_args(Variant) if variant in job.artifacts]


def _timings(job: Job) -> list[Timing]:
    """Those that this version understands: another may have written the row."""
    timings = []
    for entry in job.artifacts.get("timings", []):
        with contextlib.suppress(ValidationError):
            timings.append(Timing.model_validate(entry))
    return timings


def _revised_prompt(job: Job) -> str | None:
    """What is encoded, where it is not the prompt itself."""
    if job.revised_prompt is not None:
        return job.revised_prompt
    return compose(job.prompt, job.cinematography) if job.cinematography else None


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
