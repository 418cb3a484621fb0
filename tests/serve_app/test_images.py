"""Where a request's image may come from, and what counts as one."""

import asyncio
import base64
import zlib

import pytest
from http_service import on_loopback, picture
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from serve_app.images import ImageTooLarge, decode_data_uri, fetch_image, upright_size

PNG = picture(30, 20)


def uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_have_a_size(format):
    assert upright_size(picture(30, 20, format=format), max_pixels=600) == (30, 20)


def test_a_photo_taken_sideways_is_measured_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = picture(30, 20, format="JPEG", exif=exif)
    assert upright_size(photo, max_pixels=600) == (20, 30)


def test_a_sideways_photo_with_a_tag_of_an_odd_type_is_measured_too():
    tags = b"\1\x12\0\3\0\0\0\1\0\6\0\0" + b"\1\x1a\0\2\0\0\0\5\0\0\0\x26"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + tags + bytes(4) + b"72.0\0"  # XResolution as text
    photo = picture(8, 6, format="JPEG", exif=exif)
    assert upright_size(photo, max_pixels=600) == (6, 8)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(format):
    with pytest.raises(ValueError, match="JPEG, PNG or WebP"):
        upright_size(picture(30, 20, format=format), max_pixels=600)


def test_one_pixel_too_many_is_refused_by_the_header():
    header_only = PNG[:60]
    with pytest.raises(ValueError, match="30x20"):
        upright_size(header_only, max_pixels=599)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_is_refused(format):
    whole = picture(300, 200, format=format)
    with pytest.raises(ValueError, match="damaged|not a readable"):
        upright_size(whole[: len(whole) * 2 // 3], max_pixels=10**6)


def test_an_image_of_billions_of_pixels_is_refused_in_any_words():
    ihdr = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + len(ihdr).to_bytes(4) + b"IHDR" + ihdr
    bomb += zlib.crc32(b"IHDR" + ihdr).to_bytes(4) + PNG[33:]
    with pytest.raises(ValueError, match="pixels allowed"):
        upright_size(bomb, max_pixels=10**6)


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64,", "data:;base64,", "DATA:image/PNG;BASE64,", "data:a/b;c=d;base64,"],
)
def test_a_data_uri_holds_its_bytes(head):
    assert decode_data_uri(uri(PNG, head), max_bytes=len(PNG)) == PNG


def test_a_data_uri_may_have_line_ends():
    wrapped = "data:image/png;base64," + base64.encodebytes(PNG).decode()
    assert decode_data_uri(wrapped, max_bytes=len(PNG)) == PNG


@pytest.mark.parametrize(
    "wrong", ["data:image/png,abc", "data:image/png;base64,*", "data:", "cat.png", "data:;base64,A"]
)
def test_a_broken_data_uri_is_refused(wrong):
    with pytest.raises(ValueError):
        decode_data_uri(wrong, max_bytes=100)


@pytest.mark.parametrize("num_bytes", [101, 1000])
def test_a_data_uri_of_too_many_bytes_is_refused(num_bytes):
    with pytest.raises(ImageTooLarge):
        decode_data_uri(uri(bytes(num_bytes)), max_bytes=100)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "allowed_hosts"),
    [
        ("http://127.0.0.1:1/x", ("example.com",)),
        ("http://localhost:1/x", ("localhost",)),  # its address is private and not listed
        ("http://169.254.169.254/latest/meta-data", ("example.com",)),
        ("http://[::1]:1/x", ("127.0.0.1",)),
        ("http://example.com.evil.test/x", ("example.com",)),
        ("http://127.0.0.1@evil.test/x", ("127.0.0.1",)),
        ("http://user:word@127.0.0.1/x", ("127.0.0.1",)),
        ("ftp://127.0.0.1/x", ("127.0.0.1",)),
        ("file:///etc/passwd", ("127.0.0.1",)),
        ("http://", ("127.0.0.1",)),
        ("http://[", ("127.0.0.1",)),
        ("http://127.0.0.1:99999/x", ("127.0.0.1",)),
        ("http://2130706433/x", ("example.com",)),
        ("\0", ("127.0.0.1",)),
    ],
)
async def test_a_host_that_is_not_listed_is_not_asked(url, allowed_hosts):
    with pytest.raises(ValueError):
        await fetch_image(url, allowed_hosts=allowed_hosts, max_bytes=1000)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::", "fe80::1", "fec0::1",
     "::ffff:100.64.0.1", "::10.0.0.1", "::1"],
)  # fmt: skip
async def test_a_name_that_leads_to_a_private_address_is_not_asked(monkeypatch, address):
    async def resolved(*_):
        return [(None, None, None, "", (address, 443))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved)
    with pytest.raises(ValueError, match="images are not fetched from example.com"):
        await fetch_image("http://example.com/x", allowed_hosts=("example.com",), max_bytes=1000)


async def pictures(request):
    """A web server's answers by path."""
    match request.url.path:
        case "/cat.png":
            return Response(PNG)
        case "/host":
            return Response(request.headers["host"])
        case "/large":
            return Response(bytes(2000))
        case "/elsewhere":
            return RedirectResponse("/cat.png")
    return Response(status_code=404)


@pytest.fixture
async def host():
    async with on_loopback(Starlette(routes=[Route("/{path}", pictures)])) as url:
        yield url


@pytest.mark.anyio
@pytest.mark.parametrize("allowed", ["127.0.0.1", "127.0.0.0/8"])
async def test_a_listed_address_is_fetched(host, allowed):
    got = await fetch_image(f"{host}/cat.png", allowed_hosts=(allowed,), max_bytes=1000)
    assert got == PNG


@pytest.mark.anyio
async def test_a_listed_name_is_asked_by_its_name_at_the_address_that_was_checked(host):
    named = host.replace("127.0.0.1", "localhost")
    allowed = ("localhost", "127.0.0.1", "::1/128")
    try:
        got = await fetch_image(f"{named}/host", allowed_hosts=allowed, max_bytes=1000)
    except ValueError as error:  # where localhost is ::1 first, nothing listens there
        pytest.skip(str(error))
    assert got.decode() == named.removeprefix("http://")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "message"), [("elsewhere", "307"), ("nothing", "404"), ("large", "1000 bytes")]
)
async def test_redirects_failures_and_large_files_are_refused(host, path, message):
    with pytest.raises(ValueError, match=message):
        await fetch_image(f"{host}/{path}", allowed_hosts=("127.0.0.1",), max_bytes=1000)


@pytest.mark.anyio
async def test_a_host_that_does_not_answer_is_a_refusal_too():
    with pytest.raises(ValueError, match="could not be fetched from 127.0.0.1"):
        await fetch_image("http://127.0.0.1:1/x", allowed_hosts=("127.0.0.1",), max_bytes=1000)
