"""What `wan generate` does besides its options: reads images and fields, follows the video.

Owns the wait for a video and what an interrupt does to it. Knows nothing about options and exits.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from serve_app.client import screen
from serve_app.client.service import (
    ClientError,
    Json,
    NoSuchVideo,
    Refused,
    Service,
    Unreachable,
    VideoFailed,
    patiently,
)
from serve_app.client.watch import watch


def finished(service: Service, video_id: str, patience_s: float) -> Json:
    """The finished video. An interrupt cancels it."""
    try:
        with screen.following(video_id) as show:

            def told(error: Unreachable) -> None:
                show(f"{error.found}: waiting for it")

            for progress in watch(service, video_id, patience_s=patience_s, told=told):
                show(progress)
    except KeyboardInterrupt:
        _cancel_interrupted(service, video_id)
        raise
    video = patiently(lambda: service.video(video_id), patience_s=patience_s)
    if video["status"] == "failed":
        raise VideoFailed(f"{video_id} failed", video["error"]["message"])
    return video


def _cancel_interrupted(service: Service, video_id: str) -> None:
    errors = Console(stderr=True, highlight=False)
    try:
        service.delete(video_id)
    except NoSuchVideo:
        pass
    except ClientError as error:
        errors.print(Text(f"{error}\nnot cancelled; later: wan cancel {video_id}"))
        return
    errors.print(Text(f"{video_id}: cancelled"))


def image_reference(given: str) -> Json:
    """A URL goes as it is, a file as its bytes."""
    if given.startswith(("http://", "https://", "data:")):
        return {"image_url": given}
    try:
        data = Path(given).read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {given}: {error.strerror or error}") from error
    media_type = mimetypes.guess_type(given)[0] or "image/png"  # the service looks at the bytes
    return {"image_url": f"data:{media_type};base64,{base64.b64encode(data).decode()}"}


def field_of(text: str) -> tuple[str, Any]:
    """NAME=VALUE, whose value is JSON if it can be, and else the text itself."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise Refused(f"--field {text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
