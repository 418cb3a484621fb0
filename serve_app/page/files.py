"""The web page as files: what the ingress serves at `/` and under `/page/`.

Owns which files there are and the headers they go out with. Nothing in them is secret, so they
need no key. Knows nothing about fastapi; the page itself talks to the API like any other client.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.resources import files

INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing from elsewhere, nothing inline. `blob:` is what a key fetches and a person uploads."""


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """`etag` is the content's hash: a browser asks each time, and is told 304 until it changes."""

    content: bytes
    media_type: str
    etag: str

    @property
    def headers(self) -> dict[str, str]:
        return {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Cross-Origin-Opener-Policy": "same-origin",
            "ETag": self.etag,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def is_known(self, if_none_match: str | None) -> bool:
        """Whether an If-None-Match header says that the client has this content."""
        given = [each.strip().removeprefix("W/") for each in (if_none_match or "").split(",")]
        return self.etag in given or given == ["*"]


@functools.cache
def page_files() -> dict[str, PageFile]:
    """Name -> file. All of them are held: a few tens of kilobytes."""
    found = {}
    for file in files(__package__).iterdir():
        media_type = MEDIA_TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[file.name] = PageFile(content=content, media_type=media_type, etag=etag)
    return found
