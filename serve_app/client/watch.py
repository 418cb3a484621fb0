"""Watching one video until it ends, over whatever connection there is.

Owns the change from the event stream to polling and back: a lost connection, a restart of the
service or a proxy that lets no streams through delay the news and end nothing. Knows nothing about
the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serve_app.client.service import Json, NoSuchVideo, Service, Unreachable, patiently

POLL_S = 1.0
MAX_EMPTY_STREAMS = 3  # then only polling: something on the way keeps the events
PATIENCE_S = 900.0  # a restart may load tens of gigabytes


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`progress` is 0..100; `queue_position` counts the videos before this one."""

    status: str
    stage: str | None
    step: int
    num_steps: int
    progress: int
    seconds_left: float | None
    queue_position: int | None

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")


def watch(
    service: Service,
    video_id: str,
    *,
    patience_s: float = PATIENCE_S,
    told: Callable[[Unreachable], None] = lambda error: None,
) -> Iterator[Progress]:
    """How the video goes; the last one has `ended`. What interrupts is told to `told`.

    Raises:
        Unreachable: nothing answered for `patience_s`.
        NoSuchVideo: it was deleted meanwhile, or never was.
    """
    num_empty_streams = 0
    while True:
        if num_empty_streams < MAX_EMPTY_STREAMS:
            num_empty_streams += 1
            try:
                for event in service.events(video_id):
                    num_empty_streams = 0
                    progress = _progress(event)
                    yield progress
                    if progress.ended:
                        return
            except Unreachable as error:
                told(error)
        progress = patiently(
            lambda: _progress(service.video(video_id)), patience_s=patience_s, told=told
        )
        yield progress
        if progress.ended:
            return
        time.sleep(POLL_S)


def _progress(told: Json) -> Progress:
    """Of an event's data, or of a video."""
    if told.get("deleted"):
        raise NoSuchVideo(f"{told['id']} was cancelled or deleted by somebody else")
    num_steps = told["num_steps"] if "num_steps" in told else told["num_inference_steps"]
    return Progress(
        status=told["status"],
        stage=told["stage"],
        step=told["step"],
        num_steps=num_steps,
        progress=told["progress"],
        seconds_left=told["seconds_left"],
        queue_position=told["queue_position"],
    )
