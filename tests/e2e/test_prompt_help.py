"""Prompt extension and cinematic controls through the running service."""

import base64
import io
import time

import httpx
import pytest
from PIL import Image

pytestmark = pytest.mark.timeout(600)
FEW = {"num_inference_steps": 2}


def made(service, prompt, **fields):
    return service.wait(service.submit(prompt, **FEW, **fields))


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def test_an_extended_job_is_the_job_of_its_revised_prompt(service):
    shot = {"lens": "fisheye lens", "style": "anime"}
    extended = made(service, "a cat", model="t2v", prompt_extend=True, cinematography=shot)
    assert extended["status"] == "completed", extended["error"]
    assert extended["prompt"] == "a cat"
    assert extended["prompt_note"] is None
    revised = extended["revised_prompt"]
    assert revised not in (None, "a cat", "Anime, fisheye lens. a cat")
    assert extended["timings"][0]["stage"] == "PromptExtender"
    again = made(service, "a cat", model="t2v", prompt_extend=True, cinematography=shot)
    assert again["revised_prompt"] == revised, "the job's seed decides"
    spelled_out = made(service, revised, model="t2v")
    plain = made(service, "a cat", model="t2v")
    assert service.content(spelled_out["id"]) == service.content(extended["id"])
    assert service.content(plain["id"]) != service.content(extended["id"])


def test_with_an_image_the_vision_model_extends(service):
    videos = []
    for colour in ("red", "blue"):
        uri = "data:image/png;base64," + base64.b64encode(png(colour)).decode()
        video = made(
            service, "it moves", model="i2v", prompt_extend=True, input_reference={"image_url": uri}
        )
        assert video["status"] == "completed", video["error"]
        assert video["prompt_note"] is None
        videos.append(video["revised_prompt"])
    assert None not in videos and videos[0] != videos[1], "the picture was looked at"


def test_cinematography_is_composed_and_a_remix_keeps_it(service):
    listed = httpx.get(f"{service.url}/v1/cinematography").json()["fields"]
    lens = listed["lens"]["values"][0]
    body = {"prompt": "a cat", "model": "t2v", "size": "64x64", "num_frames": "9", "seed": "1",
            "num_inference_steps": "2", "cinematography[lens]": lens}  # fmt: skip
    answer = httpx.post(f"{service.url}/v1/videos", data=body, files={"unused": ("", b"")})
    assert answer.status_code == 200, answer.text
    video = service.wait(answer.json()["id"])
    composed = f"{lens.capitalize()}. a cat"
    assert (video["prompt"], video["revised_prompt"]) == ("a cat", composed)
    assert service.content(video["id"]) == service.content(
        made(service, composed, model="t2v")["id"]
    )
    remixed = httpx.post(f"{service.url}/v1/videos/{video['id']}/remix", json={"prompt": "a dog"})
    assert remixed.status_code == 200, remixed.text
    assert remixed.json()["revised_prompt"] == f"{lens.capitalize()}. a dog"
    wrong = {"prompt": "x", "cinematography": {"lens": "none"}}
    refused = httpx.post(f"{service.url}/v1/videos", json=wrong)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cinematography.lens"


@pytest.mark.chaos
def test_losing_the_language_models_process_costs_no_job(service):
    service.kill_worker("PromptExtender")
    video = made(service, "a cat", model="t2v", prompt_extend=True)
    assert video["status"] == "completed", video["error"]
    deadline = time.monotonic() + 120
    while video["revised_prompt"] is None:  # until its successor is there
        assert time.monotonic() < deadline, video["prompt_note"]
        video = made(service, "a cat", model="t2v", prompt_extend=True)
