"""Frames out to mp4; images in, as tensors ready for the VAE.

Owns the video's codec settings, the reference's image preprocessing and the frames and mask that an
I2V model is shown. Knows nothing about networks, jobs, where a file is kept or how an uploaded one
is opened (image_file.py); which size a video gets is decided in `wan_model.params`.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from PIL import Image
from torch import Tensor
from torch.nn import functional

CRF = 10
"""The reference writes "quality 8" through imageio, which means int((1 - 8/10) * 51)."""

PRESET = "veryfast"
"""At this CRF as good as x264's own "medium", no larger, and 3 times quicker (README)."""

NUM_ENCODER_THREADS = 8
"""Fixed, because the count is part of the file: the machine's own would change the bytes."""

_BT709 = 1  # FFmpeg's number for this colour space, its primaries and its transfer curve
_VIDEO_RANGE = 1

# ------------------------------------------------------------------------------------- video


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Frames [3,F,H,W] in [-1,1] -> uint8 [F,H,W,3] on the same device.

    Clamps, maps to 0..255 and truncates, as the reference's `save_video` does; it does not round.
    """
    return ((frames.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


class Mp4Writer:
    """H.264 in mp4, one piece of the video at a time, so that encoding overlaps decoding.

        with Mp4Writer(target, width=832, height=480, fps=16) as writer:
            for frames in pieces:
                writer.write(frames)

    Equal frames give a byte-identical file. `target` is a path, or a BytesIO that is filled at the
    end. A block left by an exception leaves no file, nor does a disk that fills up (OSError).
    ValueError for an odd width or height: yuv420p needs even ones, and so has every size of the
    models.
    """

    def __init__(
        self, target: Path | str | BytesIO, *, width: int, height: int, fps: int, crf: int = CRF
    ) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"yuv420p needs an even width and height, not {width}x{height}")
        self.num_frames = 0
        self._shape = (height, width, 3)
        self._buffer = target if isinstance(target, BytesIO) else None
        self._path = _temporary_path(".mp4") if self._buffer is not None else Path(target)
        # "faststart" puts the index in front, by reading the file again: hence no BytesIO here.
        # "bitexact" leaves out the muxer's version.
        self._container = av.open(
            str(self._path), "w", options={"movflags": "+faststart", "fflags": "+bitexact"}
        )
        # "cpu-independent": on AVX-512 machines x264's macroblock tree differs from run to run.
        # "rc-lookahead": at x264's 40 frames, half of a video would be encoded only at the end.
        options = {"crf": str(crf), "preset": PRESET}
        options["x264-params"] = "cpu-independent=1:rc-lookahead=10"
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.thread_type, codec.thread_count = "FRAME", NUM_ENCODER_THREADS
        # Untagged, players guess the colour space by height: 480p and 720p would look different.
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _VIDEO_RANGE

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 [f,H,W,3]. ValueError for another type or size."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            wanted = ", ".join(map(str, self._shape))
            raise ValueError(
                f"frames must be uint8 [f, {wanted}], not {frames.dtype} {list(frames.shape)}"
            )
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts = self.num_frames
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1

    def close(self) -> None:
        """Finish the file. ValueError if nothing was written."""
        if not self.num_frames:
            self.abort()
            raise ValueError("a video needs at least one frame")
        try:
            self._container.mux(self._stream.encode())
            self._container.close()
            if self._buffer is not None:
                self._buffer.write(self._path.read_bytes())
        except BaseException:
            self.abort()
            raise
        if self._buffer is not None:
            self._path.unlink()

    def abort(self) -> None:
        """Give up: nothing of the video stays behind."""
        with suppress(av.FFmpegError):  # a full disk has no room for the index either
            self._container.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _temporary_path(suffix: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    return Path(name)


def read_mp4(source: Path | str | bytes) -> tuple[np.ndarray, float]:
    """A whole video file -> (uint8 [F,H,W,3], frames per second)."""
    with av.open(BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


# ------------------------------------------------------------------------------------ images


def prepare_image_i2v(image: Image.Image, width: int, height: int) -> Tensor:
    """RGB image -> [3,height,width] float32 about [-1,1], as `wan/image2video.py`.

    Bicubic on the tensor, straight to the size: no antialiasing, no crop, overshoot not clamped.
    """
    pixels_CHW = _to_tensor(image)
    size = (height, width)
    return functional.interpolate(pixels_CHW[None], size, mode="bicubic", align_corners=False)[0]


def prepare_image_ti2v(image: Image.Image, width: int, height: int) -> Tensor:
    """RGB image -> [3,height,width] float32 in [-1,1], as `wan/textimage2video.py`.

    Lanczos on the picture until it covers the size, then the middle is cut out.
    """
    scale = max(width / image.width, height / image.height)
    covering = (round(image.width * scale), round(image.height * scale))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return _to_tensor(image.crop((left, top, left + width, top + height)))


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [3,H,W] float32 in [-1,1]."""
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels_HWC.permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


# --------------------------------------------------------------------------- I2V conditioning

MASK_CHANNELS = 4
"""One for each frame of a latent frame: the temporal stride of both VAEs."""


def i2v_video(first: Tensor, last: Tensor | None, num_frames: int) -> Tensor:
    """Image(s) [3,H,W] in [-1,1] -> the video [3,F,H,W] to encode: unknown frames are 0, mid grey.

    ValueError if `last` is given but the video has no second frame to hold it.
    """
    if last is not None and num_frames < 2:
        raise ValueError(f"a first and a last image need at least 2 frames, not {num_frames}")
    video = first.new_zeros(3, num_frames, *first.shape[1:])
    video[:, 0] = first
    if last is not None:
        video[:, -1] = last
    return video


def i2v_mask(num_frames: int, latent_h: int, latent_w: int, has_last: bool) -> Tensor:
    """[4,T,h,w] float32, 1 where a frame is given.

    Channel k of latent frame j is frame 4(j-1)+1+k; latent frame 0 has frame 0 in all channels.
    ValueError unless `num_frames` is 4n + 1.
    """
    if (num_frames - 1) % MASK_CHANNELS:
        raise ValueError(f"num_frames must be {MASK_CHANNELS}n + 1, not {num_frames}")
    known_F = torch.zeros(num_frames)
    known_F[0] = 1
    if has_last:
        known_F[-1] = 1
    with_first_repeated = torch.cat((known_F[:1].expand(MASK_CHANNELS), known_F[1:]))
    known_4T = with_first_repeated.view(-1, MASK_CHANNELS).T
    return known_4T[:, :, None, None].repeat(1, 1, latent_h, latent_w)
