"""Gate: the ASGI layer around the API that every request passes, known path or not.

Owns request ids, API keys, the body limit and the last word on failures, so that all of these have
the API's error shape. Plain ASGI: knows nothing about fastapi, routes or jobs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve_app.errors import ApiError, BodyTooLarge, InternalError, InvalidRequest, Unauthenticated

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Gate:
    """Sets `scope["state"]["owner"]`: a prefix of the key's digest, "" where none is needed."""

    def __init__(
        self, app: AsgiApp, *, api_key_digests: tuple[str, ...], max_body_bytes: int
    ) -> None:
        self._app = app
        self._api_key_digests = api_key_digests
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = _header(scope, b"x-request-id").decode("latin-1")
        if not _REQUEST_ID.fullmatch(given_id):
            given_id = ""
        request_id = given_id or f"req_{secrets.token_hex(8)}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not given_id:  # whoever gave the id, Serve's proxy as a rule, answers with it
                    headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                    message = {**message, "headers": headers}
            await send(message)

        try:
            scope.setdefault("state", {})["owner"] = self._owner(scope)
            self._check_content_length(scope)
            await self._app(scope, self._limited(receive), send_with_id)
        except ApiError as error:
            await _answer(error, send_with_id)
        except Exception:
            logger.exception("%s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise  # the server cuts the connection: half an answer must not look whole
            await _answer(InternalError(request_id=request_id), send_with_id)

    def _owner(self, scope: Message) -> str:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._api_key_digests or not (path == "/v1" or path.startswith("/v1/")):
            return ""
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        digest = hashlib.sha256(key.strip()).hexdigest()
        # Every key is compared, in constant time: an answer's time says nothing about the keys.
        known = [hmac.compare_digest(digest, each) for each in self._api_key_digests]
        if scheme.lower() != b"bearer" or not any(known):
            raise Unauthenticated("send a valid key as 'Authorization: Bearer KEY'")
        return digest[:16]

    def _check_content_length(self, scope: Message) -> None:
        text = _header(scope, b"content-length")
        if text and not text.isdigit():
            raise InvalidRequest("Content-Length is not a number")
        if text and int(text) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts, for bodies whose length was not announced (or was a lie)."""
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body has more than {self._max_body_bytes} bytes")


def _header(scope: Message, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
