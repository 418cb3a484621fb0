"""`make demo`: the service from start to stop, once, as a client sees it.

Owns a `serve run` process and talks to it over HTTP only. Knows nothing of what is inside.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
from tqdm import tqdm

from serve_app.client.screen import following
from serve_app.client.service import ClientError, Service
from serve_app.client.watch import watch

HOST, PORT = "127.0.0.1", 8000
URL = f"http://{HOST}:{PORT}"
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 600.0
PATIENCE_S = 30.0  # a service that is gone for longer does not come back by itself
STOP_TIMEOUT_S = 60.0
PROMPT = "a red circle moves to the right on a dark background"


class DemoFailed(Exception):
    """The message is one line for the person at the terminal."""


@contextlib.contextmanager
def service(config: Path, log: Path, environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """A running `serve run`, ready; stopped at the end, with everything it started. None for
    `environ` is this process's environment."""
    with socket.socket() as probe:
        if probe.connect_ex((HOST, PORT)) == 0:
            raise DemoFailed(f"port {PORT} is taken: stop what listens there (`make serve`?)")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=heed_sigint, env=environ,
        )  # fmt: skip
        try:
            _wait_until_ready(process, log)
            yield
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with tqdm(
        bar_format="starting the service: {elapsed} {postfix}",
        dynamic_ncols=True,
        disable=None,  # where nobody watches
    ) as bar:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise DemoFailed(f"the service ended while it started: see {log}")
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{URL}/ready", timeout=5)
                if answer.status_code == 200:
                    return
                if "error" in (body := _json(answer)):
                    bar.set_postfix_str(body["error"]["message"], refresh=False)
            bar.refresh()
            time.sleep(0.5)
    raise DemoFailed(f"the service was not ready after {START_TIMEOUT_S:.0f} s: see {log}")


def _json(answer: httpx.Response) -> dict:
    try:
        return answer.json()
    except ValueError:  # Serve's proxy answers in plain text until the app is there
        return {}


def heed_sigint() -> None:
    """In a new process: what a shell starts in the background ignores SIGINT, which stops it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """SIGINT lets `serve run` shut its deployments and its Ray down; it gets time for that."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def make_video(prompt: str, output: Path) -> float:
    """Submits, follows the progress, downloads. Returns the seconds it took."""
    started = time.monotonic()
    with Service(URL) as client:
        video_id = client.create({"prompt": prompt, "seed": 42})["id"]
        with following(video_id) as show:
            for progress in watch(client, video_id, patience_s=PATIENCE_S):
                if time.monotonic() - started > JOB_TIMEOUT_S:
                    raise DemoFailed(f"the video took longer than {JOB_TIMEOUT_S:.0f} s")
                show(progress)
        if (error := client.video(video_id)["error"]) is not None:
            raise DemoFailed(f"the video failed: {error['message']}")
        output.parent.mkdir(parents=True, exist_ok=True)
        client.download(video_id, output)
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serve_app.demo", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--config", type=Path, default=Path("configs/local_tiny.yaml"))
    parser.add_argument("--output", type=Path, default=Path("out/demo.mp4"))
    args = parser.parse_args()
    # A terminated demo must take its service along, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with service(args.config, args.output.parent / "serve.log"):
            print(f"prompt: {args.prompt}")
            seconds = make_video(args.prompt, args.output)
            print(f"{args.output} ({args.output.stat().st_size} bytes, {seconds:.1f} s)")
            print("stopping the service")
    except (DemoFailed, ClientError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
