"""The options of webhooks -> where ends of videos are announced, and with which keys.

Owns the rules between the URL and the secrets, and never repeats either in an error. Pure: no
environment, no network.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from serve_app.topology import WebhookSettings

if TYPE_CHECKING:
    from serve_app.config import WebhooksConfig

MIN_SECRET_BYTES = 24  # Standard Webhooks, "Symmetric": 24 to 64 bytes


def webhook_settings(
    options: WebhooksConfig, *, default_url: str, secrets: str
) -> WebhookSettings | None:
    """None without a URL. `secrets`: one or more (while one replaces another), comma separated."""
    url = options.url or default_url
    if not url:
        if options.model_fields_set:
            raise ValueError("webhooks has no effect without webhooks.url or WAN_WEBHOOK_URL")
        return None
    _check_webhook_url(url)
    if options.max_retry_s < options.first_retry_s:
        raise ValueError(
            f"webhooks: max_retry_s {options.max_retry_s:g}"
            f" < first_retry_s {options.first_retry_s:g}"
        )
    given = tuple(_webhook_secret(text) for text in secrets.split(",") if text.strip())
    if not given:
        raise ValueError(
            "webhooks are signed and WAN_WEBHOOK_SECRET is not set: make one with"
            " `echo whsec_$(openssl rand -base64 32)`"
        )
    return WebhookSettings(url=url, secrets=given, **options.model_dump(exclude={"url"}))


def _check_webhook_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("webhooks.url (or WAN_WEBHOOK_URL) is not an http(s) URL")


def _webhook_secret(text: str) -> bytes:
    """Never repeats the secret."""
    text = text.strip()
    try:
        secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if not text.startswith("whsec_") or len(secret) < MIN_SECRET_BYTES:
        raise ValueError(
            f"WAN_WEBHOOK_SECRET is not whsec_ and the base64 of {MIN_SECRET_BYTES} bytes or more:"
            " make one with `echo whsec_$(openssl rand -base64 32)`"
        )
    return secret
