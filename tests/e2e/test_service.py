"""The whole service through HTTP: every kind of job, overlap, cancellation, equality."""

import base64
import dataclasses
import io
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from wan_model.config import NEGATIVE_PROMPT
from wan_model.engine import VAEEngine
from wan_model.generate import Request, generate
from wan_model.media import read_mp4
from wan_model.params import VideoParams
from wan_model.weights import open_checkpoint

pytestmark = pytest.mark.timeout(600)
PROMPT = "a red circle moves"


def png(width=64, height=64) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def reference_mp4(folder, *, task: str, image: bytes | None = None, **given) -> bytes:
    """What one process makes of the same request, muxed by the same writer.

    With one thread, as the service's workers have here: another number sums in another order, and
    bytes are compared, not latents.
    """
    torch.set_num_threads(1)
    config = open_checkpoint(str(folder)).config
    given = {"width": 64, "height": 64, "num_frames": 9, "seed": 1, "num_steps": 6} | given
    params = VideoParams.for_model(config, **given)
    made = Request(checkpoint=str(folder), prompt=PROMPT, params=params, image=image)
    state = generate(made)
    vae = VAEEngine(checkpoint=str(folder), device="cpu")
    return vae.decode(params=dataclasses.asdict(params), state=state)["mp4"]


def test_the_log_says_what_the_environment_has_come_to(service):
    log = service.log.read_text(errors="replace")
    assert "API keys: 0; job table: sqlite; artifacts: /" in log
    assert "WAN_API_KEYS is not set" in log


@pytest.mark.parametrize("model", ["t2v", "i2v", "ti2v"])
def test_a_job_equals_the_reference_in_one_process(service, checkpoints, model):
    image = None if model == "t2v" else png()
    fields = {"model": model, "num_inference_steps": 6}
    if image is not None:
        uri = "data:image/png;base64," + base64.b64encode(image).decode()
        fields["input_reference"] = {"image_url": uri}
    video_id = service.submit(PROMPT, **fields)
    video = service.wait(video_id)
    assert video["status"] == "completed", video["error"]
    content = service.content(video_id)
    frames, fps = read_mp4(content)
    assert frames.shape == (9, 64, 64, 3)
    assert fps == video["fps"]
    # i2v has its own folder but t2v's text encoder and VAE: the same seed wrote the same weights.
    assert content == reference_mp4(checkpoints[model], task=model, image=image)


def test_twelve_jobs_overlap_and_each_equals_its_solo_result(service):
    seeds = [1, 2, 3]
    solo = {}
    for seed in seeds:
        video_id = service.submit(PROMPT, model="t2v", seed=seed, num_inference_steps=12)
        assert service.wait(video_id)["status"] == "completed"
        solo[seed] = service.content(video_id)
    assert solo[1] != solo[2]

    def submit(i):
        return service.submit(PROMPT, model="t2v", seed=seeds[i % 3], num_inference_steps=12)

    with ThreadPoolExecutor(12) as pool:
        ids = list(pool.map(submit, range(12)))
    videos = [service.wait(video_id, 240) for video_id in ids]
    assert [video["status"] for video in videos] == ["completed"] * 12
    for i, video_id in enumerate(ids):
        assert service.content(video_id) == solo[seeds[i % 3]]
    assert most_stages_at_once(videos) >= 3


def most_stages_at_once(videos) -> int:
    """Different stages busy with different jobs at one moment, from the jobs' own timings."""
    spans = [
        (t["started_at"], t["ended_at"], t["stage"], video["id"])
        for video in videos
        for t in video["timings"]
    ]
    most = 0
    for start, *_ in spans:
        busy = [(stage, job) for a, b, stage, job in spans if a <= start < b]
        most = max(most, min(len({s for s, _ in busy}), len({j for _, j in busy})))
    return most


def test_a_running_job_is_cancelled_within_a_step(service):
    video_id = service.submit(
        PROMPT, model="t2v", num_inference_steps=100, num_frames=33, size="384x384"
    )
    service.wait_for(video_id, lambda video: video["step"] >= 1)
    assert httpx.delete(f"{service.url}/v1/videos/{video_id}").status_code == 200
    assert httpx.get(f"{service.url}/v1/videos/{video_id}").status_code == 404
    # Were it still running, a job behind it would wait for its hundred steps of a second each.
    started = time.monotonic()
    after = service.wait(service.submit(PROMPT, model="t2v", num_inference_steps=2))
    assert after["status"] == "completed"
    assert time.monotonic() - started < 30


def test_progress_moves_forward_with_the_steps(service):
    video_id = service.submit(
        PROMPT, model="t2v", num_inference_steps=20, num_frames=65, size="128x128"
    )
    seen = []
    service.wait_for(
        video_id, lambda video: (seen.append(video["progress"]), video["status"] == "completed")[1]
    )
    assert seen == sorted(seen)
    assert len(set(seen)) >= 5  # the stages alone are three: at the start, decoding, done


def test_the_openai_sdk_makes_a_video(service):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    video = client.videos.create_and_poll(
        prompt=PROMPT, model="t2v", size="64x64",
        extra_body={"num_frames": 9, "num_inference_steps": 4, "seed": 3},
    )  # fmt: skip
    assert video.status == "completed"
    frames, _ = read_mp4(client.videos.download_content(video.id).read())
    assert frames.shape == (9, 64, 64, 3)
    assert client.videos.retrieve(video.id).size == "64x64"
    assert video.id in [each.id for each in client.videos.list(limit=5)]
    assert client.videos.delete(video.id).deleted


def test_a_broken_image_fails_its_job_with_a_sentence(service):
    answer = httpx.post(
        f"{service.url}/v1/videos",
        data={"prompt": PROMPT, "model": "i2v", "size": "64x64"},
        files={"input_reference": ("a.png", b"not an image", "image/png")},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input_reference"


def test_the_default_negative_prompt_is_the_models(service, checkpoints):
    spelled = service.submit(
        PROMPT, model="t2v", num_inference_steps=4, negative_prompt=NEGATIVE_PROMPT
    )
    default = service.submit(PROMPT, model="t2v", num_inference_steps=4)
    for video_id in (spelled, default):
        assert service.wait(video_id)["status"] == "completed"
    assert service.content(spelled) == service.content(default)
