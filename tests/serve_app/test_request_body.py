"""Bodies of a request to create a video: what is read of them, and what is refused by name."""

import base64
import json

import httpx
import pytest
from http_service import CAT, assert_error, picture

pytestmark = pytest.mark.anyio


async def test_json_and_multipart_mean_the_same(service, client):
    fields = {"prompt": "a cat", "seed": "5", "num_frames": "9", "guidance_scale": "2.5"}
    as_json = await client.post("/v1/videos", json=fields)
    as_form = await client.post("/v1/videos", data=fields)
    as_multipart = await client.post(
        "/v1/videos", files=[(name, (None, value)) for name, value in fields.items()]
    )
    params = [
        (await service.store.get(answer.json()["id"])).params
        for answer in (as_json, as_form, as_multipart)
    ]
    assert params[0] == params[1] == params[2]
    assert (params[0]["seed"], params[0]["num_frames"]) == (5, 9)


def image_bodies() -> dict[str, dict]:
    png = picture(200, 100)
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    plain = {"prompt": "a cat", "model": "wan-tiny-i2v"}
    return {
        "json": {"json": plain | {"input_reference": {"image_url": uri}}},
        "json, bare": {"json": plain | {"input_reference": uri}},
        "upload": {"data": plain, "files": {"input_reference": ("c.png", png, "image/png")}},
        "brackets": {"files": [(k, (None, v)) for k, v in plain.items()]
                     + [("input_reference[image_url]", (None, uri))]},
        "text of an object": {"files": [(k, (None, v)) for k, v in plain.items()]
                     + [("input_reference", (None, json.dumps({"image_url": uri})))]},
    }  # fmt: skip


@pytest.mark.parametrize("way", image_bodies())
async def test_an_image_arrives_in_every_form(service, client, way):
    answer = await client.post("/v1/videos", **image_bodies()[way])
    assert answer.status_code == 200, answer.text
    job = await service.store.get(answer.json()["id"])
    assert job.input_image == f"{job.id}/input"
    assert await service.artifacts.get(job.input_image) == picture(200, 100)
    # The size is an area, the image's aspect decides the shape.
    assert answer.json()["size"] == "176x80"


async def test_first_and_last_image_are_both_kept(service, client):
    answer = await client.post(
        "/v1/videos",
        data={"prompt": "a cat", "model": "wan-tiny-i2v"},
        files={"input_reference": picture(100, 100), "last_image": picture(50, 50)},
    )
    job = await service.store.get(answer.json()["id"])
    assert await service.artifacts.get(job.input_image) == picture(100, 100)
    assert await service.artifacts.get(job.last_image) == picture(50, 50)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frames": 3}, "frames"),
        ({"num_frames": 16}, "num_frames"),
        ({"prompt": None}, "prompt"),
        ({"model": "sora-2"}, "model"),
        ({"model": "wan-tiny-i2v"}, "input_reference"),
        ({"input_reference": "https://example.com/cat.png"}, "input_reference"),
        ({"input_reference": "file:///etc/passwd"}, "input_reference"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference"),
        ({"seconds": 1, "num_frames": 17}, "seconds"),
    ],
)
async def test_a_wrong_field_is_named(service, client, fields, param):
    answer = await client.post("/v1/videos", json=CAT | fields)
    assert_error(answer, 400, param=param)
    assert await service.store.list() == []


async def test_an_image_for_a_model_that_takes_none_is_refused(client):
    answer = await client.post(
        "/v1/videos", data={"prompt": "a cat"}, files={"input_reference": picture(9, 1)}
    )
    assert "takes no image" in assert_error(answer, 400, param="input_reference")


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"picture": picture(8, 8)}, "picture"),
        ({"prompt": picture(8, 8)}, "prompt"),
        ({"input_reference": b"not an image"}, "input_reference"),
        ({"input_reference": b"GIF89a" + bytes(50)}, "input_reference"),
        ({"input_reference": picture(64, 64, format="JPEG")[:300]}, "input_reference"),
        ({"input_reference": picture(64, 64, format="TIFF")}, "input_reference"),
    ],
)
async def test_a_wrong_upload_is_named(service, client, files, param):
    answer = await client.post(
        "/v1/videos", data={"prompt": "a", "model": "wan-tiny-i2v"}, files=files
    )
    assert_error(answer, 400, param=param)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{"),
        ("application/json", b"[]"),
        ("application/json", b"\xff"),
        ("application/json", b'{"prompt": "\\ud800"}'),
        ("application/json", b"[" * 100_000),
        ("application/json", b'{"prompt": "a", "flow_shift": NaN}'),
        ("application/json", b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(client, content_type, body):
    headers = {"content-type": content_type}
    assert_error(await client.post("/v1/videos", content=body, headers=headers), 400)


def multipart_with_an_image() -> tuple[dict[str, str], bytes]:
    """Headers and body as httpx and the OpenAI SDK send them, the image last."""
    request = httpx.Request(
        "POST",
        "http://any",
        data={"prompt": "a cat", "model": "wan-tiny"},
        files={"input_reference": ("c.png", picture(200, 100), "image/png")},
    )
    return {"content-type": request.headers["content-type"]}, request.read()


@pytest.mark.parametrize("part", ["image", "image's headers", "boundary", "nothing"])
async def test_a_multipart_body_that_is_cut_short_is_refused(service, client, part):
    headers, body = multipart_with_an_image()
    closing = body.rindex(b"\r\n--")
    length = {
        "image": closing - 20,
        "image's headers": body.index(b"image/png"),
        "boundary": len(body.rstrip()) - 1,
        "nothing": 0,
    }[part]
    # wan-tiny takes no image: with its image dropped, this would be a request it can serve.
    answer = await client.post("/v1/videos", content=body[:length], headers=headers)
    assert "the form is cut short" in assert_error(answer, 400)
    assert await service.store.list() == []


@pytest.mark.parametrize("epilogue", [b"", b"\r\n", b"\r\n\r\n", b"\r\nan epilogue\r\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_multipart_body_may_end_in_any_way_after_its_closing_boundary(
    client, epilogue, size
):
    headers, body = multipart_with_an_image()
    body = body.rstrip().replace(b"wan-tiny", b"wan-tiny-i2v") + epilogue

    async def pieces():
        for start in range(0, len(body), size):
            yield body[start : start + size]

    answer = await client.post("/v1/videos", content=pieces(), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == "176x80"  # the image's shape


def text_form(way: str, prompt: bytes) -> dict:
    if way == "multipart":
        head = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        body, kind = head + prompt + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
    elif way == "multipart of a charset":
        return text_form("multipart", prompt) | {
            "headers": {"content-type": "multipart/form-data; boundary=b; charset=iso-8859-1"}
        }
    else:
        escaped = b"".join(b"%%%02x" % byte for byte in prompt)
        body = b"prompt=" + (escaped if way == "escaped" else prompt)
        kind = "application/x-www-form-urlencoded"
    return {"content": body, "headers": {"content-type": kind}}


TEXT_FORMS = ["multipart", "multipart of a charset", "escaped", "as curl -d sends it"]


@pytest.mark.parametrize("way", TEXT_FORMS)
@pytest.mark.parametrize("prompt", [b"\xff\xfe", "a café".encode("latin-1"), b"\xed\xa0\x80"])
async def test_text_of_a_form_that_is_not_utf_8_is_refused_by_name(service, client, way, prompt):
    answer = await client.post("/v1/videos", **text_form(way, prompt))
    assert "UTF-8" in assert_error(answer, 400, param="prompt")
    assert await service.store.list() == []


@pytest.mark.parametrize("way", TEXT_FORMS)
async def test_text_of_a_form_is_read_as_utf_8(client, way):
    answer = await client.post("/v1/videos", **text_form(way, "a café, 猫".encode()))
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt"] == "a café, 猫"


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}])
async def test_a_body_of_another_type_is_refused(client, headers):
    assert_error(await client.post("/v1/videos", content=b"a cat", headers=headers), 415)
