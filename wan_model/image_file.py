"""Uploaded image files -> upright RGB pictures, without trusting them.

Owns which formats are opened, the limit on pixels and the words for what is wrong. Pure Pillow: the
service checks an upload with the same lines that a worker opens it with. Knows no tensors, no HTTP.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image

MAX_PIXELS = 64 * 1024 * 1024
"""200 MB once decoded; twice what cameras make."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)
"""What pillow raises for files that are not what they claim to be."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations that are not upright -> what makes them so (ROTATE_90 is to the left)."""


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A JPEG, PNG or WebP file -> an upright RGB image, transparency laid on white.

    ValueError as `open_upright`.
    """
    image = open_upright(data, max_pixels=max_pixels)
    try:
        return _to_rgb(image)
    except _UNREADABLE as error:
        raise ValueError("the image file is damaged or cut short") from error


def open_upright(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image, decoded whole and turned as it is meant to be seen (EXIF), in its own colours.

    The size is read from the header and checked before any pixel is decoded. ValueError, in one
    sentence fit for the uploader, if it is not such a file, is damaged or is too large.
    """
    try:
        # Only these: other formats of pillow start programs or have no use here.
        image = Image.open(BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except _BOMB as error:
        raise ValueError(f"the image has more than the {max_pixels} pixels allowed") from error
    except _UNREADABLE as error:
        raise ValueError("the file is not a readable JPEG, PNG or WebP image") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"the image is {width}x{height}, more than the {max_pixels} pixels allowed"
        )
    try:
        image.load()
    except _UNREADABLE as error:
        raise ValueError("the image file is damaged or cut short") from error
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Not ImageOps.exif_transpose: it also writes all tags anew, and fails at one of an odd type.
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except (*_UNREADABLE, TypeError):  # whose EXIF is unreadable is taken as it lies
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: a plain conversion would clip instead of scale
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
