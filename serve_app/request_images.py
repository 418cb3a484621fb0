"""The images of a request for a video, wherever they came from: bytes, and their sizes.

Owns which field an image belongs to and the API's errors about it; where references may point and
what an image is belongs to images.py. Knows nothing about jobs or models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from serve_app.create_video import IMAGE_FIELDS, CreateVideo
from serve_app.errors import BodyTooLarge, InvalidRequest
from serve_app.images import ImageTooLarge, decode_data_uri, fetch_image, upright_size
from serve_app.topology import HttpSettings


class RequestImages:
    """Every method raises InvalidRequest or BodyTooLarge naming the field (of IMAGE_FIELDS)."""

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings

    async def read(self, request: CreateVideo, uploads: Mapping[str, bytes]) -> dict[str, bytes]:
        """The uploads, and what the request's references lead to."""
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

    async def sizes(self, images: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """(width, height) of each, upright; all pixels are decoded."""
        return {name: await self._upright_size(name, data) for name, data in sorted(images.items())}

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


def _image_error(name: str, error: ValueError) -> InvalidRequest | BodyTooLarge:
    kind = BodyTooLarge if isinstance(error, ImageTooLarge) else InvalidRequest
    return kind(f"{name}: {error}", param=name, code="invalid_image")
