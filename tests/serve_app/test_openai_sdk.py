"""The OpenAI SDK, unchanged, against the service on a real socket."""

import asyncio
import base64
import contextlib
import io

import openai
import pytest
from http_service import frames_of, http_service, on_loopback, picture, resolved, working
from openai import OpenAI

pytestmark = [
    pytest.mark.anyio,
    # The maker has retired its own service; the shape lives on.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KEY = "key-one"


@pytest.fixture
async def service(tmp_path):
    async with http_service(tmp_path, resolved(api_keys=KEY)) as service:
        yield service


@contextlib.asynccontextmanager
async def sdk(service, **kwargs):
    """A client, and a way to call it without blocking the service's loop."""
    async with on_loopback(service.app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, **kwargs)
        yield client.videos, asyncio.to_thread
        client.close()


async def test_create_and_poll_then_download(service):
    async with sdk(service) as (videos, call), working(service.store, service.artifacts):
        video = await call(
            videos.create_and_poll,
            prompt="a cat",
            model="wan-tiny",
            seconds="2",
            size="64x128",
            poll_interval_ms=20,
            extra_body={"num_inference_steps": 3, "guidance_scale": 2.5, "seed": 5},
        )
        assert (video.status, video.progress, video.error) == ("completed", 100, None)
        assert (video.seconds, video.size, video.model) == ("2", "64x128", "wan-tiny")
        assert (video.seed, video.guidance_scale_2) == (5, 2.5)
        content = await call(videos.download_content, video.id)
        assert frames_of(content.read()) == (17, 64, 128, 8.0)
        for variant in ("thumbnail", "spritesheet"):
            picture_ = await call(videos.download_content, video.id, variant=variant)
            assert picture_.read()[8:12] == b"WEBP"
        remixed = await call(videos.remix, video.id, prompt="a dog")
        assert (remixed.remixed_from_video_id, remixed.prompt) == (video.id, "a dog")
        assert (remixed.seed, remixed.size) == (5, "64x128")


async def test_the_pollers_own_interval_is_the_services(service):
    async with sdk(service) as (videos, call), working(service.store, service.artifacts):
        video = await call(
            videos.create_and_poll, prompt="a cat", extra_body={"num_inference_steps": 2}
        )
        assert video.status == "completed"


@pytest.mark.parametrize("form", ["upload", "reference"])
async def test_an_image_goes_as_upload_or_as_reference(service, form):
    png = picture(200, 100)
    if form == "upload":
        image = {"input_reference": ("cat.png", io.BytesIO(png), "image/png")}
    else:
        # This SDK refuses the object that its own types allow, but sends it from here.
        url = "data:image/png;base64," + base64.b64encode(png).decode()
        image = {"extra_body": {"input_reference": {"image_url": url}}}
    async with sdk(service) as (videos, call):
        video = await call(videos.create, prompt="a cat", model="wan-tiny-i2v", **image)
    job = await service.store.get(video.id)
    assert await service.artifacts.get(job.input_image) == png
    assert video.size == "176x80"


async def test_retrieve_list_with_pages_and_delete(service):
    async with sdk(service) as (videos, call):
        made = [(await call(videos.create, prompt=f"cat {n}")).id for n in range(5)]
        assert (await call(videos.retrieve, made[0])).status == "queued"
        listed = await call(lambda: [video.id for video in videos.list(limit=2)])
        assert listed == made[::-1]
        upwards = await call(lambda: [video.id for video in videos.list(limit=2, order="asc")])
        assert upwards == made
        deleted = await call(videos.delete, made[0])
        assert (deleted.id, deleted.deleted, deleted.object) == (made[0], True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            await call(videos.retrieve, made[0])


async def test_refusals_become_the_sdks_errors(service):
    async with sdk(service) as (videos, call):
        with pytest.raises(openai.BadRequestError) as refused:
            await call(videos.create, prompt="a cat", extra_body={"frames": 3})
        assert (refused.value.param, refused.value.code) == ("frames", "unknown_field")
        video = await call(videos.create, prompt="a cat")
        with pytest.raises(openai.ConflictError) as early:
            await call(videos.download_content, video.id)
        assert early.value.code == "video_not_ready"
    async with on_loopback(service.app) as url:
        stranger = OpenAI(base_url=f"{url}/v1", api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            await asyncio.to_thread(stranger.videos.retrieve, video.id)


async def test_a_full_queue_is_the_sdks_rate_limit(tmp_path):
    options = resolved(api_keys=KEY, jobs={"max_queued_jobs": 1})
    async with (
        http_service(tmp_path, options) as service,
        sdk(service, max_retries=0) as (videos, call),
    ):
        await call(videos.create, prompt="a cat")
        with pytest.raises(openai.RateLimitError) as full:
            await call(videos.create, prompt="a cat")
        assert full.value.code == "queue_full"


async def test_the_models_are_listed(service):
    async with on_loopback(service.app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY)
        models = await asyncio.to_thread(lambda: [model.id for model in client.models.list()])
    assert models == ["wan-tiny", "wan-tiny-i2v", "wan-tiny-ti2v"]
