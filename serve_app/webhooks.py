"""Webhooks: sends the announced ends of videos to the configured URL, signed, until it takes them.

Owns the request, its signature (Standard Webhooks 1.0) and when to try again. What waits to be sent
is durable and webhook_store.py's. Knows nothing about jobs, stages or this service's own API.

At least once: a receiver that sees a `webhook-id` again has had it before. Whatever answers 2xx has
taken it, 410 wants no more tries, anything else (a redirect too) is tried again later.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Callable
from http import HTTPStatus

import httpx

from serve_app.job_schema import StoreUnavailable
from serve_app.topology import WebhookSettings
from serve_app.webhook_store import Delivery, DeliveryStore

logger = logging.getLogger(__name__)

POLL_S = 0.5
MAX_AT_ONCE = 8
LEASE_MARGIN_S = 20.0  # past the answer's time-out: for the database


class WebhookSender:
    """Any number of these may share one database: each delivery is leased by one at a time."""

    def __init__(
        self,
        settings: WebhookSettings,
        deliveries: DeliveryStore,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._deliveries = deliveries
        self._clock = clock
        self._client = httpx.AsyncClient(
            timeout=settings.timeout_s,
            follow_redirects=False,
            headers={"User-Agent": "wan-serve", "Content-Type": "application/json"},
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def deliver_due(self) -> None:
        """One round: sends what is due, or waits a moment when nothing is."""
        due = await self._deliveries.claim(
            limit=MAX_AT_ONCE, lease_s=self._settings.timeout_s + LEASE_MARGIN_S
        )
        if due:
            await asyncio.gather(*map(self._deliver, due))
        else:
            await asyncio.sleep(POLL_S)

    async def _deliver(self, delivery: Delivery) -> None:
        answer = await self._post(delivery)
        about = f"webhook {delivery.id} ({delivery.event} of {delivery.job_id})"
        try:
            if isinstance(answer, int) and 200 <= answer < 300:
                await self._deliveries.forget(delivery)
            elif answer == HTTPStatus.GONE:
                logger.warning("%s: the receiver answered 410 and gets it no more", about)
                await self._deliveries.forget(delivery)
            elif delivery.attempts >= self._settings.max_attempts:
                logger.error(
                    "%s: given up after %d attempts; the last: %s", about, delivery.attempts, answer
                )
                await self._deliveries.forget(delivery)
            else:
                delay_s = retry_delay_s(self._settings, delivery.attempts)
                logger.warning("%s: %s; again in %.0f s", about, answer, delay_s)
                await self._deliveries.retry(delivery, delay_s=delay_s)
        except StoreUnavailable as error:  # its lease runs out, then it is sent once more
            logger.warning("%s: what became of it is not recorded: %s", about, error)

    async def _post(self, delivery: Delivery) -> int | str:
        """The answer's status, or why there was none. Its body is the receiver's: not read."""
        body = json.dumps(delivery.payload, separators=(",", ":")).encode()
        headers = signed_headers(
            self._settings.secrets, delivery.id, timestamp=int(self._clock()), body=body
        )
        request = {"content": body, "headers": headers}
        try:
            # httpx's own time-outs are for each read: a receiver that trickles would pass them.
            async with (
                asyncio.timeout(self._settings.timeout_s),
                self._client.stream("POST", self._settings.url, **request) as answer,
            ):
                return answer.status_code
        except TimeoutError:
            return f"no answer within {self._settings.timeout_s:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return str(error) or type(error).__name__


def signed_headers(
    secrets: tuple[bytes, ...], webhook_id: str, *, timestamp: int, body: bytes
) -> dict[str, str]:
    """One signature per secret, so that a receiver may know the old or the new one while it is
    replaced. Each is HMAC-SHA256 of `id.timestamp.body` (Standard Webhooks, "Signature scheme")."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, signed, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            f"v1,{base64.b64encode(digest).decode()}" for digest in digests
        ),
    }


def retry_delay_s(settings: WebhookSettings, attempts: int) -> float:
    """Seconds from the failed attempt number `attempts` (from 1) to the next.

    Doubled each time up to `max_retry_s`; up to half is taken off at random, so that deliveries
    which failed together do not all come back together.
    """
    longest_s = min(settings.max_retry_s, settings.first_retry_s * 2.0 ** min(attempts - 1, 60))
    return longest_s * random.uniform(0.5, 1.0)
