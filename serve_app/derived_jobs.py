"""Remix and branch: a new job out of another one's row.

A remix makes the whole video again with another prompt. A branch begins with the state in which its
source changed experts, and gives the low-noise half other words: everything that decided the
high-noise half stays, and asking for another value is refused by name. Pure: knows nothing about
HTTP, stores or files; `copies` says which artifacts the new job needs of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.create_video import IMAGE_FIELDS, CreateVideo, Text, frames_of_seconds, invalid
from serve_app.errors import Conflict, InvalidRequest
from serve_app.job_schema import Job, NewJob, new_job_id
from serve_app.served_model import ServedModel
from wan_model.params import VideoParams
from wan_model.schedule import Schedule, build_schedule


class RemixVideo(BaseModel):
    """The same video with another prompt."""

    model_config = ConfigDict(extra="forbid", title="RemixVideo")

    prompt: Text = Field(min_length=1, max_length=32_000)


def parse_remix(fields: Mapping[str, Any]) -> RemixVideo:
    """Raises InvalidRequest whose `param` is the first field that is wrong."""
    try:
        return RemixVideo.model_validate(dict(fields))
    except ValidationError as error:
        raise invalid(error) from None


def remix(
    source: Job, request: RemixVideo, model: ServedModel, *, idempotency_key: str | None
) -> NewJob:
    """Everything of the source but its prompt; of a branch too, from the first step."""
    params = params_of(source)
    _check_limits(model, params)
    job_id = new_job_id()
    asked = json.dumps({"remix_of": source.id, "prompt": request.prompt}, sort_keys=True)
    return NewJob(
        id=job_id,
        owner=source.owner,
        user=source.user,
        model=source.model,
        prompt=request.prompt,
        negative_prompt=source.negative_prompt,
        params=source.params,
        num_steps=source.num_steps,
        predicted_s=model.predict_s(params, has_image=source.input_image is not None),
        priority=source.priority,
        **_own_images(source, job_id),
        idempotency_key=idempotency_key,
        request_hash=hashlib.sha256(asked.encode()).hexdigest(),
        cinematography=source.cinematography,
        extend_prompt=source.extend_prompt,
        remixed_from=source.id,
        preview=source.preview,
    )


def branch(
    source: Job,
    request: CreateVideo,
    source_model: ServedModel,
    model: ServedModel,
    *,
    request_hash: str,
    idempotency_key: str | None,
) -> NewJob:
    """The source from its boundary on, with the request's words, low-noise guidance and fps, in the
    low-noise expert of `model`; another seed draws the noise anew there. What the request leaves
    out is the source's; an empty cinematography is none, an empty negative prompt the model's own.

    Raises InvalidRequest naming the field that would change the high-noise half, or Conflict when
    there is no state at the boundary (yet, or any more).
    """
    params = params_of(source)
    schedule = _check_boundary(source, source_model, params)
    _check_same_networks(source_model, model)
    _check_unchanged(source, request, params, model)
    params = branched_params(request, params)
    _check_limits(model, params)
    job_id = new_job_id()
    state = f"{job_id}/boundary-0.safetensors"  # attempts count from 1
    negative_prompt = source.negative_prompt
    if request.negative_prompt is not None:
        negative_prompt = request.negative_prompt or model.config.negative_prompt
    shot, extend_prompt = request.cinematography, request.prompt_extend
    return NewJob(
        id=job_id,
        owner=source.owner,
        user=request.user,
        model=model.name,
        prompt=request.prompt,
        negative_prompt=negative_prompt,
        params=dataclasses.asdict(params),
        num_steps=params.num_steps,
        predicted_s=model.predict_s(
            params,
            has_image=source.input_image is not None,
            from_step=schedule.boundary_step,
        ),
        priority=request.priority or 0,
        **_own_images(source, job_id),
        idempotency_key=idempotency_key,
        request_hash=request_hash,
        cinematography=source.cinematography if shot is None else shot.chosen(),
        extend_prompt=source.extend_prompt if extend_prompt is None else extend_prompt,
        branch_from=source.id,
        checkpoint=state,
        checkpoint_step=schedule.boundary_step,
        boundary_state=state,
    )


def copies(source: Job, new: NewJob) -> dict[str, str]:
    """New artifact key -> the source's: deleting the source must not hurt the new job."""
    names = ("input_image", "last_image", "boundary_state")
    pairs = {getattr(new, name): getattr(source, name) for name in names}
    return {mine: theirs for mine, theirs in pairs.items() if mine is not None}


def params_of(source: Job) -> VideoParams:
    try:
        return VideoParams(**source.params)
    except (TypeError, ValueError) as error:
        raise Conflict(
            "this video was made by another version of the service, whose numbers are not"
            " understood here: create it anew",
            code="unknown_parameters",
        ) from error


def _own_images(source: Job, job_id: str) -> dict[str, str | None]:
    return {
        name: f"{job_id}/{key}" if getattr(source, name) is not None else None
        for name, key in (("input_image", "input"), ("last_image", "last_input"))
    }


def _check_limits(model: ServedModel, params: VideoParams) -> None:
    try:
        model.check_limits(params)
        params.check_fits(model.config)
    except ValueError as error:
        raise InvalidRequest(f"{model.name} no longer makes such a video: {error}") from error


def _check_boundary(source: Job, model: ServedModel, params: VideoParams) -> Schedule:
    schedule = build_schedule(params)
    if model.config.num_experts == 1:
        raise _no_branch(f"{model.name} has one expert, and a branch begins where two meet")
    if not schedule.has_boundary:
        raise _no_branch("all its steps were one expert's, and a branch begins where two meet")
    if source.boundary_state is not None:
        return schedule
    if not source.finished:
        raise Conflict(
            f"branch_from: {source.id} has not reached its low-noise expert yet: try again later",
            param="branch_from",
            code="boundary_not_reached",
        )
    raise Conflict(
        f"branch_from: the state of {source.id} was not kept (jobs.keep_boundary_states is off, or"
        " it ended before its low-noise expert)",
        param="branch_from",
        code="boundary_state_gone",
    )


def _check_same_networks(source_model: ServedModel, model: ServedModel) -> None:
    """Other weights, a LoRA's say, may go on with a state; another kind of network may not."""
    for part in ("task", "num_experts", "transformer", "vae", "text_encoder"):
        if getattr(source_model.config, part) != getattr(model.config, part):
            raise InvalidRequest(
                f"model: {model.name} cannot go on with the state of {source_model.name}: its"
                f" {part} is another",
                param="model",
            )


def _check_unchanged(
    source: Job, request: CreateVideo, params: VideoParams, model: ServedModel
) -> None:
    for field in IMAGE_FIELDS:
        if getattr(request, field) is not None:
            raise InvalidRequest(
                f"{field}: a branch has its source's image: leave it out", param=field
            )
    if request.preview:
        raise InvalidRequest(
            "preview: a branch begins at the boundary, of which its source has the preview:"
            " leave it out",
            param="preview",
        )
    for field, theirs, same in _high_noise_half(request, params, model):
        if not same:
            raise InvalidRequest(
                f"{field}: would change the high-noise half, which a branch takes from {source.id}"
                f" ({theirs}): leave it out",
                param=field,
            )


def _high_noise_half(
    request: CreateVideo, params: VideoParams, model: ServedModel
) -> Iterator[tuple[str, Any, bool]]:
    """(wire field, the source's value, whether the request leaves it so)."""
    size = f"{params.width}x{params.height}"
    yield "size", size, request.size in (None, size)
    fps = request.fps or params.fps
    num_frames = params.num_frames
    if request.seconds is not None:
        num_frames = frames_of_seconds(request.seconds, fps, model.config)
    yield "seconds", f"{params.num_frames} frames", num_frames == params.num_frames
    for field, name in (
        ("num_frames", "num_frames"),
        ("num_inference_steps", "num_steps"),
        ("guidance_scale", "guidance_high_noise"),
        ("flow_shift", "shift"),
        ("boundary_ratio", "boundary_ratio"),
        ("solver", "solver"),
    ):
        theirs = getattr(params, name)
        yield field, theirs, getattr(request, field) in (None, theirs)
    yield "cache", params.cache or 0, request.cache in (None, params.cache or 0)


def branched_params(request: CreateVideo, params: VideoParams) -> VideoParams:
    """The source's numbers with what a branch may change."""
    changes = {"guidance_low_noise": request.guidance_scale_2, "fps": request.fps}
    changes = {name: value for name, value in changes.items() if value is not None}
    if request.seed is not None:  # the first noise's own seed means that noise again
        changes["boundary_seed"] = None if request.seed == params.seed else request.seed
    try:
        return dataclasses.replace(params, **changes)
    except ValueError as error:
        message = str(error).replace("guidance_low_noise", "guidance_scale_2")
        raise InvalidRequest(message, param=message.split(maxsplit=1)[0]) from error


def _no_branch(reason: str) -> InvalidRequest:
    return InvalidRequest(f"branch_from: {reason}", param="branch_from")
