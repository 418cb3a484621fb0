"""Thumbnails, spritesheets, previews: their sizes, their order, and which frames they show."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_model import pictures


def grey_frames(num_frames: int, *, width: int = 64, height: int = 48) -> np.ndarray:
    """Frame k is grey of brightness 2k."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    return frames + (2 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None]


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def test_a_thumbnail_is_a_small_webp_of_the_same_shape() -> None:
    picture = opened(pictures.thumbnail(grey_frames(1, width=640, height=360)[0]))
    assert picture.format == "WEBP" and picture.size == (320, 180)
    assert opened(pictures.thumbnail(grey_frames(1)[0])).size == (64, 48)


def test_a_png_holds_the_very_pixels(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    pictures.write_png(tmp_path / "frame.png", frame)
    assert np.array_equal(np.array(Image.open(tmp_path / "frame.png")), frame)
    assert np.array_equal(np.array(opened(pictures.png(frame[None]))), frame)


@pytest.mark.parametrize(
    ("num_frames", "num_columns", "num_rows"), [(1, 1, 1), (5, 3, 2), (9, 3, 3), (81, 5, 5)]
)
def test_a_spritesheet_shows_evenly_spaced_frames_in_reading_order(
    num_frames: int, num_columns: int, num_rows: int
) -> None:
    sheet = pictures.Spritesheet(num_frames)
    frames = grey_frames(num_frames, width=320, height=160)
    for start in range(0, num_frames, 4):  # as a decoder hands them over
        sheet.add(frames[start : start + 4])
    picture = opened(sheet.to_webp())
    assert picture.format == "WEBP" and picture.size == (160 * num_columns, 80 * num_rows)
    cells = [
        picture.convert("L").getpixel((160 * column + 80, 80 * row + 40))
        for row in range(num_rows)
        for column in range(num_columns)
    ][: min(num_frames, 25)]
    assert cells == sorted(cells)
    # Brightness is twice the frame's number; the codec may be off by a little.
    assert abs(cells[0]) <= 2 and abs(cells[-1] - 2 * (num_frames - 1)) <= 2
    jumps = [b - a for a, b in zip(cells, cells[1:], strict=False)]
    assert max(jumps, default=0) <= 2 * 4 + 2, "no more than four frames are left out between two"


def test_an_animation_is_as_long_as_the_video_with_few_small_frames() -> None:
    # Noise, since WebP lays frames together that look the same.
    noise = np.random.default_rng(0).integers(0, 256, (81, 48, 64, 3), np.uint8)
    frames = noise.repeat(10, axis=1).repeat(10, axis=2)
    picture = opened(pictures.animation(frames, fps=16))
    assert (picture.format, picture.size, picture.n_frames) == ("WEBP", (320, 240), 25)
    durations = []
    for k in range(picture.n_frames):
        picture.seek(k)
        picture.load()
        durations.append(picture.info["duration"])
    assert sum(durations) == pytest.approx(1000 * 81 / 16, abs=25)
    assert opened(pictures.animation(grey_frames(1), fps=16)).size == (64, 48)
