"""The body of a request to create a video: JSON, multipart or a plain form, as fields and uploads.

Owns what may be in a body and how it is read without holding more than the limits allow. Knows
nothing about what the fields mean (create_video.py) or what an image is (images.py).
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve_app.create_video import IMAGE_FIELDS, CreateVideo, nest_form_fields
from serve_app.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from serve_app.topology import HttpSettings

MULTIPART, FORM = "multipart/form-data", "application/x-www-form-urlencoded"


async def read_body(
    request: Request, settings: HttpSettings
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The fields as JSON would hold them, and the images that came as files."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type == "application/json":
        try:
            fields = from_json(await request.body(), allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequest("the body is not valid JSON", code="invalid_json") from error
        if not isinstance(fields, dict):
            raise InvalidRequest("the body is not a JSON object", code="invalid_json")
        return fields, {}
    if media_type not in (MULTIPART, FORM):
        raise UnsupportedMediaType(f"send application/json or {MULTIPART}")
    texts, uploads = [], {}
    async with request.form(
        max_files=len(IMAGE_FIELDS), max_fields=100, max_part_size=settings.max_body_bytes
    ) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((name, value))
            elif value.size or value.filename:  # browsers send an empty file for none
                uploads |= {name: await _read_upload(name, value, settings, name in uploads)}
    return nest_form_fields(texts), uploads


async def _read_upload(
    name: str, upload: UploadFile, settings: HttpSettings, is_second: bool
) -> bytes:
    if name not in IMAGE_FIELDS:
        known = name in CreateVideo.model_fields
        raise InvalidRequest(
            f"{name[:64]} is no file" if known else f"unknown field {name[:64]!r}",
            param=name[:64],
            code="invalid_value" if known else "unknown_field",
        )
    if is_second:
        raise InvalidRequest(f"{name} is given twice", param=name)
    data = await upload.read(settings.max_image_bytes + 1)
    if len(data) > settings.max_image_bytes:
        raise BodyTooLarge(
            f"{name}: the image has more than {settings.max_image_bytes} bytes",
            param=name,
            code="invalid_image",
        )
    return data
