"""The HTTP edge over real stores: raw HTTP, every error in one shape."""

import asyncio
import base64
import contextlib
import json
import logging

import httpx
import pytest
from http_service import (
    CAT,
    StorageThatMayBeDown,
    assert_error,
    frames_of,
    http_service,
    is_there,
    make_video,
    on_loopback,
    picture,
    resolved,
    working,
)

from serve_app.ingress import byte_range
from serve_app.jobs import JobStore, StoreUnavailable

pytestmark = pytest.mark.anyio

UNKNOWN_ID = "video_" + "f" * 24


@pytest.fixture
async def guarded(tmp_path):
    async with http_service(tmp_path, resolved(api_keys="key-one,key-two")) as service:
        yield service


async def created(client, **fields) -> dict:
    answer = await client.post("/v1/videos", json=CAT | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def finished(client, video_id) -> dict:
    while True:
        video = (await client.get(f"/v1/videos/{video_id}")).json()
        if video["status"] in ("completed", "failed"):
            return video
        await asyncio.sleep(0.02)


async def finish_next(service) -> None:
    job = await service.store.claim("worker", lease_s=30, max_attempts=1)
    await make_video(service.store, service.artifacts, job)


# ------------------------------------------------------------------------------------ the way


async def test_a_prompt_becomes_a_video(service, client):
    video = await created(client, seconds="2", size="64x128")
    assert (video["status"], video["progress"], video["queue_position"]) == ("queued", 0, 0)
    async with working(service.store, service.artifacts):
        done = await finished(client, video["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert (done["seconds"], done["size"]) == ("2", "64x128")
    assert done["expires_at"] - done["completed_at"] == 3600
    content = await client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert frames_of(content.content) == (17, 64, 128, 8.0)


async def test_a_job_holds_everything_a_pipeline_needs(service, client):
    video = await created(
        client, priority="5", user="ann", negative_prompt="no dogs", guidance_scale_2="1.5"
    )
    job = await service.store.get(video["id"])
    assert (job.priority, job.user, job.negative_prompt) == (5, "ann", "no dogs")
    assert (job.model, job.num_steps, job.input_image, job.owner) == ("wan-tiny", 3, None, "")
    assert job.params["guidance_low_noise"] == 1.5
    assert job.predicted_s == pytest.approx(3 * 0.5 + 1.0)


async def test_an_absent_negative_prompt_is_the_models(service, client):
    video = await created(client)
    job = await service.store.get(video["id"])
    assert job.negative_prompt == video["negative_prompt"]
    assert job.negative_prompt.startswith("色调艳丽")


async def test_an_absent_seed_is_drawn_and_reported(service, client):
    seeds = {(await created(client))["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    job = (await service.store.list())[0]
    assert job.params["seed"] in seeds


async def test_the_first_model_serves_requests_that_name_none(client):
    assert (await created(client))["model"] == "wan-tiny"
    assert (await created(client, model="wan-tiny-ti2v"))["model"] == "wan-tiny-ti2v"


async def test_an_answer_to_a_post_says_queued_even_when_a_worker_was_quicker(service, client):
    async with working(service.store, service.artifacts):
        statuses = [(await created(client))["status"] for _ in range(10)]
    assert set(statuses) == {"queued"}


async def test_a_failed_job_is_a_200_that_says_why(service, client):
    video = await created(client)
    job = await service.store.claim("worker", lease_s=30, max_attempts=1)
    message = "the group of '/srv/x/y' died"
    await service.store.fail(job.id, job.attempt, code="too_many_attempts", message=message)
    answer = await client.get(f"/v1/videos/{video['id']}")
    assert answer.status_code == 200
    assert answer.json()["status"] == "failed"
    assert answer.json()["error"] == {
        "code": "too_many_attempts",
        "message": "the group of '(path)' died",
    }
    assert "openai-poll-after-ms" not in answer.headers
    content = await client.get(f"/v1/videos/{video['id']}/content")
    assert_error(content, 409, code="video_failed")


async def test_progress_stage_and_step_are_told(service, client):
    video = await created(client)
    job = await service.store.claim("worker", lease_s=30, max_attempts=1)
    await service.store.record_progress(
        job.id, job.attempt, stage="low_noise_expert", step=2, progress=60
    )
    answer = await client.get(f"/v1/videos/{video['id']}")
    got = answer.json()
    assert (got["status"], got["stage"], got["step"]) == ("in_progress", "low_noise_expert", 2)
    assert (got["progress"], got["queue_position"]) == (60, None)
    assert int(answer.headers["openai-poll-after-ms"]) == 500


async def test_the_queue_is_told_by_position_and_time(client):
    videos = [await created(client) for _ in range(3)]
    urgent = await created(client, priority=1)
    order = [urgent, *videos]
    answers = [(await client.get(f"/v1/videos/{video['id']}")).json() for video in order]
    assert [answer["queue_position"] for answer in answers] == [0, 1, 2, 3]
    assert [answer["seconds_left"] for answer in answers] == [2.5, 5.0, 7.5, 10.0]


# ---------------------------------------------------------------------------------- the limits


@pytest.fixture
async def narrow(tmp_path):
    options = resolved(images={"max_bytes": 2000, "max_pixels": 10_000})
    async with http_service(tmp_path, options) as service, service.client() as client:
        yield client


async def test_a_body_too_large_by_its_own_word_is_not_read(narrow):
    async def never():
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-type": "application/json", "content-length": str(2**30)}
    answer = await narrow.post("/v1/videos", content=never(), headers=headers)
    assert_error(answer, 413, code="body_too_large")


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b"])
async def test_a_body_too_large_without_a_word_is_read_to_the_limit_only(narrow, content_type):
    num_read = 0

    async def endless():
        nonlocal num_read
        yield b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n'
        while True:
            num_read += 1
            yield bytes(100_000)

    headers = {"content-type": content_type}
    answer = await narrow.post("/v1/videos", content=endless(), headers=headers)
    assert_error(answer, 413, code="body_too_large")
    assert num_read < 15  # 1 MiB and two small images


@pytest.mark.parametrize("way", ["upload", "data"])
async def test_an_image_of_too_many_bytes_is_refused(narrow, way):
    data = bytes(2001)
    fields = {"prompt": "a", "model": "wan-tiny-i2v"}
    if way == "upload":
        answer = await narrow.post("/v1/videos", data=fields, files={"input_reference": data})
    else:
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        answer = await narrow.post("/v1/videos", json=fields | {"input_reference": uri})
    assert_error(answer, 413, param="input_reference", code="invalid_image")


async def test_an_image_of_too_many_pixels_is_refused(narrow):
    bomb = picture(500, 500)
    assert len(bomb) <= 2000
    answer = await narrow.post(
        "/v1/videos", data={"prompt": "a", "model": "wan-tiny-i2v"}, files={"input_reference": bomb}
    )
    assert "500x500" in assert_error(answer, 400, param="input_reference")


@pytest.mark.parametrize("bound", [{"max_queued_jobs": 2}, {"max_queued_s": 6.0}])
async def test_a_full_queue_answers_429_and_when_to_return(tmp_path, bound):
    async with http_service(tmp_path, resolved(jobs=bound)) as service, service.client() as client:
        for _ in range(2):
            await created(client)
        answer = await client.post(
            "/v1/videos",
            data={"prompt": "a", "model": "wan-tiny-ti2v"},
            files={"input_reference": picture(64, 64)},
        )
        assert_error(answer, 429, code="queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert len(await service.store.list()) == 2
        # The refused job's image did not stay behind.
        assert [path for path in (tmp_path / "artifacts").rglob("[!.]*") if path.is_file()] == []


# ----------------------------------------------------------------------------------- idempotency


async def test_an_idempotency_key_makes_one_video(service, client):
    headers = {"Idempotency-Key": "once"}
    answers = [await client.post("/v1/videos", json=CAT, headers=headers) for _ in range(3)]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({answer.json()["seed"] for answer in answers}) == 1
    assert len(await service.store.list()) == 1


async def test_an_idempotency_key_with_an_image_leaves_one_image(tmp_path, service, client):
    for _ in range(2):
        answer = await client.post(
            "/v1/videos",
            data={"prompt": "a", "model": "wan-tiny-i2v"},
            files={"input_reference": picture(64, 64)},
            headers={"Idempotency-Key": "once"},
        )
        assert answer.status_code == 200
    files = [path for path in (tmp_path / "artifacts").rglob("[!.]*") if path.is_file()]
    assert [path.parent.name for path in files] == [answer.json()["id"]]


async def test_an_idempotency_key_for_another_request_is_a_conflict(client):
    headers = {"Idempotency-Key": "once"}
    await client.post("/v1/videos", json=CAT, headers=headers)
    answer = await client.post("/v1/videos", json=CAT | {"seed": 1}, headers=headers)
    assert_error(answer, 409, code="idempotency_key_reused")
    assert answer.headers["x-should-retry"] == "false"


async def test_an_idempotency_key_of_a_deleted_running_video_is_a_conflict(service, client):
    headers = {"Idempotency-Key": "once"}
    video = (await client.post("/v1/videos", json=CAT, headers=headers)).json()
    await service.store.claim("worker", lease_s=30, max_attempts=1)
    await client.delete(f"/v1/videos/{video['id']}")
    answer = await client.post("/v1/videos", json=CAT, headers=headers)
    assert_error(answer, 409, code="idempotency_key_reused")


@pytest.mark.parametrize("key", ["", "k" * 256, "with space"])
async def test_an_unusable_idempotency_key_is_refused(client, key):
    answer = await client.post("/v1/videos", json=CAT, headers={"Idempotency-Key": key})
    assert_error(answer, 400, param="idempotency-key")


# -------------------------------------------------------------------------------- list and delete


async def test_a_list_has_pages(client):
    ids = [(await created(client))["id"] for _ in range(5)]
    first = (await client.get("/v1/videos?limit=2")).json()
    assert [video["id"] for video in first["data"]] == ids[:2:-1]
    assert (first["first_id"], first["last_id"], first["has_more"]) == (ids[4], ids[3], True)
    rest = (await client.get(f"/v1/videos?limit=3&after={first['last_id']}")).json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1]
    assert rest["has_more"] is False
    upwards = (await client.get("/v1/videos?order=asc&limit=5")).json()
    assert [video["id"] for video in upwards["data"]] == ids
    assert upwards["has_more"] is False


async def test_an_empty_list_is_whole(client):
    assert (await client.get("/v1/videos")).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=x", "after"),
        ("after=%00", "after"),
        (f"after={UNKNOWN_ID}", "after"),
    ],
)
async def test_a_wrong_query_is_named(client, query, param):
    assert_error(await client.get(f"/v1/videos?{query}"), 400, param=param)


async def test_videos_being_cancelled_leave_no_hole_in_a_page(service, client):
    ids = [(await created(client))["id"] for _ in range(6)]
    for _ in range(4):  # the four oldest are running
        await service.store.claim("worker", lease_s=30, max_attempts=1)
    for video_id in ids[1:4]:
        await client.delete(f"/v1/videos/{video_id}")
    page = (await client.get("/v1/videos?order=asc&limit=2")).json()
    assert [video["id"] for video in page["data"]] == [ids[0], ids[4]]
    assert page["has_more"] is True


async def test_deleting_a_queued_video_forgets_it(tmp_path, service, client):
    answer = await client.post(
        "/v1/videos",
        data={"prompt": "a", "model": "wan-tiny-i2v"},
        files={"input_reference": picture(64, 64)},
    )
    video_id = answer.json()["id"]
    answer = await client.delete(f"/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
    assert_error(await client.get(f"/v1/videos/{video_id}"), 404, code="video_not_found")
    assert await service.store.get(video_id) is None
    assert [path for path in (tmp_path / "artifacts").rglob("[!.]*") if path.is_file()] == []


async def test_deleting_a_running_video_asks_its_worker_to_stop_and_hides_it(service, client):
    video_id = (await created(client))["id"]
    job = await service.store.claim("worker", lease_s=30, max_attempts=1)
    assert (await client.delete(f"/v1/videos/{video_id}")).status_code == 200
    assert (await service.store.get(video_id)).cancel_requested
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
        assert_error(await client.request(method, f"/v1/videos/{video_id}{path}"), 404)
    assert (await client.get("/v1/videos")).json()["data"] == []
    await service.store.cancelled(job.id, job.attempt)
    assert_error(await client.get(f"/v1/videos/{video_id}"), 404)


async def test_deleting_a_finished_video_deletes_its_files(service, client):
    video_id = (await created(client))["id"]
    await finish_next(service)
    assert (await client.delete(f"/v1/videos/{video_id}")).status_code == 200
    assert not await is_there(service.artifacts, f"{video_id}/video.mp4")
    assert_error(await client.delete(f"/v1/videos/{video_id}"), 404)


async def test_deleting_while_the_storage_is_down_can_be_repeated(tmp_path):
    artifacts = StorageThatMayBeDown(str(tmp_path / "artifacts"))
    async with http_service(tmp_path, artifacts=artifacts) as service, service.client() as client:
        video_id = (await created(client))["id"]
        await finish_next(service)
        artifacts.is_down = True
        assert_error(await client.delete(f"/v1/videos/{video_id}"), 503)
        artifacts.is_down = False
        assert (await client.delete(f"/v1/videos/{video_id}")).status_code == 200
        assert not (tmp_path / "artifacts" / video_id).exists()
        assert await service.store.list() == []


@pytest.mark.parametrize("video_id", [UNKNOWN_ID, "x", "video_", "%00", "..", "video_%2e%2e"])
async def test_an_unknown_video_is_a_404(client, video_id):
    for path in ("", "/content", "/events"):
        assert_error(await client.get(f"/v1/videos/{video_id}{path}"), 404)


# -------------------------------------------------------------------------------------- content


@pytest.fixture
async def video_id(service, client):
    video_id = (await created(client))["id"]
    await finish_next(service)
    return video_id


async def test_content_waits_for_the_end(client):
    queued = (await created(client))["id"]
    answer = await client.get(f"/v1/videos/{queued}/content")
    assert_error(answer, 409, code="video_not_ready")
    assert answer.headers["x-should-retry"] == "false"


async def test_content_has_variants(client, video_id):
    thumbnail = await client.get(f"/v1/videos/{video_id}/content?variant=thumbnail")
    assert thumbnail.headers["content-type"] == "image/webp"
    assert thumbnail.content[8:12] == b"WEBP"
    sheet = await client.get(f"/v1/videos/{video_id}/content?variant=spritesheet")
    assert sheet.content[8:12] == b"WEBP"
    answer = await client.get(f"/v1/videos/{video_id}/content?variant=preview")
    assert_error(answer, 404, code="content_gone")
    answer = await client.get(f"/v1/videos/{video_id}/content?variant=poster")
    assert_error(answer, 400, param="variant")


async def test_a_range_is_the_part_it_names(client, video_id):
    url = f"/v1/videos/{video_id}/content"
    whole = (await client.get(url)).content
    for header, part in (
        ("bytes=0-99", whole[:100]),
        ("bytes=100-", whole[100:]),
        ("bytes=-10", whole[-10:]),
        ("bytes=0-999999999", whole),
    ):
        answer = await client.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["content-length"] == str(len(part))
    start = len(whole) - 10
    answer = await client.get(url, headers={"Range": f"bytes={start}-"})
    expected = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
    assert answer.headers["content-range"] == expected


async def test_a_range_outside_the_file_is_a_416(client, video_id):
    url = f"/v1/videos/{video_id}/content"
    size = len((await client.get(url)).content)
    answer = await client.get(url, headers={"Range": f"bytes={size}-"})
    assert_error(answer, 416)
    assert answer.headers["content-range"] == f"bytes */{size}"


async def test_a_range_of_another_version_is_ignored(client, video_id):
    url = f"/v1/videos/{video_id}/content"
    etag = (await client.head(url)).headers["etag"]
    headers = {"Range": "bytes=0-9"}
    same = await client.get(url, headers=headers | {"If-Range": etag})
    other = await client.get(url, headers=headers | {"If-Range": '"another"'})
    assert (same.status_code, other.status_code) == (206, 200)


async def test_head_tells_the_size_without_the_bytes(client, video_id):
    url = f"/v1/videos/{video_id}/content"
    head, get = await client.head(url), await client.get(url)
    assert (head.status_code, head.content) == (200, b"")
    same = ("content-length", "content-type", "accept-ranges", "etag")
    assert [head.headers[name] for name in same] == [get.headers[name] for name in same]


async def test_content_that_is_gone_is_a_404(service, client, video_id):
    await service.artifacts.delete_prefix(video_id)
    assert_error(await client.get(f"/v1/videos/{video_id}/content"), 404, code="content_gone")


async def test_content_larger_than_one_chunk_is_whole(service, client, video_id):
    data = bytes(range(256)) * 10_000
    await service.artifacts.put(f"{video_id}/video.mp4", data)
    assert (await client.get(f"/v1/videos/{video_id}/content")).content == data


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=2-100", (2, 10)),
        ("bytes=5-2", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes=٣-٤", None),
    ],
)
async def test_ranges_are_read_as_rfc_9110_says(header, part):
    assert byte_range(header, 10) == part


# --------------------------------------------------------------------------------------- events


@contextlib.asynccontextmanager
async def watching(service, video_id):
    """The events of a video as they come, as (name, data), over a real socket."""
    async with (
        on_loopback(service.app) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", f"/v1/videos/{video_id}/events") as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield _events(answer)


async def _events(answer):
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@pytest.fixture
def quick_events(monkeypatch):
    monkeypatch.setattr("serve_app.ingress.EVENTS_POLL_S", 0.01)


async def test_events_tell_every_change_to_the_end(service, client, quick_events):
    await created(client)
    video = await created(client)
    store = service.store
    async with watching(service, video["id"]) as events:
        name, data = await anext(events)
        assert (name, data["queue_position"]) == ("video.queued", 1)
        await store.claim("worker", lease_s=30, max_attempts=1)
        name, data = await anext(events)
        assert (name, data["queue_position"]) == ("video.queued", 0)
        job = await store.claim("worker", lease_s=30, max_attempts=1)
        name, data = await anext(events)
        assert (name, data["step"], data["num_steps"]) == ("video.in_progress", 0, 3)
        for step in (1, 2, 3):
            await store.record_progress(
                job.id, job.attempt, stage="high_noise_expert", step=step, progress=step * 30
            )
            name, data = await anext(events)
            told = (data["stage"], data["step"], data["progress"])
            assert told == ("high_noise_expert", step, step * 30)
            assert data["seconds_left"] >= 0
        await store.complete(job.id, job.attempt, artifacts={})
        name, data = await anext(events)
        assert (name, data["status"], data["progress"]) == ("video.completed", "completed", 100)
        assert [event async for event in events] == []


async def test_events_of_a_finished_video_are_one(service, video_id):
    async with watching(service, video_id) as events:
        assert [name async for name, _ in events] == ["video.completed"]


async def test_events_end_when_the_video_is_deleted(service, client, quick_events):
    video_id = (await created(client))["id"]
    async with watching(service, video_id) as events:
        assert (await anext(events))[0] == "video.queued"
        await client.delete(f"/v1/videos/{video_id}")
        deleted = {"id": video_id, "object": "video.deleted", "deleted": True}
        assert [event async for event in events] == [("video.deleted", deleted)]


async def test_no_event_mixes_two_moments(service, client, quick_events, monkeypatch):
    """A job that is claimed after its row was read and before its place in the queue is."""
    video_id = (await created(client))["id"]
    queue_position = service.store.queue_position

    async def too_late(job_id):
        await service.store.claim("worker", lease_s=30, max_attempts=1)
        return await queue_position(job_id)

    monkeypatch.setattr(service.store, "queue_position", too_late)
    async with watching(service, video_id) as events:
        assert (await anext(events))[0] == "video.in_progress"


async def test_a_watcher_who_leaves_is_not_served_any_more(service, quick_events, monkeypatch):
    num_reads = 0
    get = service.store.get

    async def counting_get(*args, **kwargs):
        nonlocal num_reads
        num_reads += 1
        return await get(*args, **kwargs)

    monkeypatch.setattr(service.store, "get", counting_get)
    async with on_loopback(service.app) as url, httpx.AsyncClient(base_url=url) as client:
        video_id = (await created(client))["id"]
        async with client.stream("GET", f"/v1/videos/{video_id}/events") as answer:
            await anext(_events(answer))
        # The server may notice late on a busy machine; a poll is 0.01 s.
        async with asyncio.timeout(20):
            seen = 0
            while num_reads != seen:
                seen = num_reads
                await asyncio.sleep(0.3)
    assert num_reads > 0


# ------------------------------------------------------------------------------ keys and the rest


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer("key-one,key-two"),
        {"Authorization": "key-one"},
        {"Authorization": "Basic key-one"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
async def test_without_a_valid_key_v1_is_closed(guarded, headers):
    async with guarded.client() as client:
        for method, path in (
            ("POST", "/v1/videos"),
            ("GET", "/v1/videos"),
            ("GET", f"/v1/videos/{UNKNOWN_ID}"),
            ("DELETE", f"/v1/videos/{UNKNOWN_ID}"),
            ("GET", "/v1/models"),
            ("GET", "/v1/nowhere"),
            ("PUT", "/v1/videos"),
        ):
            answer = await client.request(method, path, headers=headers)
            assert_error(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_health_of_a_guarded_service_is_open(guarded):
    async with guarded.client() as client:
        for path in ("/health", "/ready", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 200


async def test_a_key_sees_only_its_own_videos(guarded):
    one, two = guarded.client(headers=bearer("key-one")), guarded.client(headers=bearer("key-two"))
    async with one as one, two as two:
        video_id = (await created(one))["id"]
        assert (await two.get("/v1/videos")).json()["data"] == []
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events")):
            answer = await two.request(method, f"/v1/videos/{video_id}{path}")
            assert_error(answer, 404)
        assert_error(await two.get(f"/v1/videos?after={video_id}"), 400, param="after")
        assert (await one.get(f"/v1/videos/{video_id}")).status_code == 200
        job = await guarded.store.get(video_id)
        assert job.owner and "key" not in job.owner


async def test_an_idempotency_key_belongs_to_its_api_key(guarded):
    ids = set()
    for key in ("key-one", "key-two"):
        headers = bearer(key) | {"Idempotency-Key": "once"}
        async with guarded.client(headers=headers) as client:
            ids.add((await created(client))["id"])
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("POST", "/", 405),
        ("GET", "/v1/videos/", 404),
        ("GET", "/v1/videos/a/b", 404),
        ("GET", "/v1/models/nobody", 404),
        ("POST", "/health", 405),
        ("PATCH", "/v1/videos", 405),
        ("TRACE", "/v1/videos", 405),
    ],
)
async def test_a_path_or_method_that_is_not_there_has_the_shape_too(client, method, path, status):
    answer = await client.request(method, path)
    param = "model" if "models" in path else None
    assert_error(answer, status, param=param)
    assert ("allow" in answer.headers) == (status == 405)


async def test_the_models_are_listed_in_their_order(client):
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == [
        "wan-tiny",
        "wan-tiny-i2v",
        "wan-tiny-ti2v",
    ]
    one = (await client.get("/v1/models/wan-tiny")).json()
    assert one == models["data"][0]
    assert (one["task"], one["size"], one["created"]) == ("t2v", "128x128", 1_700_000_000)


async def test_ready_waits_for_every_stage(service, client):
    assert (await client.get("/ready")).json() == {"status": "ready"}
    service.stages_run["VAE"] = False
    assert "waiting for VAE" in assert_error(await client.get("/ready"), 503, code="not_ready")
    assert (await client.get("/health")).json() == {"status": "ok"}
    service.stages_run.clear()
    assert_error(await client.get("/ready"), 503, code="not_ready")


class SilentStore(JobStore):
    """A database that does not answer."""

    def __init__(self) -> None:
        pass

    async def _fail(self, *args, **kwargs):
        raise StoreUnavailable("cannot open /srv/data/jobs.sqlite")

    get = list = submit = queue_size = _fail


async def test_a_store_that_does_not_answer_is_a_503(tmp_path):
    async with http_service(tmp_path, store=SilentStore()) as service, service.client() as client:
        for answer in (
            await client.get("/ready"),
            await client.get("/v1/videos"),
            await client.get(f"/v1/videos/{UNKNOWN_ID}"),
            await client.post("/v1/videos", json=CAT),
        ):
            assert_error(answer, 503, code="storage_unavailable")
            assert answer.headers["retry-after"] == "5"


async def test_an_unexpected_failure_is_a_500_with_the_logs_request_id(tmp_path, caplog):
    async def broken():
        raise RuntimeError("secret of /srv/data")

    async with http_service(tmp_path, readiness=broken) as service, service.client() as client:
        with caplog.at_level(logging.ERROR):
            answer = await client.get("/ready")
    message = assert_error(answer, 500, code="internal_error")
    request_id = answer.headers["x-request-id"]
    assert request_id in message and "secret" not in message
    assert request_id in caplog.text and "secret of /srv/data" in caplog.text


async def test_every_answer_has_its_own_request_id(client):
    ids = {(await client.get(path)).headers["x-request-id"] for path in ("/health", "/x", "/docs")}
    assert len(ids) == 3


async def test_a_proxys_request_id_is_the_one_that_is_logged(tmp_path, caplog):
    async def broken():
        raise RuntimeError("broken")

    async with http_service(tmp_path, readiness=broken) as service, service.client() as client:
        answer = await client.get("/ready", headers={"X-Request-ID": "from-the-proxy"})
        assert "from-the-proxy" in answer.json()["error"]["message"]
        assert "from-the-proxy" in caplog.text and "x-request-id" not in answer.headers
        forged = await client.get("/ready", headers={"X-Request-ID": "two words"})
        assert "two words" not in forged.text + caplog.text
