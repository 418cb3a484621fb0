"""Uploaded images: what is opened, how it is turned, and what is refused in which words."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from wan_model.image_file import open_image


def image_bytes(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares its size and holds next to nothing."""

    def block(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", pixels)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_the_three_formats_are_opened_as_rgb(format: str) -> None:
    image = open_image(image_bytes(photo(30, 20), format))
    assert image.mode == "RGB" and image.size == (30, 20)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    # Each of these would end as "damaged" had decoding been tried.
    for width, height in ((9000, 9000), (30_000, 30_000), (60_000, 60_000)):
        with pytest.raises(ValueError, match="more than the"):
            open_image(png_of_size(width, height))
    with pytest.raises(ValueError, match="30x20, more than the 599 pixels"):
        open_image(image_bytes(photo(30, 20), "PNG"), max_pixels=599)
    assert open_image(image_bytes(photo(30, 20), "PNG"), max_pixels=600).size == (30, 20)


@pytest.mark.parametrize(
    "content",
    [b"", b"just some words\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"],
    ids=["empty", "text", "eps", "only a signature"],
)
def test_a_file_that_is_no_image_is_named_so(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable JPEG, PNG or WebP image"):
        open_image(content)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_a_cut_off_image_is_an_error_of_one_sentence(format: str) -> None:
    content = image_bytes(photo(200, 100), format)
    with pytest.raises(ValueError, match="image") as caught:
        open_image(content[: len(content) // 2])
    assert "\n" not in str(caught.value)


def test_formats_other_than_the_three_are_refused() -> None:
    with pytest.raises(ValueError, match="JPEG, PNG or WebP"):
        open_image(image_bytes(photo(8, 8), "TIFF"))


def test_the_orientation_in_the_exif_data_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn it by 90 degrees clockwise
    content = image_bytes(photo(30, 20), "PNG", exif=exif)
    image = open_image(content)
    assert image.size == (20, 30)
    assert np.array_equal(np.array(image), np.rot90(np.array(photo(30, 20)), k=-1))


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    opened = open_image(image_bytes(image, "PNG"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    opened = open_image(image_bytes(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(np.array(opened)[..., 0], ramp >> 8)


def test_grey_and_palette_images_become_rgb() -> None:
    for mode in ("1", "L", "P", "LA", "CMYK"):
        format = "JPEG" if mode == "CMYK" else "PNG"
        image = open_image(image_bytes(photo(16, 16).convert(mode), format))
        assert image.mode == "RGB" and image.size == (16, 16)
