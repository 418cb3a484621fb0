"""Uploaded images: what is opened, how it is turned, and what is refused in which words."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


ORIENTATIONS = {
    0: ["ab", "cd", "ef"], 1: ["ab", "cd", "ef"], 2: ["ba", "dc", "fe"], 3: ["fe", "dc", "ba"],
    4: ["ef", "cd", "ab"], 5: ["ace", "bdf"], 6: ["eca", "fdb"], 7: ["fdb", "eca"],
    8: ["bdf", "ace"], 9: ["ab", "cd", "ef"],
}  # fmt: skip
"""What the picture ab, cd, ef is meant to look like, by the eight of EXIF; 0 and 9 are none."""


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_orientation_in_the_exif_data_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    letters = np.array([list("ab"), list("cd"), list("ef")]).view(np.uint32).astype(np.uint8)
    stored = Image.fromarray(letters, "L").convert("RGB")
    opened = open_image(image_bytes(stored, format, exif=exif, lossless=True))
    rows = np.array(opened)[..., 0]
    assert ["".join(map(chr, row)) for row in rows] == ORIENTATIONS[orientation]


def exif_with_text(tag: int, text: bytes, orientation: int = 6) -> bytes:
    """Two tags, the second stored as ASCII, whatever it ought to be."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack(">HHII", tag, 2, len(text), 8 + 2 + 2 * 12 + 4)
    directory = struct.pack(">H", 2) + entries + bytes(4)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + directory + text


@pytest.mark.parametrize("tag", [0x011A, 0x0128, 0x8769], ids=["XResolution", "unit", "pointer"])
def test_a_tag_of_an_odd_type_does_not_keep_a_photo_from_being_turned(tag: int) -> None:
    content = image_bytes(photo(8, 6), "JPEG", exif=exif_with_text(tag, b"72.0\0"))
    assert open_image(content).size == (6, 8)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0no directory", exif_with_text(0x011A, b"")[:20], b"Exif\0\0MM\0*"],
    ids=["empty", "no header", "cut short", "header alone"],
)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # pillow warns of such, and goes on
def test_a_picture_whose_exif_data_is_unreadable_is_taken_as_it_lies(
    format: str, exif: bytes
) -> None:
    assert open_image(image_bytes(photo(8, 6), format, exif=exif)).size == (8, 6)


def test_texts_of_a_png_that_are_named_like_exif_data_are_not_taken_for_it() -> None:
    for name in ("exif", "xmp", "Raw profile type exif"):
        texts = PngInfo()
        texts.add_itxt(name, "no exif data")
        assert open_image(image_bytes(photo(8, 6), "PNG", pnginfo=texts)).size == (8, 6)


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
