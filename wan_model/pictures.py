"""Pictures of a video for those who choose among many: thumbnail, spritesheet, preview; PNG.

Owns their sizes and codec settings. Knows nothing about latents, jobs or the mp4 (media.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

THUMBNAIL_SIDE = 320
SHEET_SIDE = 5
"""Frames in a row of a spritesheet, and rows: 25 of 160 pixels make it 800 wide."""
CELL_SIDE = 160
PREVIEW_FRAMES = 25


def thumbnail(frame: np.ndarray, *, max_side: int = THUMBNAIL_SIDE) -> bytes:
    """One frame uint8 [H,W,3] -> a WebP picture no larger than `max_side`, aspect kept."""
    return _webp(_small(frame, max_side))


def evenly(num_frames: int, num_wanted: int) -> list[int]:
    """Indices of at most `num_wanted` frames, evenly spaced, the first and the last among them."""
    num_wanted = min(num_frames, num_wanted)
    return [round(k * (num_frames - 1) / max(1, num_wanted - 1)) for k in range(num_wanted)]


class Spritesheet:
    """A grid of small frames, filled while a video of `num_frames` is decoded.

    At most 5 x 5 frames, evenly spaced, in reading order; as nearly square as their number allows,
    cells that stay empty are black.
    """

    def __init__(self, num_frames: int) -> None:
        self._wanted = set(evenly(num_frames, SHEET_SIDE**2))
        self._num_seen = 0
        self._cells: list[Image.Image] = []

    def add(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [f,H,W,3]."""
        for frame in frames:
            if self._num_seen in self._wanted:
                self._cells.append(_small(frame, CELL_SIDE))
            self._num_seen += 1

    def to_webp(self) -> bytes:
        """ValueError when nothing was added."""
        if not self._cells:
            raise ValueError("a spritesheet needs at least one frame")
        width, height = self._cells[0].size
        num_columns = math.ceil(math.sqrt(len(self._cells)))
        num_rows = math.ceil(len(self._cells) / num_columns)
        sheet = Image.new("RGB", (num_columns * width, num_rows * height))
        for k, cell in enumerate(self._cells):
            sheet.paste(cell, (k % num_columns * width, k // num_columns * height))
        return _webp(sheet)


def animation(frames: np.ndarray, *, fps: float, max_side: int = THUMBNAIL_SIDE) -> bytes:
    """Frames uint8 [F,H,W,3] -> an endless animated WebP of at most 25 of them, as long as the
    video, no larger than `max_side`."""
    chosen = [_small(frames[i], max_side) for i in evenly(len(frames), PREVIEW_FRAMES)]
    buffer = BytesIO()
    # method 0: a third of the time for a file a little larger, and the VAE waits meanwhile.
    chosen[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=chosen[1:],
        duration=round(1000 * len(frames) / fps / len(chosen)),
        loop=0,
        quality=60,
        method=0,
    )
    return buffer.getvalue()


def write_png(target: Path | str | BytesIO, frame: np.ndarray) -> None:
    """One frame uint8 [H,W,3] -> a PNG file, without loss."""
    Image.fromarray(np.asarray(frame)).save(target, format="PNG")


def png(frames: Sequence[np.ndarray] | np.ndarray) -> bytes:
    """The only frame of a video [1,H,W,3] -> a PNG file, without loss."""
    buffer = BytesIO()
    write_png(buffer, frames[0])
    return buffer.getvalue()


def _small(frame: np.ndarray, max_side: int) -> Image.Image:
    image = Image.fromarray(np.asarray(frame))
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return image


def _webp(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return buffer.getvalue()
