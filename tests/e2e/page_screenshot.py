"""The README's picture of the web page: `python tests/e2e/page_screenshot.py`, with `make serve`.

Makes a few videos on the running service, so that there is something to see, and takes the picture
while another one is at work.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import httpx
from browser import chromium

PROMPTS = (
    "a yellow triangle moves up on a dark background",
    "a green square moves to the left on a white background",
    "a blue circle moves down on a white background",
    "a red circle moves to the right on a dark background",
)
OUTPUT = Path("serve_app/page/screenshot.png")
VIEWPORT = {"width": 1280, "height": 860}
TIMEOUT_S = 300


def submit(client: httpx.Client, prompt: str, **fields: object) -> str:
    answer = client.post("/v1/videos", json={"prompt": prompt, "seed": 42, **fields})
    answer.raise_for_status()
    return answer.json()["id"]


def wait_until(client: httpx.Client, video_id: str, status: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while client.get(f"/v1/videos/{video_id}").json()["status"] != status:
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {video_id} was not {status} within {TIMEOUT_S} s")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    with httpx.Client(base_url=args.url, timeout=30) as client:
        for video_id in [submit(client, prompt) for prompt in PROMPTS[:-1]]:
            wait_until(client, video_id, "completed")
        running = submit(client, PROMPTS[-1], num_inference_steps=100, preview=True)
        wait_until(client, running, "in_progress")
        with chromium() as browser:
            page = browser.new_page(viewport=VIEWPORT)
            page.goto(args.url)
            page.get_by_label("Prompt", exact=True).fill("a red square moves up")
            page.get_by_alt_text("Preview of the unfinished video").wait_for()
            page.locator(".poster:not([hidden])").nth(len(PROMPTS) - 2).wait_for()
            page.screenshot(path=args.output)
        client.delete(f"/v1/videos/{running}")
    print(f"{args.output} ({args.output.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
