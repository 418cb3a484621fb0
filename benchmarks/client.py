"""The service as a load generator sees it: submit, wait, read; over HTTP only.

Owns retries: a 429 waits as long as Retry-After says, a broken connection is tried again. One
poller asks for all jobs in flight at once, so that measuring stays small beside what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from benchmarks.workload import Body

PAGE = 100
RETRY_S = 1.0
GONE_AFTER_SWEEPS = 3
_LATER = (502, 503, 504)
"""What a proxy answers while the replica behind it is being replaced."""

Video = dict[str, Any]


class ServiceFailed(Exception):
    """The service refused a request for good; the message is its own."""


class ServiceClient:
    """Use as `async with connect(url) as client`."""

    def __init__(self, http: httpx.AsyncClient, *, poll_s: float, patience_s: float) -> None:
        self._http = http
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._sweeps_without: dict[str, int] = {}
        self._poller = asyncio.create_task(self._poll())

    async def aclose(self) -> None:
        self._poller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._poller

    async def submit(self, body: Body, *, idempotency_key: str) -> tuple[Video, int]:
        """The accepted video and how many 429s came before. Raises ServiceFailed."""
        num_refusals = 0
        while True:
            answer = await self._request(
                "POST", "/v1/videos", json=body, headers={"Idempotency-Key": idempotency_key}
            )
            if answer.status_code != 429:
                return _checked(answer), num_refusals
            num_refusals += 1
            await asyncio.sleep(_retry_after_s(answer))

    async def ended(self, video_id: str) -> float:
        """When (unix seconds) the poller first saw the video completed or failed.

        Raises ServiceFailed when the service does not know it any more.
        """
        self._waiting[video_id] = end = asyncio.get_running_loop().create_future()
        try:
            return await end
        finally:
            self._waiting.pop(video_id, None)

    async def retrieve(self, video_id: str) -> Video:
        return _checked(await self._request("GET", f"/v1/videos/{video_id}"))

    async def _poll(self) -> None:
        while True:
            started = time.monotonic()
            if self._waiting:
                try:
                    await self._sweep()
                except Exception as error:  # every waiter hears of it, the poller itself has none
                    self._end_all(error)
            # At most half of the time goes to asking.
            await asyncio.sleep(max(self._poll_s, time.monotonic() - started))

    async def _sweep(self) -> None:
        """Pages from the newest video until every job in flight was seen."""
        missing = set(self._waiting)
        after: str | None = None
        while missing:
            query = {"limit": PAGE} | ({"after": after} if after else {})
            page = _checked(await self._request("GET", "/v1/videos", params=query))
            now = time.time()
            for video in page["data"]:
                missing.discard(video["id"])
                if video["status"] in ("completed", "failed") and video["id"] in self._waiting:
                    self._waiting.pop(video["id"]).set_result(now)
            after = page["last_id"]
            if not page["has_more"]:
                break
        # Pages shift while videos are deleted between them, so once is no proof.
        sweeps = {video_id: self._sweeps_without.get(video_id, 0) + 1 for video_id in missing}
        self._sweeps_without = sweeps
        for video_id in [v for v, count in sweeps.items() if count >= GONE_AFTER_SWEEPS]:
            gone = ServiceFailed(f"{video_id} is not among the service's videos any more")
            self._waiting.pop(video_id).set_exception(gone)

    def _end_all(self, error: Exception) -> None:
        for waiting in self._waiting.values():
            waiting.set_exception(error)
        self._waiting.clear()

    async def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """Tries again for `patience_s`; safe for a submit too, by its idempotency key."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                answer = await self._http.request(method, path, **kwargs)
                if answer.status_code not in _LATER or time.monotonic() > deadline:
                    return answer
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    where = self._http.base_url
                    raise ServiceFailed(f"nobody answers at {where}: {error!r}") from error
            await asyncio.sleep(RETRY_S)


@contextlib.asynccontextmanager
async def connect(
    url: str,
    *,
    api_key: str | None = None,
    poll_s: float = 0.1,
    patience_s: float = 60.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[ServiceClient]:
    """`poll_s` is also how exactly the end of a job is known. `patience_s`: how long a service
    that does not answer is waited for."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=30, limits=limits, transport=transport
    ) as http:
        client = ServiceClient(http, poll_s=poll_s, patience_s=patience_s)
        try:
            yield client
        finally:
            await client.aclose()


def _checked(answer: httpx.Response) -> Any:
    if answer.status_code == 200:
        return answer.json()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    raise ServiceFailed(f"{answer.request.method} {answer.url.path}: {message}")


def _retry_after_s(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):  # absent, or a date
        return RETRY_S
