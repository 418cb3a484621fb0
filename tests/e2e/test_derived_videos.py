"""Variants, remix, pictures, preview and branch through the running service, with the OpenAI SDK.

A branch is compared, byte by byte, with one process that switches the prompt at the boundary.
"""

import base64
import dataclasses
import http.client
import io
import json
import time

import httpx
import openai
import pytest
import torch
from PIL import Image
from test_service import png

from wan_model.engine import VAEEngine
from wan_model.generate import Placement, Request, denoise, encode
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.weights import open_checkpoint

pytestmark = [
    pytest.mark.timeout(600),
    # The maker has retired its own service; the shape lives on.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NUMBERS = {"num_frames": 9, "num_inference_steps": 6, "seed": 3}


@pytest.fixture
def sdk(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        yield client


def branched_mp4(folder, first: str, second: str, *, boundary_seed=None, **given) -> bytes:
    """One process: `first` for the high-noise half, `second` for the other."""
    torch.set_num_threads(1)
    config = open_checkpoint(str(folder)).config
    numbers = {"width": 64, "height": 64, "num_frames": 9, "num_steps": 6, "seed": 3}
    params = VideoParams.for_model(config, boundary_seed=boundary_seed, **numbers)
    state, boundary_step = None, build_schedule(params).boundary_step
    for prompt, to_step in ((first, boundary_step), (second, None)):
        made = Request(checkpoint=str(folder), prompt=prompt, params=params, **given)
        conditioning = encode(made, Placement(), config)
        state = denoise(made, Placement(), conditioning, state=state, to_step=to_step)
    vae = VAEEngine(checkpoint=str(folder), device="cpu")
    return vae.decode(params=dataclasses.asdict(params), state=state)["mp4"]


def test_variants_and_remix_with_the_openai_sdk(service, sdk):
    video = sdk.videos.create_and_poll(
        prompt="a red circle", model="t2v", size="64x64", extra_body=NUMBERS
    )
    assert video.status == "completed"
    for variant, size in (("thumbnail", (64, 64)), ("spritesheet", (192, 192))):
        content = sdk.videos.download_content(video.id, variant=variant).read()
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.size) == ("WEBP", size)
    remix = sdk.videos.remix(video.id, prompt="a blue square")
    assert remix.remixed_from_video_id == video.id
    assert service.wait(remix.id)["status"] == "completed"
    same = service.submit("a blue square", model="t2v", **NUMBERS)
    assert service.wait(same)["status"] == "completed"
    assert service.content(remix.id) == service.content(same)
    assert service.content(remix.id) != service.content(video.id)


@pytest.mark.parametrize("model", ["t2v", "i2v"])
def test_a_branch_equals_one_process_that_switches_at_the_boundary(service, checkpoints, model):
    image, fields = None, {}
    if model == "i2v":
        image = png()
        uri = "data:image/png;base64," + base64.b64encode(image).decode()
        fields["input_reference"] = {"image_url": uri}
    source = service.submit("a red circle", model=model, **NUMBERS, **fields)
    assert service.wait(source)["can_branch"]
    answer = httpx.post(
        f"{service.url}/v1/videos", json={"prompt": "a blue square", "branch_from": source}
    )
    assert answer.status_code == 200, answer.text
    # The branch has everything of its own.
    assert httpx.delete(f"{service.url}/v1/videos/{source}").status_code == 200
    branch = service.wait(answer.json()["id"])
    assert branch["status"] == "completed", branch["error"]
    steps = [t["from_step"] for t in branch["timings"] if t["to_step"]]
    assert min(steps) > 0, "it ran the high-noise half again"
    expected = branched_mp4(checkpoints[model], "a red circle", "a blue square", image=image)
    assert service.content(branch["id"]) == expected


def test_a_branch_with_another_seed_into_a_model_with_a_lora(service, checkpoints, style_lora):
    """One high-noise half, four videos: none of the others runs it again or is another's equal."""
    source = service.submit("a red circle", model="t2v", **NUMBERS)
    assert service.wait(source)["status"] == "completed"
    variants = [{"seed": 4}, {"model": "t2v-style"}, {"model": "t2v-style", "seed": 4}]
    branches = []
    for fields in variants:
        body = {"prompt": "a red circle", "branch_from": source} | fields
        answer = httpx.post(f"{service.url}/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        branches.append(answer.json()["id"])
    made = [service.wait(branch) for branch in branches]
    assert [video["status"] for video in made] == ["completed"] * 3
    assert all(t["from_step"] > 0 for video in made for t in video["timings"] if t["to_step"])
    assert [video["seed"] for video in made] == [4, 3, 4]
    for fields, branch in zip(variants, branches, strict=True):
        loras = [(str(style_lora), 0.5)] if "model" in fields else []
        expected = branched_mp4(
            checkpoints["t2v"], "a red circle", "a red circle",
            boundary_seed=fields.get("seed"), loras_low_noise=loras,
        )  # fmt: skip
        assert service.content(branch) == expected, fields
    assert len({service.content(video) for video in (source, *branches)}) == 4


LONG = {"model": "t2v", "num_inference_steps": 60, "num_frames": 33, "size": "128x128"}


@pytest.fixture(scope="module")
def long_video(service):
    """Not waited for."""
    return service.submit("a red circle", preview=True, **LONG)


def test_a_preview_is_there_before_the_video(service, long_video):
    video_id = long_video
    video = service.wait_for(video_id, lambda video: video["variants"])
    assert (video["status"], video["variants"]) == ("in_progress", ["preview"])
    url = f"{service.url}/v1/videos/{video_id}/content"
    preview = httpx.get(url, params={"variant": "preview"})
    assert preview.status_code == 200
    picture = Image.open(io.BytesIO(preview.content))
    assert (picture.format, picture.size, picture.is_animated) == ("WEBP", (128, 128), True)
    assert httpx.get(url).json()["error"]["code"] == "video_not_ready"
    done = service.wait(video_id)
    assert set(done["variants"]) == {"video", "thumbnail", "spritesheet", "preview"}


@pytest.mark.chaos
def test_a_branch_with_the_same_words_is_the_same_video_though_its_expert_is_killed(
    service, long_video
):
    assert service.wait(long_video)["status"] == "completed"
    answer = httpx.post(
        f"{service.url}/v1/videos", json={"prompt": "a red circle", "branch_from": long_video}
    )
    assert answer.status_code == 200, answer.text
    branch_id = answer.json()["id"]
    service.wait_for(branch_id, lambda video: video["step"] >= 40)
    service.kill_worker("LowNoiseExpert-t2v")
    branch = service.wait(branch_id, 180)
    assert branch["status"] == "completed", branch["error"]
    assert service.content(branch_id) == service.content(long_video)
    service.wait_until_ready()


def test_pictures_with_the_openai_sdk(service, sdk):
    answer = sdk.images.generate(
        prompt="a red circle", model="t2v", size="64x64", n=2, response_format="b64_json",
        extra_body={"num_inference_steps": 4, "seed": 3},
    )  # fmt: skip
    pictures = [Image.open(io.BytesIO(base64.b64decode(each.b64_json))) for each in answer.data]
    assert [(p.format, p.size) for p in pictures] == [("PNG", (64, 64))] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_hanging_up_on_a_picture_cancels_it(service):
    """What counts is the step at which it vanishes: a quick machine takes as many as a slow one."""
    body = {"prompt": "x", "model": "t2v", "num_inference_steps": 100, "size": "512x512"}
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
    deadline = time.monotonic() + 60
    while not any(job["step"] for job in picture_jobs(service)):
        assert time.monotonic() < deadline, "it does not run"
        time.sleep(0.1)
    connection.close()
    while jobs := picture_jobs(service):
        assert jobs[0]["step"] < 50, "it goes on"
        time.sleep(0.1)


def picture_jobs(service) -> list[dict]:
    videos = httpx.get(f"{service.url}/v1/videos").json()["data"]
    return [video for video in videos if video["num_frames"] == 1]
