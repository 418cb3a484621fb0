"""CreateVideo: the wire form of a request for a video, and how it becomes VideoParams.

Owns the names that clients write (those of the OpenAI videos API and of diffusers) and their
mapping to ours. Pure: knows nothing about fastapi, the store or what is in an image's bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from serve_app import cinematography
from serve_app.cinematography import Cinematography
from serve_app.errors import InvalidRequest
from serve_app.job_schema import is_storable
from serve_app.served_model import ServedModel
from wan_model.config import WanConfig
from wan_model.params import MAX_SEED, SOLVERS, VideoParams
from wan_model.schedule import build_schedule

MAX_PRIORITY = 100


def _storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("NUL characters and half surrogate pairs cannot be stored")
    return text


Text = Annotated[str, AfterValidator(_storable)]
Solver = Literal[SOLVERS]


class ImageReference(BaseModel):
    """An image by reference; an upload takes this object's place in a multipart body."""

    model_config = ConfigDict(extra="forbid")
    image_url: str = Field(description="data:image/png;base64,... (or a URL of an allowed host)")


def _image_reference(value: Any) -> Any:
    """Multipart clients send the object as text, or only the URL."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("neither an upload, nor an object, nor a URL") from error
    return {"image_url": value}


Image = Annotated[
    ImageReference,
    BeforeValidator(_image_reference),
    WithJsonSchema(ImageReference.model_json_schema()),
]


ShotControls = Annotated[
    Cinematography,
    BeforeValidator(cinematography.from_text),
    WithJsonSchema(Cinematography.model_json_schema()),
]


class CreateVideo(BaseModel):
    """A video to make. Numbers may arrive as strings. What is absent is the model's default.

    `guidance_scale` alone sets both experts. With an image, `size` is an area and the image's
    aspect decides the shape.
    """

    model_config = ConfigDict(extra="forbid", title="CreateVideo", allow_inf_nan=False)

    prompt: Text = Field(min_length=1, max_length=32_000)
    model: Text | None = Field(None, description="One of /v1/models; absent: the first")
    seconds: float | None = Field(
        None, gt=0, le=3600, description="Sets num_frames: seconds * fps, to the nearest legal one"
    )
    size: str | None = Field(None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", examples=["1280x720"])
    input_reference: Image | None = Field(None, description="The first frame")
    last_image: Image | None = Field(None, description="The last frame (I2V models)")
    num_frames: int | None = Field(None, ge=1)
    fps: int | None = Field(None, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, description="The high-noise expert's")
    guidance_scale_2: float | None = Field(None, ge=0, description="The low-noise expert's")
    negative_prompt: Text | None = Field(None, max_length=32_000)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Absent: random, and reported")
    flow_shift: float | None = Field(None, gt=0)
    boundary_ratio: float | None = Field(None, ge=0, le=1)
    solver: Solver | None = None
    cache: float | None = Field(
        None, ge=0, le=1, description="Reuse steps that change less than this, as 0.05; 0: none"
    )
    priority: int | None = Field(
        0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Higher goes first"
    )
    user: Text | None = Field(None, max_length=256)
    preview: bool | None = Field(
        None, description="Make variant=preview when the low-noise expert begins"
    )
    branch_from: Text | None = Field(
        None,
        max_length=64,
        description="A video whose low-noise half is made again, with these words or this seed",
    )
    prompt_extend: bool | None = Field(
        None, description="Let a language model write the prompt out, where the service has one"
    )
    cinematography: ShotControls | None = Field(
        None, description="How the shot is lit, framed and moved; see /v1/cinematography"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """JSON's true is no number, though Python's is."""
        if isinstance(value, bool) and bool not in get_args(_annotation(info.field_name)):
            raise ValueError("true and false are no values of this field")
        return value


IMAGE_FIELDS = ("input_reference", "last_image")


def _annotation(field: str) -> Any:
    return CreateVideo.model_fields[field].annotation


def parse_create(fields: Mapping[str, Any]) -> CreateVideo:
    """Raises InvalidRequest whose `param` is the first field that is wrong."""
    try:
        return CreateVideo.model_validate(dict(fields))
    except ValidationError as error:
        raise invalid(error) from None


def nest_form_fields(items: list[tuple[str, str]]) -> dict[str, Any]:
    """Fields of a form as JSON would hold them: `a[b]` becomes {"a": {"b": ...}}, and an empty
    value means absent. Raises InvalidRequest for a field that is given twice."""
    fields: dict[str, Any] = {}
    for key, value in items:
        if value == "":
            continue
        bracketed = re.fullmatch(r"(\w+)\[(\w+)\]", key)
        name, inner = bracketed.groups() if bracketed else (key, None)
        if inner is not None and isinstance(fields.get(name, {}), dict):
            target, slot = fields.setdefault(name, {}), inner
        else:
            target, slot = fields, name
        if slot in target:
            raise InvalidRequest(f"{name} is given twice", param=name)
        target[slot] = value
    return fields


def invalid(error: ValidationError) -> InvalidRequest:
    """Names the first field that is wrong, and how."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {param!r}", param=param, code="unknown_field")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param, code="missing_field")
    return InvalidRequest(f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)


def video_params(
    request: CreateVideo, model: ServedModel, *, seed: int, image_size: tuple[int, int] | None
) -> VideoParams:
    """The request's numbers under our names, completed and checked; `seed` if it names none.

    Raises InvalidRequest naming the wire's field.
    """
    config = model.config
    width, height = map(int, request.size.split("x")) if request.size else (None, None)
    try:
        params = VideoParams.for_model(
            config,
            image_size=image_size,
            guidance=request.guidance_scale,
            guidance_low_noise=request.guidance_scale_2,
            width=width,
            height=height,
            num_frames=_num_frames(request, config),
            fps=request.fps,
            num_steps=request.num_inference_steps,
            seed=seed if request.seed is None else request.seed,
            solver=request.solver or model.default_solver,
            shift=request.flow_shift,
            boundary_ratio=request.boundary_ratio,
            cache=(model.default_cache if request.cache is None else request.cache) or None,
        )
        model.check_limits(params)
    except ValueError as error:
        raise _invalid_number(str(error), request) from error
    return params


def _num_frames(request: CreateVideo, config: WanConfig) -> int | None:
    if request.seconds is None:
        return request.num_frames
    fps = request.fps or config.fps
    num_frames = frames_of_seconds(request.seconds, fps, config)
    if request.num_frames not in (None, num_frames):
        raise ValueError(
            f"seconds {request.seconds:g} at {fps} fps is {num_frames} frames, but num_frames says"
            f" {request.num_frames}: give one of them"
        )
    return num_frames


def frames_of_seconds(seconds: float, fps: int, config: WanConfig) -> int:
    """The legal number of frames nearest to seconds * fps, at least 1; halves go up."""
    stride = config.vae.stride[0]
    return max(1, math.floor((seconds * fps - 1) / stride + 0.5) * stride + 1)


_WIRE_NAMES = {
    "num_steps": "num_inference_steps",
    "shift": "flow_shift",
    "guidance_high_noise": "guidance_scale",
    "guidance_low_noise": "guidance_scale_2",
}
_PARAM_OF = _WIRE_NAMES | {"width": "size", "height": "size", "image": "input_reference"}


def _invalid_number(message: str, request: CreateVideo) -> InvalidRequest:
    """`message` begins with the field's name among VideoParams."""
    field = message.split(maxsplit=1)[0]
    param = _PARAM_OF.get(field, field)
    if param == "num_frames" and request.num_frames is None and request.seconds is not None:
        param = "seconds"
    words = re.compile(rf"\b({'|'.join(_WIRE_NAMES)})\b")
    return InvalidRequest(words.sub(lambda m: _WIRE_NAMES[m[0]], message), param=param)


def check_preview(config: WanConfig, params: VideoParams) -> None:
    """Raises InvalidRequest when a video of these numbers never changes experts."""
    if not build_schedule(params).has_boundary:
        reason = (
            "has one expert" if config.num_experts == 1 else "uses one expert with this schedule"
        )
        raise InvalidRequest(
            f"preview: has no effect, since {config.name} {reason}: remove it", param="preview"
        )


def check_images(config: WanConfig, given: set[str], num_frames: int) -> None:
    """Whether this model takes the images given (names of IMAGE_FIELDS)."""
    if config.needs_image and "input_reference" not in given:
        raise InvalidRequest(
            "this model animates an image: input_reference is required",
            param="input_reference",
            code="missing_field",
        )
    if given and not config.accepts_image:
        field = min(given)
        raise InvalidRequest(f"this model takes no image: remove {field}", param=field)
    if "last_image" in given and (config.task != "i2v" or num_frames == 1):
        raise InvalidRequest(
            "last_image has no effect here: it needs an I2V model and more than one frame",
            param="last_image",
        )
    if config.task == "ti2v" and "input_reference" in given and num_frames == 1:
        raise InvalidRequest(
            "input_reference is the first frame, and there is one: nothing would be made",
            param="input_reference",
        )


def request_hash(request: CreateVideo, images: Mapping[str, bytes]) -> str:
    """What makes two requests with one Idempotency-Key the same: every field and the images'
    bytes, however they were sent."""
    fields = request.model_dump(exclude_none=True, exclude=set(IMAGE_FIELDS))
    fields |= {name: hashlib.sha256(data).hexdigest() for name, data in images.items()}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def multipart_schema() -> dict[str, Any]:
    """The JSON schema of CreateVideo as a form: images are uploads, or URLs in brackets, and every
    part of the cinematography is a field of its own."""
    schema = CreateVideo.model_json_schema()
    for name in IMAGE_FIELDS:
        description = schema["properties"][name]["description"]
        upload = {"type": "string", "format": "binary", "description": description}
        schema["properties"][name] = upload
        schema["properties"][f"{name}[image_url]"] = {"type": "string"}
    del schema["properties"]["cinematography"]
    for name, part in cinematography.VOCABULARY.items():
        schema["properties"][f"cinematography[{name}]"] = {
            "type": "string", "description": part["description"], "enum": part["values"],
        }  # fmt: skip
    return schema
