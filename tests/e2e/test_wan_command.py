"""The `wan` command makes a video of the whole service, and its webhook announces it."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import standardwebhooks
from webhook_receiver import SECRET

from wan_model.media import read_mp4

pytestmark = pytest.mark.timeout(600)
WAN = Path(sys.executable).with_name("wan")


def test_wan_generate_makes_a_video_and_a_signed_webhook_announces_it(
    service, webhook_receiver, tmp_path
):
    webhook_receiver.answers = [500]  # whichever event comes next arrives a second time
    seen = len(webhook_receiver.requests)
    output = tmp_path / "out.mp4"
    command = [
        WAN, "generate", "a red circle moves", "--model", "t2v", "--size", "64x64",
        "--num-frames", "9", "--steps", "4", "--seed", "3", "-o", output, "--json",
    ]  # fmt: skip
    made = subprocess.run(
        command, env=os.environ | {"WAN_URL": service.url}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    video = json.loads(made.stdout)
    assert (video["status"], video["seed"], video["output"]) == ("completed", 3, str(output))
    assert read_mp4(output.read_bytes())[0].shape == (9, 64, 64, 3)

    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline, "the webhook did not come, or not again after the 500"
        requests = webhook_receiver.requests[seen:]
        events = [standardwebhooks.Webhook(SECRET).verify(body, head) for head, body in requests]
        mine = [event for event in events if event["data"] == {"id": video["id"]}]
        again = [n for n in Counter(head["webhook-id"] for head, _ in requests).values() if n > 1]
        if mine and again:
            break
        time.sleep(0.1)
    assert {event["type"] for event in mine} == {"video.completed"}
