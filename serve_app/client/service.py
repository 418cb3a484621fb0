"""A running service over HTTP: its routes as methods, its refusals as errors with an exit code.

Owns what an answer means (ours, a proxy's, none at all) and the download. Knows nothing about the
terminal, and nothing of what is inside the service: plain httpx, so that `wan` starts at once.

    ClientError               exit code
     ├── VideoFailed          1   the video failed, or is not in a state for this
     ├── Refused              2   the request is wrong
     ├── Unreachable          3   no service answers; worth another try
     │    └── NobodyThere         ... the connection itself was refused
     ├── KeyRefused           4
     ├── NoSuchVideo          5
     └── QueueFull            6
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
Json = dict[str, Any]

ANSWER_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
STREAM_SILENCE_S = 60.0  # the service sends a comment every 15 s
SUBMIT_PATIENCE_S = 30.0
FIRST_RETRY_WAIT_S, LONGEST_RETRY_WAIT_S = 0.25, 5.0
PAGE_SIZE = 100


class ClientError(Exception):
    """One line for the person at the terminal: what was found, and what to do about it."""

    exit_code = 1

    def __init__(self, found: str, advice: str = "") -> None:
        super().__init__(f"{found}: {advice}" if advice else found)
        self.found = found
        self.advice = advice


class VideoFailed(ClientError):
    pass


class Refused(ClientError):
    exit_code = 2


class Unreachable(ClientError):
    exit_code = 3


class NobodyThere(Unreachable):
    pass


class KeyRefused(ClientError):
    exit_code = 4


class NoSuchVideo(ClientError):
    exit_code = 5


class QueueFull(ClientError):
    exit_code = 6


def patiently(
    call: Callable[[], T],
    *,
    patience_s: float,
    told: Callable[[Unreachable], None] = lambda error: None,
    if_somebody_is_there: bool = False,
) -> T:
    """`call` again and again for `patience_s` while it raises Unreachable, each told to `told`.

    `if_somebody_is_there`: not when the very first connection is refused, as to a mistyped URL.
    """
    deadline, wait_s = time.monotonic() + patience_s, FIRST_RETRY_WAIT_S
    is_first = True
    while True:
        try:
            return call()
        except Unreachable as error:
            nobody = is_first and if_somebody_is_there and isinstance(error, NobodyThere)
            if nobody or time.monotonic() + wait_s > deadline:
                raise
            told(error)
        is_first = False
        time.sleep(wait_s)
        wait_s = min(LONGEST_RETRY_WAIT_S, 2 * wait_s)


class Service:
    """`url` is the service's root. Every method may raise ClientError."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise KeyRefused("the API key has characters that no key has", "set WAN_API_KEY")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, ValueError) as error:
            raise Refused(f"{url} is not a URL: {error}") from error

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def health(self) -> None:
        self._json("GET", "/health")

    def ready(self) -> None:
        """Raises Unreachable with the stages that wait."""
        self._json("GET", "/ready")

    def models(self) -> Json:
        return self._json("GET", "/v1/models")

    def create(self, fields: Json) -> Json:
        """Submit once, even if the answer is lost on the way and asked for again."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return patiently(
            lambda: self._json("POST", "/v1/videos", json=fields, headers=headers),
            patience_s=SUBMIT_PATIENCE_S,
            if_somebody_is_there=True,
        )

    def video(self, video_id: str) -> Json:
        return self._json("GET", _path(video_id))

    def videos(self, limit: int) -> list[Json]:
        """The newest `limit` videos, newest first."""
        found: list[Json] = []
        page: Json = {"has_more": True, "last_id": None}
        while page["has_more"] and len(found) < limit:
            query = {"limit": min(PAGE_SIZE, limit - len(found))}
            if page["last_id"] is not None:
                query["after"] = page["last_id"]
            page = self._json("GET", "/v1/videos", params=query)
            found += page["data"]
        return found

    def delete(self, video_id: str) -> None:
        """Stops a running video, and forgets it."""
        self._json("DELETE", _path(video_id))

    def events(self, video_id: str) -> Iterator[Json]:
        """The data of the server-sent events, until the video ends or the connection does."""
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        request = self._client.build_request("GET", f"{_path(video_id)}/events", timeout=timeout)
        answer = self._send(request, stream=True)
        try:
            for line in answer.iter_lines():
                if line.startswith("data:"):  # ours are one line each
                    yield json.loads(line.removeprefix("data:"))
        except (httpx.HTTPError, ValueError) as error:
            raise self._unreachable(error) from error
        finally:
            answer.close()

    def download(self, video_id: str, output: Path, *, variant: str = "video") -> int:
        """The file at `output`, all of it or nothing. Returns its size in bytes."""
        request = self._client.build_request(
            "GET", f"{_path(video_id)}/content", params={"variant": variant}
        )
        answer = self._send(request, stream=True)
        part = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("wb") as file:
                for data in answer.iter_bytes():
                    file.write(data)
            part.replace(output)
            return output.stat().st_size
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            raise Refused(f"cannot write {output}: {error.strerror or error}") from error
        finally:
            answer.close()
            part.unlink(missing_ok=True)

    def _json(self, method: str, path: str, **kwargs: Any) -> Json:
        try:
            request = self._client.build_request(method, path, **kwargs)
        except ValueError as error:  # half a character on the command line, say
            raise Refused(f"the request cannot be written as JSON: {error}") from error
        answer = self._send(request)
        body = _object(answer)
        if body is None:
            raise Unreachable(f"{self.url} answers, but not as a Wan service does", "check the URL")
        return body

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            answer = self._client.send(request, stream=stream)
            if answer.is_success:
                return answer
            answer.read()
            answer.close()
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise NobodyThere(
                f"no service at {self.url} ({_why(error)})",
                "start one with `make serve`, or name another with --url or WAN_URL",
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise _refusal(answer, self.url)

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"the connection to {self.url} was lost: {_why(error)}")


def _path(video_id: str) -> str:
    if not video_id.replace("_", "").isalnum():
        raise NoSuchVideo(f"{video_id!r} is not the id of a video")
    return f"/v1/videos/{video_id}"


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def _object(answer: httpx.Response) -> Json | None:
    try:
        body = answer.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _refusal(answer: httpx.Response, url: str) -> ClientError:
    """Only an answer in the API's own shape is the service's word: Serve's proxy says 404 in plain
    text while the application is not up yet, as after a restart."""
    error = (_object(answer) or {}).get("error")
    if not isinstance(error, dict):
        return Unreachable(f"the service at {url} is not up (yet): {answer.status_code}")
    message = error.get("message", f"the service answered {answer.status_code}")
    match answer.status_code:
        case 401 | 403:
            return KeyRefused(message, "set WAN_API_KEY")
        case 404 if error.get("code") == "model_not_found":
            return Refused(message)
        case 404:
            return NoSuchVideo(message)
        case 409:
            return VideoFailed(message)
        case 429:
            wait_s = answer.headers.get("retry-after")
            return QueueFull(message, f"try again in {wait_s} s" if wait_s else "")
        case status if status >= 500:
            return Unreachable(message)
        case _:
            return Refused(message)
