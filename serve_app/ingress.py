"""The HTTP edge: the routes of the videos API, as a FastAPI application.

The only file that knows fastapi. Owns routes, byte ranges, event streams and the OpenAPI page;
what the routes do is videos.py, what guards them gate.py. Knows nothing about Ray or SQL.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_app import openai_api
from serve_app.artifacts import ArtifactError, Artifacts
from serve_app.cinematography import VOCABULARY
from serve_app.create_image import CreateImage, ImageJobs, ImagesAnswer, parse_create_image
from serve_app.create_video import CreateVideo, multipart_schema, parse_create
from serve_app.derived_jobs import RemixVideo, parse_remix
from serve_app.errors import (
    BY_STATUS,
    ApiError,
    Conflict,
    InvalidRequest,
    NotFound,
    RangeNotSatisfiable,
    TooManyJobs,
    Unavailable,
)
from serve_app.gate import Gate
from serve_app.jobs import IdempotencyConflict, JobStore, JobStoreError, QueueFull
from serve_app.openai_api import (
    CinematographyVocabulary,
    ErrorBody,
    Model,
    ModelList,
    Variant,
    Video,
    VideoDeleted,
    VideoEvent,
    VideoList,
)
from serve_app.page.files import INDEX, page_files
from serve_app.request_body import MULTIPART, read_body
from serve_app.served_model import ServedModel
from serve_app.topology import HttpSettings
from serve_app.videos import Content, Videos

EVENTS_POLL_S = 0.5
CONTENT_CHUNK_BYTES = 2**20

Readiness = Callable[[], Awaitable[Mapping[str, bool]]]
"""Per stage, whether it has really run once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edge:
    videos: Videos
    images: ImageJobs
    store: JobStore
    artifacts: Artifacts
    models: Mapping[str, ServedModel]
    settings: HttpSettings
    readiness: Readiness


def make_ingress_app(
    *,
    store: JobStore,
    artifacts: Artifacts,
    models: Mapping[str, ServedModel],
    settings: HttpSettings,
    readiness: Readiness,
) -> FastAPI:
    """The API over two open stores; built where it runs, since neither can be pickled.

    The first of `models` serves requests that name none.
    """
    app = FastAPI(
        title="Wan2.2 videos",
        version="1",
        description="Videos from text and images. The shape is that of the OpenAI videos API.",
        redirect_slashes=False,
    )
    videos = Videos(store=store, artifacts=artifacts, models=models, settings=settings)
    app.state.edge = _Edge(
        videos=videos,
        images=ImageJobs(videos, artifacts, models, max_wait_s=settings.max_image_wait_s),
        store=store,
        artifacts=artifacts,
        models=models,
        settings=settings,
        readiness=readiness,
    )
    app.include_router(web)
    app.include_router(health)
    app.include_router(
        v1,
        # Only documents the header: the gate has refused before any route is looked up.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.api_key_digests else [],
        responses=_errors(401) if settings.api_key_digests else None,
    )
    app.add_middleware(
        Gate,
        api_key_digests=settings.api_key_digests,
        max_body_bytes=settings.max_body_bytes,
    )
    for error in (ApiError, JobStoreError, ArtifactError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, _answer_error)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
    app.openapi = lambda: _openapi(app)
    return app


def _edge(request: Request) -> _Edge:
    return request.app.state.edge


def _owner(request: Request) -> str:
    return request.state.owner


Edge = Annotated[_Edge, Depends(_edge)]
Owner = Annotated[str, Depends(_owner)]
IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")
]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses}


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_REASONS = {
    400: "A field is unknown, malformed or out of range; `param` names it",
    401: "No valid API key",
    404: "No such video, or another key's",
    409: "Not in a state for this",
    413: "The body, or an image in it, is too large",
    415: "Neither JSON nor a form",
    416: "The range lies outside the file",
    429: "The queue is full; see Retry-After",
    500: "The job failed; `code` says why",
    503: "A stage has not run yet, or a store does not answer",
}

# ------------------------------------------------------------------------------------------- web

web = APIRouter(include_in_schema=False)


@web.api_route("/", methods=["GET", "HEAD"])
@web.api_route("/page/{name}", methods=["GET", "HEAD"])
async def web_page(request: Request, name: str = INDEX) -> Response:
    """The web page. No key: nothing in it is secret, and a browser's address bar sends none."""
    file = page_files().get(name)
    if file is None:
        raise NotFound("there is nothing here")
    if file.is_known(request.headers.get("if-none-match")):
        return Response(status_code=304, headers=file.headers)
    headers = file.headers | {"Content-Length": str(len(file.content))}
    body = file.content if request.method == "GET" else b""
    return Response(body, headers=headers, media_type=file.media_type)


# ---------------------------------------------------------------------------------------- health

health = APIRouter(tags=["health"])


@health.get("/health")
async def is_alive() -> dict[Literal["status"], Literal["ok"]]:
    """This process answers."""
    return {"status": "ok"}


@health.get("/ready", responses=_errors(503))
async def is_ready(edge: Edge) -> dict[Literal["status"], Literal["ready"]]:
    """The job store answers and every stage has run once."""
    await edge.store.queue_size()
    stages = await edge.readiness()
    waiting = [name for name, has_run in stages.items() if not has_run]
    if waiting or not stages:
        raise Unavailable(f"waiting for {', '.join(waiting) or 'the stages'}")
    return {"status": "ready"}


# -------------------------------------------------------------------------------------------- v1

v1 = APIRouter(prefix="/v1", responses=_errors(503))


@v1.get("/models", tags=["models"])
async def list_models(edge: Edge) -> ModelList:
    extends_prompts = edge.settings.extends_prompts
    return ModelList(
        data=[
            openai_api.model(served, extends_prompts=extends_prompts)
            for served in edge.models.values()
        ]
    )


@v1.get("/models/{model}", tags=["models"], responses=_errors(404))
async def get_model(edge: Edge, model: str) -> Model:
    if model not in edge.models:
        raise NotFound(f"no model {model[:64]!r}", param="model", code="model_not_found")
    return openai_api.model(edge.models[model], extends_prompts=edge.settings.extends_prompts)


@v1.get("/cinematography", tags=["models"])
async def list_cinematography() -> CinematographyVocabulary:
    """The values of every field of a request's `cinematography`."""
    return CinematographyVocabulary.model_validate({"fields": VOCABULARY})


@v1.post(
    "/videos",
    tags=["videos"],
    responses=_errors(400, 409, 413, 415, 429),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": CreateVideo.model_json_schema()},
                MULTIPART: {"schema": multipart_schema()},
            },
        }
    },
)
async def create(
    request: Request,
    edge: Edge,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> Video:
    """Queue a video. With an Idempotency-Key, asking again gives the same one."""
    fields, uploads = await read_body(request, edge.settings)
    return await edge.videos.create(
        owner, parse_create(fields), uploads, idempotency_key=idempotency_key
    )


@v1.post(
    "/videos/{video_id}/remix",
    tags=["videos"],
    responses=_errors(400, 404, 409, 413, 415, 429),
    openapi_extra=_json_body(RemixVideo.model_json_schema()),
)
async def remix(
    request: Request,
    edge: Edge,
    owner: Owner,
    video_id: str,
    idempotency_key: IdempotencyKey = None,
) -> Video:
    """Queue the same video with another prompt: same model, numbers, seed and images."""
    fields, uploads = await read_body(request, edge.settings)
    return await edge.videos.remix(
        owner, video_id, parse_remix(fields | uploads), idempotency_key=idempotency_key
    )


@v1.post(
    "/images/generations",
    tags=["images"],
    responses=_errors(400, 409, 413, 415, 429, 500),
    openapi_extra=_json_body(CreateImage.model_json_schema()),
)
async def create_images(request: Request, edge: Edge, owner: Owner) -> ImagesAnswer:
    """Make pictures (videos of one frame) and wait for them. Hanging up cancels them."""
    fields, uploads = await read_body(request, edge.settings)
    answer = await edge.images.generate(
        owner, parse_create_image(fields | uploads), is_disconnected=request.is_disconnected
    )
    if answer is None:
        raise ClientDisconnect
    return answer


@v1.get("/videos", tags=["videos"], responses=_errors(400))
async def list_videos(
    edge: Edge,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The `last_id` of the page before")] = None,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """A page of videos, by creation."""
    videos, has_more = await edge.videos.page(owner, limit=limit, after=after, order=order)
    return VideoList(
        data=videos,
        first_id=videos[0].id if videos else None,
        last_id=videos[-1].id if videos else None,
        has_more=has_more,
    )


@v1.get("/videos/{video_id}", tags=["videos"], responses=_errors(404))
async def retrieve(edge: Edge, owner: Owner, video_id: str, response: Response) -> Video:
    """A failed job is a 200 too: see `status` and `error`. `openai-poll-after-ms` says when to ask
    again."""
    video = await edge.videos.video(await edge.videos.get(owner, video_id))
    if video.status in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = str(openai_api.poll_after_ms(video.seconds_left))
    return video


@v1.delete("/videos/{video_id}", tags=["videos"], responses=_errors(404))
async def delete(edge: Edge, owner: Owner, video_id: str) -> VideoDeleted:
    """Unknown from now on. A running job stops within one step."""
    await edge.videos.delete(owner, video_id)
    return VideoDeleted(id=video_id)


_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "pattern": "^video\\.[a-z_]+$"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/VideoEvent"},
        },
    },
}


@v1.get(
    "/videos/{video_id}/events",
    tags=["videos"],
    response_class=EventSourceResponse,
    responses=_errors(404) | {200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}},
)
async def events(edge: Edge, owner: Owner, video_id: str) -> EventSourceResponse:
    """Server-sent events `video.queued`, `video.in_progress`, and at the end `video.completed`,
    `video.failed` or `video.deleted` (whose data is that of DELETE)."""
    await edge.videos.get(owner, video_id)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        async for event in edge.videos.watch(owner, video_id, poll_s=EVENTS_POLL_S):
            name = event.status if isinstance(event, VideoEvent) else "deleted"
            yield ServerSentEvent(event=f"video.{name}", data=event.model_dump_json())

    return EventSourceResponse(stream(), headers={"Cache-Control": "no-store"})


_CONTENT_RESPONSES = _errors(400, 404, 409, 416) | {
    status: {
        "description": description,
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in ("video/mp4", "image/webp")
        },
    }
    for status, description in ((200, "The file"), (206, "The part of it that Range names"))
}


@v1.get(
    "/videos/{video_id}/content",
    tags=["videos"],
    response_class=StreamingResponse,
    responses=_CONTENT_RESPONSES,
)
@v1.head(
    "/videos/{video_id}/content",
    tags=["videos"],
    response_class=Response,
    responses={
        status: {"description": "As GET, without a body"} for status in (206, 400, 404, 409, 416)
    },
)
async def download(
    request: Request, edge: Edge, owner: Owner, video_id: str, variant: Variant = "video"
) -> Response:
    """The mp4; or WebP: its first frame, a grid of at most 25 frames, or what its boundary promised
    (there while the video is still being made). Understands one byte range."""
    content = await edge.videos.content(owner, video_id, variant)
    start, end = 0, content.size_bytes
    etag = f'"{content.file_name}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Disposition": f'inline; filename="{content.file_name}"',
    }
    status = 200
    wanted = request.headers.get("range")
    if wanted and request.headers.get("if-range", etag) == etag:
        part = byte_range(wanted, content.size_bytes)
        if part is not None:
            status, (start, end) = 206, part
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size_bytes}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content.media_type)
    return StreamingResponse(
        _read(edge.artifacts, content, start, end),
        status_code=status,
        headers=headers,
        media_type=content.media_type,
    )


async def _read(
    artifacts: Artifacts, content: Content, start: int, end: int
) -> AsyncIterator[bytes]:
    for offset in range(start, end, CONTENT_CHUNK_BYTES):
        yield await artifacts.read_range(
            content.key, offset, min(end, offset + CONTENT_CHUNK_BYTES)
        )


def byte_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """[start, end) of a Range header (RFC 9110, 14.1.2); None when it is to be ignored: malformed,
    another unit, or several ranges. Raises RangeNotSatisfiable."""
    match = re.fullmatch(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", header)
    if match is None or match[1] == match[2] == "":
        return None
    first, last = match[1], match[2]
    if first == "":
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(size_bytes, int(last) + 1 if last else size_bytes)
        if last and int(last) < start:
            return None
    if start >= size_bytes or start >= end:
        raise RangeNotSatisfiable(size_bytes=size_bytes)
    return start, end


# -------------------------------------------------------------------------------------- errors


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    answer = _translated(request, error)
    return JSONResponse(answer.body(), status_code=answer.status, headers=answer.headers)


def _translated(request: Request, error: Exception) -> ApiError:
    """What a failure below or beside the routes is to the client."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return TooManyJobs(retry_after_s=error.retry_after_s)
        case IdempotencyConflict():
            return Conflict(
                "this Idempotency-Key was used for another request", code="idempotency_key_reused"
            )
        case JobStoreError() | ArtifactError() if error.retryable:
            return Unavailable("storage does not answer: try again", code="storage_unavailable")
        case RequestValidationError():
            first = error.errors()[0]
            param = str(first["loc"][-1])
            return InvalidRequest(f"{param}: {first['msg']}", param=param)
        case HTTPException():
            kind = BY_STATUS.get(error.status_code, InvalidRequest)
            message = {404: "there is nothing here", 405: "this path does not take this method"}
            return kind(
                message.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})
            )
        case _:
            raise error  # the gate logs it and answers 500


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page without the 422 it promises everywhere: our validation answers 400."""
    if app.openapi_schema is None:
        page = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in page["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = page["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        # FastAPI collects the models of bodies, not those inside an event's text.
        event = VideoEvent.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas["VideoEvent"] = {name: part for name, part in event.items() if name != "$defs"}
        app.openapi_schema = page
    return app.openapi_schema
