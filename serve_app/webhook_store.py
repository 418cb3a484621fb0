"""Webhook deliveries in the job database: announced with a job's end, leased, retried, forgotten.

Owns the statements on `webhook_deliveries`. A row stays until its receiver took it or it is given
up, so that a restart loses none. Knows nothing about HTTP or signatures (webhooks.py), nor about
what ends a job (jobs.py, which announces in the same transaction).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.job_database import JobDatabase, runs_to_its_end, webhook_deliveries
from serve_app.job_schema import COMPLETED, FAILED

EVENTS = {COMPLETED: "video.completed", FAILED: "video.failed"}
"""By the status that a job ended with. A cancelled one is none: its client asked for that end."""

_c = webhook_deliveries.c


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One event on its way. `id` is the event's and stays the same at every attempt.

    `attempts` counts the claims, this one included, and is the fencing token.
    """

    id: str
    job_id: str
    event: str
    payload: dict[str, Any]
    created_at: float
    attempts: int


_COLUMNS = [_c[field.name] for field in dataclasses.fields(Delivery)]


async def announce(
    connection: AsyncConnection, jobs: Iterable[tuple[str, str]], *, now: float
) -> None:
    """Insert the events of those of `jobs`, (id, status), that have ended; in their transaction."""
    rows = [_event(job_id, EVENTS[status], now) for job_id, status in jobs if status in EVENTS]
    if rows:
        await connection.execute(sa.insert(webhook_deliveries), rows)


def _event(job_id: str, event: str, now: float) -> dict[str, Any]:
    """The row, whose payload has the shape of an OpenAI webhook event."""
    event_id = f"evt_{secrets.token_hex(12)}"
    payload = {
        "id": event_id,
        "object": "event",
        "created_at": int(now),
        "type": event,
        "data": {"id": job_id},
    }
    row = {"id": event_id, "job_id": job_id, "event": event, "payload": payload}
    return row | {"created_at": now, "available_at": now}


class DeliveryStore:
    """The deliveries that wait, shared by every process. Every method may raise
    `StoreUnavailable`."""

    def __init__(self, database: JobDatabase, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    @runs_to_its_end
    async def claim(self, *, limit: int, lease_s: float) -> list[Delivery]:
        """Lease at most `limit` deliveries that are due. A lease that runs out is due again."""
        now = self._clock()
        free = sa.or_(_c.lease_until.is_(None), _c.lease_until <= now)
        due = sa.select(_c.seq).where(_c.available_at <= now, free)
        due = due.order_by(_c.available_at, _c.seq).limit(limit)
        claim = (
            sa.update(webhook_deliveries)
            .where(_c.seq.in_(due.with_for_update(skip_locked=True)))
            .values(lease_until=now + lease_s, attempts=_c.attempts + 1)
            .returning(*_COLUMNS)
        )
        async with self._database.transaction(write=True) as connection:
            rows = await connection.execute(claim)
            return [Delivery(**row._mapping) for row in rows]

    @runs_to_its_end
    async def retry(self, delivery: Delivery, *, delay_s: float) -> bool:
        """Due again after `delay_s`. False: another claim has it."""
        update = (
            sa.update(webhook_deliveries)
            .where(*_held(delivery))
            .values(lease_until=None, available_at=self._clock() + delay_s)
        )
        async with self._database.transaction(write=True) as connection:
            return bool((await connection.execute(update)).rowcount)

    @runs_to_its_end
    async def forget(self, delivery: Delivery) -> bool:
        """Delivered, or given up. False: another claim has it."""
        delete = sa.delete(webhook_deliveries).where(*_held(delivery))
        async with self._database.transaction(write=True) as connection:
            return bool((await connection.execute(delete)).rowcount)


def _held(delivery: Delivery) -> tuple[sa.ColumnElement[bool], ...]:
    return _c.id == delivery.id, _c.attempts == delivery.attempts
