"""A real `serve run` in processes of its own, and the means to kill any of them.

Everything a test does to it goes through HTTP or a signal, as from outside. The service runs
random tiny weights on a free port, with its own Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from one_start import one_start_at_a_time

from serve_app.demo import heed_sigint

START_TIMEOUT_S = 240.0
RAY_TOO_SLOW = "timed out during startup"
"""What Ray says when its node is not up in 30 s, a limit that cannot be set: on cores that others
want, its own agent's imports alone may take that long."""
STARTS = 3
POLL_S = 0.2
"""An answer costs three processes 10 ms each, on cores that others want."""


def on_cpu(**more: Any) -> dict[str, Any]:
    return {"num_gpus": 0, "num_cpus": 0.1, **more}


def service_args(models: dict[str, Path], **more: Any) -> dict[str, Any]:
    """`args` of build(): every stage on the CPU; short leases, so that recovery is quick."""
    return {
        "models": {
            name: {
                "checkpoint": str(folder),
                "high_noise_expert": on_cpu(segment_s=0.5),
                **({} if "ti2v" in name else {"low_noise_expert": on_cpu(segment_s=0.5)}),
            }
            for name, folder in models.items()
        },
        "text_encoder": on_cpu(),
        "vae": on_cpu(),
        "ingress": {"num_cpus": 0, "max_active": 500},
        "pipeline": {"num_cpus": 0, "max_active": 16},
        "jobs": {"lease_s": 4, "max_attempts": 4},
    } | more


class LiveService:
    """Start, stop, kill. `args` are those of a Serve config file."""

    def __init__(self, folder: Path, args: dict[str, Any], env: dict[str, str] | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.log = folder / "serve.log"
        self.config = folder / "serve.yaml"
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [
                {
                    "name": "wan",
                    "route_prefix": "/",
                    "import_path": "serve_app.app:build",
                    "args": args,
                }
            ],
        }
        self.config.write_text(yaml.safe_dump(config))
        self.env = os.environ | {"WAN_DATA_DIR": str(folder / "data"), "OMP_NUM_THREADS": "1"}
        self.env |= env or {}
        self.process: subprocess.Popen | None = None
        # One for all requests: each new one costs a TLS context, 15 ms of a core that others want.
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def start(self) -> None:
        with one_start_at_a_time():
            for start in range(STARTS):
                self._start_process()
                if self.wait_until_ready(try_again=start + 1 < STARTS):
                    return
                self.kill_everything()

    def _start_process(self) -> None:
        command = [
            sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local",
            str(self.config),
        ]  # fmt: skip
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=self.env,
                start_new_session=True, preexec_fn=heed_sigint,
            )  # fmt: skip

    def wait_until_ready(self, try_again: bool = False) -> bool:
        """False if Ray gave up on its own start and the caller will `try_again`."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                if try_again and RAY_TOO_SLOW in self.tail():
                    return False
                raise AssertionError(f"serve run ended: {self.tail()}")
            with contextlib.suppress(httpx.HTTPError):
                if self.http.get("/ready", timeout=5).status_code == 200:
                    return True
            time.sleep(0.5)
        raise AssertionError(f"not ready after {START_TIMEOUT_S} s: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        self.kill_everything()
        self.http.close()

    def kill_everything(self) -> None:
        """SIGKILL to every process of this service at once, Ray's own included."""
        doomed = self._family()
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(doomed, timeout=20)
        if self.process is not None:
            self.process.wait(20)

    def kill(self, stage: str) -> int:
        """SIGKILL to one replica of a stage. Returns its pid."""
        return self._kill(
            lambda process: f"ServeReplica:wan:{stage}" in " ".join(process.cmdline())
        )

    def kill_worker(self, stage: str) -> int:
        """SIGKILL to a worker (the process with the engine) of a stage's group."""
        return self._kill(lambda process: process.environ().get("WAN_STAGE") == stage)

    def _kill(self, is_it: Callable[[psutil.Process], bool]) -> int:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if is_it(process):
                    process.kill()
                    process.wait(10)
                    return process.pid
        raise AssertionError("no such process")

    def _family(self) -> list[psutil.Process]:
        """This service's processes: they carry its data folder in their environment."""
        mine = str(self.folder / "data")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("WAN_DATA_DIR") == mine:
                    found.append(process)
        return found

    # --- HTTP ---------------------------------------------------------------------------------

    def submit(self, prompt: str = "a red circle", **fields: Any) -> str:
        body = {"prompt": prompt, "size": "64x64", "num_frames": 9, "seed": 1} | fields
        answer = self._request("POST", "/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def get(self, video_id: str) -> dict[str, Any]:
        answer = self._request("GET", f"/v1/videos/{video_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, video_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The job when it has ended."""
        return self.wait_for(
            video_id, lambda video: video["status"] in ("completed", "failed"), timeout_s
        )

    def wait_for(self, video_id: str, condition, timeout_s: float = 120.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            video = self.get(video_id)
            if condition(video):
                return video
            time.sleep(POLL_S)
        raise AssertionError(f"still {video} after {timeout_s} s; log: {self.tail()}")

    def content(self, video_id: str) -> bytes:
        answer = self._request("GET", f"/v1/videos/{video_id}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """Retries while a killed ingress or proxy is being replaced, as a client must."""
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = self.http.request(method, path, **kwargs)
                if answer.status_code not in (500, 502, 503) or time.monotonic() > deadline:
                    return answer
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)


@contextlib.contextmanager
def live(folder: Path, args: dict[str, Any], **kwargs: Any) -> Iterator[LiveService]:
    service = LiveService(folder, args, **kwargs)
    try:
        service.start()
        yield service
    finally:
        service.stop()
