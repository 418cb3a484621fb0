"""The body of a request to create a video: JSON, multipart or a plain form, as fields and uploads.

Owns what may be in a body and how it is read without holding more than the limits allow: whole, and
text in UTF-8, where starlette's parsers guess. Knows nothing about what the fields mean
(create_video.py) or what an image is (images.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import unquote_to_bytes

from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
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
    form = await _parse_form(request, media_type, settings)
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((name, value))
            elif value.size or value.filename:  # browsers send an empty file for none
                uploads |= {name: await _read_upload(name, value, settings, name in uploads)}
    finally:
        await form.close()
    return nest_form_fields(texts), uploads


async def _parse_form(request: Request, media_type: str, settings: HttpSettings) -> FormData:
    limits = {"max_fields": 100, "max_part_size": settings.max_body_bytes}
    async with aclosing(request.stream()) as stream:
        if media_type == MULTIPART:
            parser = _WholeMultipart(request.headers, stream, max_files=len(IMAGE_FIELDS), **limits)
        else:
            parser = _UrlEncoded(request.headers, stream, **limits)
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest(error.message) from error


class _WholeMultipart(MultiPartParser):
    """Starlette's drops a part that the body breaks off in, as if it had not been sent, and reads
    text that is not in the Content-Type's charset as Latin-1."""

    has_ended = False

    async def parse(self) -> FormData:
        async with aclosing(self._up_to_the_end(self.stream)) as self.stream:
            return await super().parse()

    async def _up_to_the_end(
        self, stream: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self.has_ended:  # raised where `parse` still closes the files it has begun
            raise InvalidRequest("the form is cut short: its closing boundary is missing")

    def on_end(self) -> None:
        """The closing boundary was read; a line end or an epilogue may follow it."""
        self.has_ended = True

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self._charset = "utf-8"  # RFC 7578 gives multipart/form-data no charset of its own

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            _text(self._current_part.field_name, self._current_part.data)
        super().on_part_end()


class _UrlEncoded(FormParser):
    """Starlette's replaces what is not UTF-8, and reads what is not %-escaped as Latin-1."""

    def on_field_end(self) -> None:
        super().on_field_end()
        name, _ = self._items[-1]
        value = unquote_to_bytes(bytes(self._field_value).replace(b"+", b" "))
        self._items[-1] = (name, _text(name, value))


def _text(name: str, value: bytes | bytearray) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        name = name[:64]
        raise InvalidRequest(f"{name} is not text in UTF-8", param=name) from error


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
