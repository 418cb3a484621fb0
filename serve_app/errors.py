"""The API's errors: one tree, one shape, `{"error": {"message", "type", "param", "code"}}`.

Owns every status and code an answer can fail with. Knows nothing about fastapi, jobs or models;
ingress.py is the only file that turns these into responses.

    ApiError
    +- InvalidRequest       400  a field is unknown, malformed or out of range (`param` names it)
    +- Unauthenticated      401  no key, or not one of the service's keys
    +- NotFound             404  no such path, model or video (or another key's video)
    +- MethodNotAllowed     405
    +- Conflict             409  not finished yet; an Idempotency-Key used for another request
    +- BodyTooLarge         413
    +- UnsupportedMediaType 415
    +- RangeNotSatisfiable  416
    +- TooManyJobs          429  the queue is full; Retry-After says when to come back
    +- JobFailed            500  what was waited for failed; `code` is the job's
    +- InternalError        500  ours; `code` is a constant and the message holds the request id
    +- NotReady             503  a stage has not run yet
"""

from __future__ import annotations

import math


class ApiError(Exception):
    """An answer that is not a success. `headers` go out with it."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthenticated(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(ApiError):
    """Trying again at once does not help, and the OpenAI SDK would: the header stops it."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param, headers={"X-Should-Retry": "false"})


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaType(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RangeNotSatisfiable(ApiError):
    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"

    def __init__(self, *, size_bytes: int) -> None:
        super().__init__(
            f"the range lies outside the {size_bytes} bytes of this file",
            headers={"Content-Range": f"bytes */{size_bytes}"},
        )


class TooManyJobs(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, *, retry_after_s: float) -> None:
        seconds = max(1, math.ceil(retry_after_s))
        super().__init__(
            f"the queue is full: try again in {seconds} s", headers={"Retry-After": str(seconds)}
        )


class JobFailed(ApiError):
    """A new job would fail too, or costs as much again: the header stops the SDK's own retries."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, code=code, headers={"X-Should-Retry": "false"})


class InternalError(ApiError):
    def __init__(self, *, request_id: str) -> None:
        super().__init__(f"the service failed to handle request {request_id}")


class Unavailable(ApiError):
    status = 503
    code = "not_ready"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code, headers={"Retry-After": "5"})


BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    404: NotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
    415: UnsupportedMediaType,
}
"""What a framework's own refusal (unknown path, wrong method, malformed body) becomes."""
