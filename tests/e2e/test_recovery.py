"""Killing any process changes neither the outcome nor the latents of a job.

The mp4 is a function of the latents (test_service shows it equals the reference), so equal bytes
mean that nothing happened to the job.
"""

import pytest
from live_service import LiveService

pytestmark = pytest.mark.timeout(600)
PROMPT = "a red circle moves"
JOB = {"model": "t2v", "num_inference_steps": 60, "num_frames": 33, "size": "128x128"}


@pytest.fixture(scope="module")
def undisturbed(service) -> bytes:
    video_id = service.submit(PROMPT, **JOB)
    assert service.wait(video_id)["status"] == "completed"
    return service.content(video_id)


def start_job(service: LiveService, step: int) -> str:
    """A job that is in the middle of its denoising."""
    video_id = service.submit(PROMPT, **JOB)
    service.wait_for(video_id, lambda video: video["step"] >= step)
    return video_id


VICTIMS = [
    pytest.param("worker", "HighNoiseExpert-t2v", 10, id="worker-of-the-running-expert"),
    pytest.param("replica", "LowNoiseExpert-t2v", 50, id="replica-of-the-running-expert"),
    pytest.param("replica", "Pipeline", 20, id="pipeline"),
    pytest.param("replica", "Ingress", 20, id="ingress"),
    pytest.param("replica", "TextEncoder", 1, marks=pytest.mark.chaos, id="text-encoder"),
    pytest.param("worker", "VAE-t2v", 55, marks=pytest.mark.chaos, id="worker-of-the-vae"),
    pytest.param("replica", "HighNoiseExpert-t2v", 1, marks=pytest.mark.chaos, id="first-step"),
    pytest.param("worker", "LowNoiseExpert-t2v", 59, marks=pytest.mark.chaos, id="last-step"),
]


@pytest.mark.parametrize(("what", "stage", "step"), VICTIMS)
def test_a_killed_process_changes_nothing_for_the_job(service, undisturbed, what, stage, step):
    video_id = start_job(service, step)
    if what == "worker":
        service.kill_worker(stage)
    else:
        service.kill(stage)
    video = service.wait(video_id, 180)
    assert video["status"] == "completed", video["error"]
    assert service.content(video_id) == undisturbed
    service.wait_until_ready()
