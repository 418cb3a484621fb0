"""Files and tensors: what is written is what was made, and the reference's pixels exactly."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from wan_model import media

WIDTH, HEIGHT, FPS = 64, 48, 8


def moving_frames(num_frames: int, *, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [np.stack((x * 3 + i, y * 4 - i, x + y + 2 * i), axis=-1) for i in range(num_frames)]
    ).astype(np.uint8)


def mp4_bytes(frames: np.ndarray, *, pieces: int = 1) -> bytes:
    buffer = BytesIO()
    _, height, width, _ = frames.shape
    with media.Mp4Writer(buffer, width=width, height=height, fps=FPS) as writer:
        for piece in np.array_split(frames, pieces):
            writer.write(piece)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------- video


def test_frames_are_clamped_and_truncated_not_rounded() -> None:
    values = torch.tensor(
        [-2.0, -1.0, 0.0, 0.999, 1.0, 3.0, 2 * 100.9 / 255 - 1, 2 * 7.4 / 255 - 1]
    )
    frames = values.view(1, 1, 1, -1).repeat(3, 1, 1, 1)
    assert media.frames_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255, 100, 7]


def test_uint8_frames_have_time_first_and_channels_last() -> None:
    frames = torch.linspace(-1, 1, 3 * 5 * 2 * 4).view(3, 5, 2, 4)
    out = media.frames_to_uint8(frames)
    assert out.shape == (5, 2, 4, 3) and out.dtype == torch.uint8 and out.is_contiguous()
    assert out[4, 1, 2, 0] == int((frames[0, 4, 1, 2] + 1) / 2 * 255)


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_an_mp4_has_the_frames_the_size_and_the_rate_it_was_given(num_frames: int) -> None:
    frames = moving_frames(num_frames)
    seen, fps = media.read_mp4(mp4_bytes(frames))
    assert seen.shape == frames.shape and seen.dtype == np.uint8 and fps == FPS
    # yuv420p halves the resolution of colour: compare the luminance.
    assert np.abs(seen.astype(float).mean(-1) - frames.astype(float).mean(-1)).mean() < 4


def test_flat_colours_survive_the_mp4() -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (12, 100, 200)])
    frames = np.broadcast_to(colours[:, None, None, :], (5, HEIGHT, WIDTH, 3)).astype(np.uint8)
    seen, _ = media.read_mp4(mp4_bytes(frames))
    assert np.abs(seen.astype(int) - frames).max() <= 4  # 8-bit YCbCr has fewer steps than RGB


def test_the_mp4_says_which_colours_it_means_and_is_playable_before_it_is_complete() -> None:
    content = mp4_bytes(moving_frames(3))
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(BytesIO(content)) as container:
        codec = container.streams.video[0].codec_context
        assert codec.name == "h264" and codec.pix_fmt == "yuv420p"
        assert codec.colorspace == codec.color_primaries == codec.color_trc == 1  # BT.709
        assert codec.color_range == 1


def test_equal_frames_give_the_same_bytes_however_they_are_written(tmp_path: Path) -> None:
    frames = moving_frames(33, width=320, height=192)
    expected = mp4_bytes(frames)
    for pieces in (1, 9, 33):
        assert mp4_bytes(frames, pieces=pieces) == expected
    with media.Mp4Writer(tmp_path / "a.mp4", width=320, height=192, fps=FPS) as writer:
        writer.write(torch.from_numpy(frames))
    assert (tmp_path / "a.mp4").read_bytes() == expected
    assert str(tmp_path).encode() not in expected


def test_the_writer_counts_its_frames() -> None:
    with media.Mp4Writer(BytesIO(), width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(moving_frames(1))
        writer.write(moving_frames(4))
        assert writer.num_frames == 5


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "half.mp4"
    with (
        pytest.raises(RuntimeError, match="decoder died"),
        media.Mp4Writer(path, width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        writer.write(moving_frames(40))
        raise RuntimeError("decoder died")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file may grow larger: writing then fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", ["buffer", "path"])
@pytest.mark.parametrize(
    ("num_frames", "num_bytes"),
    [(100, 40_000), (5, 40), (5, 1000)],
    ids=["frames", "head", "index"],
)
def test_a_full_disk_leaves_no_file_and_is_told(
    tmp_path: Path, monkeypatch, target: str, num_frames: int, num_bytes: int
) -> None:
    """Whether there is no room for the frames, for the file's head or for its index at the end."""
    monkeypatch.setattr(media.tempfile, "tempdir", str(tmp_path))
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), np.uint8)
    file = BytesIO() if target == "buffer" else tmp_path / "half.mp4"
    in_frames = False
    with (
        room_for(num_bytes),
        pytest.raises(OSError, match="File too large"),
        media.Mp4Writer(file, width=WIDTH, height=HEIGHT, fps=FPS) as writer,
    ):
        in_frames = True
        writer.write(noise)
        in_frames = False
    assert in_frames == (num_frames == 100)
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_leaves_no_temporary_file_behind(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(media.tempfile, "tempdir", str(tmp_path))
    mp4_bytes(moving_frames(2))
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_frames_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="at least one frame"),
        media.Mp4Writer(tmp_path / "none.mp4", width=WIDTH, height=HEIGHT, fps=FPS),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="63x48"):
        media.Mp4Writer(tmp_path / "odd.mp4", width=63, height=48, fps=FPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames",
    [moving_frames(1, width=32), moving_frames(1).astype(np.float32), moving_frames(1)[0]],
    ids=["other size", "floats", "no time axis"],
)
def test_frames_of_another_kind_are_refused(frames: np.ndarray) -> None:
    writer = media.Mp4Writer(BytesIO(), width=WIDTH, height=HEIGHT, fps=FPS)
    with pytest.raises(ValueError, match=r"uint8 \[f, 48, 64, 3\]"):
        writer.write(frames)
    writer.abort()


# ------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(("width", "height"), [(64, 48), (160, 96)])
def test_i2v_images_are_resized_bicubically_on_the_tensor(width: int, height: int) -> None:
    image = photo(100, 80)
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1
    expected = functional.interpolate(
        pixels[None], size=(height, width), mode="bicubic", align_corners=False, antialias=False
    )[0]
    prepared = media.prepare_image_i2v(image, width, height)
    assert prepared.shape == (3, height, width) and prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, expected, atol=1e-6, rtol=0)
    assert prepared.abs().max() > 1, "overshoot is kept, as in the reference"


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    image = photo(64, 48)
    exact = torch.tensor(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1
    for prepare in (media.prepare_image_i2v, media.prepare_image_ti2v):
        torch.testing.assert_close(prepare(image, 64, 48), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "covering", "box"),
    [
        ((200, 50), (256, 64), (80, 0, 176, 64)),  # wide: cut left and right
        ((50, 201), (96, 386), (0, 161, 96, 225)),  # tall: cut top and bottom
        ((121, 77), (101, 64), (2, 0, 98, 64)),  # 5 columns too many: 2 left, 3 right
    ],
)
def test_ti2v_images_are_scaled_to_cover_and_cut_in_the_middle(size, covering, box) -> None:
    image = photo(*size)
    cut = image.resize(covering, Image.Resampling.LANCZOS).crop(box)
    expected = torch.tensor(np.array(cut)).permute(2, 0, 1).float() / 255 * 2 - 1
    prepared = media.prepare_image_ti2v(image, 96, 64)
    assert prepared.shape == (3, 64, 96)
    torch.testing.assert_close(prepared, expected, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------- I2V conditioning


def test_unknown_frames_are_mid_grey_between_the_given_images() -> None:
    first, last = torch.full((3, 2, 4), -0.5), torch.full((3, 2, 4), 0.7)
    video = media.i2v_video(first, None, 9)
    assert video.shape == (3, 9, 2, 4)
    assert torch.equal(video[:, 0], first) and video[:, 1:].abs().max() == 0
    both = media.i2v_video(first, last, 9)
    assert torch.equal(both[:, 0], first) and torch.equal(both[:, 8], last)
    assert both[:, 1:8].abs().max() == 0


def test_a_last_image_needs_a_frame_of_its_own() -> None:
    image = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="at least 2 frames"):
        media.i2v_video(image, image, 1)


@pytest.mark.parametrize(
    ("num_frames", "has_last", "table"),
    [
        # one row per latent frame, one column per channel
        (1, False, ["1111"]),
        (9, False, ["1111", "0000", "0000"]),
        (9, True, ["1111", "0000", "0001"]),
        (5, True, ["1111", "0001"]),
    ],
)
def test_the_mask_has_a_channel_for_each_frame_of_a_latent_frame(
    num_frames: int, has_last: bool, table: list[str]
) -> None:
    mask = media.i2v_mask(num_frames, 2, 3, has_last)
    assert mask.shape == (4, len(table), 2, 3) and mask.dtype == torch.float32
    expected = torch.tensor([[float(digit) for digit in row] for row in table]).T
    assert torch.equal(mask, expected[:, :, None, None].expand_as(mask))


def test_a_mask_for_a_length_that_no_video_has_is_refused() -> None:
    with pytest.raises(ValueError, match="4n \\+ 1"):
        media.i2v_mask(8, 2, 3, False)
