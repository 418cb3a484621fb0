"""The HTTP edge as tests need it: real stores in a folder, and a worker that makes small mp4s.

The worker stands in for Pipeline and its stages; the store, the artifacts and the API are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image

from serve_app.artifacts import ArtifactMissing, Artifacts, ArtifactUnavailable
from serve_app.config import ServiceConfig
from serve_app.ingress import make_ingress_app
from serve_app.jobs import Job, JobStore
from serve_app.topology import ResolvedService
from wan_model.config import WAN_TINY, WAN_TINY_I2V, WAN_TINY_TI2V

WAN_CONFIGS = {"wan-tiny": WAN_TINY, "wan-tiny-i2v": WAN_TINY_I2V, "wan-tiny-ti2v": WAN_TINY_TI2V}
PROFILE = {"num_tokens": 320, "step_high_noise_s": 0.5, "decode_s": 1.0}
CAT = {"prompt": "a cat", "num_inference_steps": 3}


def resolved(
    *,
    api_keys: str = "",
    models: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    **options: Any,
) -> ResolvedService:
    """The three tiny models under `options` of ServiceConfig; `environ` is added to the rest."""
    models = models or {name: {"checkpoint": name, "profile": PROFILE} for name in WAN_CONFIGS}
    config = ServiceConfig.model_validate({"models": models, **options})
    wan_configs = {name: WAN_CONFIGS[name] for name in models}
    environ = {"WAN_API_KEYS": api_keys, "WAN_DATA_DIR": "/nowhere"} | (environ or {})
    return config.resolve(wan_configs, environ=environ, now=1_700_000_000)


@dataclass
class HttpService:
    """`stages_run` is what the stages would report."""

    app: FastAPI
    store: JobStore
    artifacts: Artifacts
    stages_run: dict[str, bool] = field(default_factory=lambda: {"TextEncoder": True})

    @contextlib.asynccontextmanager
    async def client(self, **kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://service", verify=False, **kwargs
        ) as client:
            yield client


class StorageThatMayBeDown(Artifacts):
    """A folder in which nothing can be deleted while `is_down`."""

    is_down = False

    async def delete_prefix(self, prefix: str) -> None:
        if self.is_down:
            raise ArtifactUnavailable(f"artifact {prefix!r} cannot be reached")
        await super().delete_prefix(prefix)


async def is_there(artifacts: Artifacts, key: str) -> bool:
    try:
        await artifacts.size(key)
    except ArtifactMissing:
        return False
    return True


@contextlib.asynccontextmanager
async def http_service(folder: Path, service: ResolvedService | None = None, **kwargs: Any):
    """`kwargs` replace arguments of make_ingress_app."""
    service = service or resolved()
    store = await JobStore.open(f"sqlite:///{folder / 'jobs.sqlite'}", retention_s=3600)
    artifacts = Artifacts(str(folder / "artifacts"))
    stages_run = {"TextEncoder": True, "VAE": True}

    async def readiness() -> dict[str, bool]:
        return stages_run

    arguments = {
        "store": store,
        "artifacts": artifacts,
        "models": service.served_models,
        "settings": service.http,
        "readiness": readiness,
    }
    try:
        app = make_ingress_app(**arguments | kwargs)
        yield HttpService(app=app, store=store, artifacts=artifacts, stages_run=stages_run)
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def on_loopback(app: FastAPI) -> AsyncIterator[str]:
    """The URL of a real server, for clients that are not ASGI's."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


@contextlib.contextmanager
def in_a_thread(
    folder: Path, service: ResolvedService | None = None, *, step_s: float = 0.0
) -> Iterator[str]:
    """The URL of a working service on loopback, for tests that are not coroutines."""
    started, stop, urls = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with (
            http_service(folder, service) as running,
            working(running.store, running.artifacts, step_s=step_s),
            on_loopback(running.app) as url,
        ):
            urls.append(url)
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(timeout=60)
        yield urls[0]
    finally:
        stop.set()
        thread.join()


@contextlib.asynccontextmanager
async def working(store: JobStore, artifacts: Artifacts, *, step_s: float = 0.0):
    """A worker that makes every job's video until the block ends."""
    task = asyncio.create_task(_work(store, artifacts, step_s))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _work(store: JobStore, artifacts: Artifacts, step_s: float) -> None:
    while True:
        job = await store.claim("worker", lease_s=30, max_attempts=1)
        if job is None:
            await asyncio.sleep(0.02)
        else:
            await make_video(store, artifacts, job, step_s=step_s)


async def make_video(
    store: JobStore, artifacts: Artifacts, job: Job, *, step_s: float = 0.0
) -> None:
    # Of a thousand steps it reports fifty: each is a write to the database.
    for step in range(1, job.num_steps + 1, max(1, job.num_steps // 50)):
        renewal = await store.record_progress(
            job.id,
            job.attempt,
            stage="high_noise_expert",
            step=step,
            progress=90 * step // job.num_steps,
        )
        if renewal.cancel_requested:
            await store.cancelled(job.id, job.attempt)
            return
        await asyncio.sleep(step_s)
    keys = {"video": f"{job.id}/video.mp4"}
    await artifacts.put(keys["video"], mp4(job.params))
    for name in ("thumbnail", "spritesheet"):
        keys[name] = f"{job.id}/{name}.webp"
        await artifacts.put(keys[name], picture(32, 32, format="WEBP"))
    if job.params["num_frames"] == 1:
        keys["image"] = f"{job.id}/image.png"
        size = job.params["width"], job.params["height"]
        await artifacts.put(keys["image"], picture(*size))
    await store.complete(job.id, job.attempt, artifacts=keys)


def mp4(params: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=params["fps"])
        stream.width, stream.height = params["width"], params["height"]
        stream.pix_fmt = "yuv420p"
        for index in range(params["num_frames"]):
            pixels = np.full((stream.height, stream.width, 3), index * 7 % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def frames_of(data: bytes) -> tuple[int, int, int, float]:
    """(frames, width, height, fps) of an mp4, by decoding it."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        num_frames = sum(1 for _ in container.decode(stream))
        return num_frames, stream.width, stream.height, float(stream.average_rate)


def picture(width: int, height: int, *, format: str = "PNG", **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "orange").save(buffer, format=format, **kwargs)
    return buffer.getvalue()


def assert_error(answer: httpx.Response, status: int, *, param=None, code=None) -> str:
    """The message of an answer that has the one shape of errors."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code
    assert "/srv" not in answer.text and "/tmp" not in answer.text
    return body["error"]["message"]
