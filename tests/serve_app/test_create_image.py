"""Pictures: the OpenAI SDK's images over the service, and that nobody waits for nothing."""

import asyncio
import base64
import contextlib
import io

import httpx
import pytest
from http_service import http_service, on_loopback, picture, resolved, working
from openai import OpenAI
from PIL import Image
from test_ingress import assert_error

from serve_app.jobs import JobStore, StoreUnavailable

pytestmark = pytest.mark.anyio

CAT = {"prompt": "a cat", "num_inference_steps": 2, "size": "64x32"}
PATH = "/v1/images/generations"


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


@pytest.mark.parametrize("output_format", [None, "png", "webp", "jpeg"])
async def test_the_sdk_makes_pictures(service, output_format):
    more = {} if output_format is None else {"output_format": output_format}
    async with on_loopback(service.app) as url, working(service.store, service.artifacts):
        sdk = OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = await asyncio.to_thread(
            sdk.images.generate, prompt="a cat", size="64x32", n=2, response_format="b64_json",
            extra_body={"num_inference_steps": 2, "seed": 5}, **more,
        )  # fmt: skip
        sdk.close()
    assert [image.seed for image in answer.data] == [5, 6]
    assert (answer.size, answer.output_format) == ("64x32", output_format or "png")
    for image in answer.data:
        shown = opened(image.b64_json)
        assert (shown.format, shown.size) == ((output_format or "png").upper(), (64, 32))
    assert await service.store.list() == [], "nothing stays behind"


async def test_the_first_model_that_needs_no_image_makes_it(tmp_path):
    names = ("wan-tiny-i2v", "wan-tiny-ti2v")
    options = resolved(models={name: {"checkpoint": name} for name in names})
    async with http_service(tmp_path, options) as service, service.client() as client:
        asking = asyncio.create_task(client.post(PATH, json=CAT))
        while not (jobs := await service.store.list()):
            await asyncio.sleep(0.01)
        assert jobs[0].model == "wan-tiny-ti2v"
        assert jobs[0].params["num_frames"] == 1
        await client.delete(f"/v1/videos/{jobs[0].id}")
        assert_error(await asking, 500, code="cancelled")


async def test_a_model_that_animates_an_image_is_refused(client):
    answer = await client.post(PATH, json=CAT | {"model": "wan-tiny-i2v"})
    assert_error(answer, 400, param="model")
    answer = await client.post(PATH, json=CAT | {"model": "dall-e-3"})
    assert_error(answer, 400, param="model", code="model_not_found")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", "url"), ("n", 0), ("n", 11), ("size", "65x32"), ("size", "big"),
        ("num_frames", 5), ("output_format", "gif"), ("quality", "hd"), ("n", True),
        ("input_reference", "x"),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_named(client, field, value):
    assert_error(await client.post(PATH, json=CAT | {field: value}), 400, param=field)


async def test_a_failed_job_is_an_error(service, client):
    asking = asyncio.create_task(client.post(PATH, json=CAT))
    while not (job := await service.store.claim("w", lease_s=30, max_attempts=1)):
        await asyncio.sleep(0.01)
    await service.store.fail(job.id, job.attempt, code="internal_error", message="no luck")
    answer = await asking
    assert assert_error(answer, 500, code="internal_error") == "no luck"
    assert answer.headers["x-should-retry"] == "false"
    assert await service.store.list() == []


async def test_the_wait_is_bounded_and_the_job_cancelled(tmp_path):
    options = resolved(images={"max_wait_s": 0.3})
    async with http_service(tmp_path, options) as service, service.client() as client:
        answer = await client.post(PATH, json=CAT | {"n": 2})
        assert_error(answer, 503, code="image_timeout")
        assert await service.store.list() == []


async def test_a_full_queue_takes_all_pictures_or_none(tmp_path):
    options = resolved(jobs={"max_queued_jobs": 2})
    async with http_service(tmp_path, options) as service, service.client() as client:
        assert_error(await client.post(PATH, json=CAT | {"n": 3}), 429, code="queue_full")
        assert await service.store.list() == []


async def test_hanging_up_cancels_a_running_job(service):
    async with on_loopback(service.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            asking = asyncio.create_task(client.post(PATH, json=CAT))
            while not (job := await service.store.claim("w", lease_s=30, max_attempts=1)):
                await asyncio.sleep(0.01)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
        async with asyncio.timeout(10):
            while not (await service.store.get(job.id)).cancel_requested:
                await asyncio.sleep(0.02)


async def test_hanging_up_while_the_jobs_are_made_leaves_none(tmp_path):
    class SlowToAnswer(JobStore):
        async def submit(self, new, **limits):
            job = await super().submit(new, **limits)
            await asyncio.sleep(0.3)
            return job

    store = await SlowToAnswer.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    async with http_service(tmp_path, store=store) as service, service.client() as client:
        asking = asyncio.create_task(client.post(PATH, json=CAT | {"n": 2}))
        while len(await store.list()) < 1:
            await asyncio.sleep(0.01)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(10):
            while await store.list():
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert await store.list() == [], "none is made afterwards"
    await store.close()


async def test_a_job_that_cannot_be_forgotten_keeps_no_other_and_costs_no_picture(tmp_path):
    class FailsOnce(JobStore):
        kept = None

        async def request_cancel(self, job_id, **given):
            self.kept = self.kept or job_id
            if job_id == self.kept:
                raise StoreUnavailable("the job database does not answer")
            return await super().request_cancel(job_id, **given)

    store = await FailsOnce.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    async with http_service(tmp_path, store=store) as service, service.client() as client:
        async with working(store, service.artifacts):
            answer = await client.post(PATH, json=CAT | {"n": 3})
        assert len(answer.json()["data"]) == 3
        assert [job.id for job in await store.list()] == [store.kept]
    await store.close()


async def test_one_picture_is_the_one_that_was_made(service, client):
    async with working(service.store, service.artifacts):
        answer = await client.post(PATH, json=CAT | {"size": "auto"})
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == picture(128, 128)
