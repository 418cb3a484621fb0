"""The durable job table: submit, claim by lease, fenced writes, retention.

Owns every statement, the same ones for SQLite and PostgreSQL (`job_database.py` has the table and
the connections). Knows nothing about HTTP, Ray, stages or tensors, and reads no environment.

A claim hands out a lease and an attempt number; every write of the owner carries that number and
lands only while the job is in progress under it, so an owner that lost its lease changes nothing.
Leases are compared with the callers' clocks: keep nodes within a small part of a lease.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app import job_transitions as transitions
from serve_app import webhook_store
from serve_app.job_database import (
    OPEN_PATIENCE_S,
    SUBMIT_LOCK,
    JobDatabase,
    check_database,
    jobs,
    runs_to_its_end,
)
from serve_app.job_schema import (
    FINISHED,
    IN_PROGRESS,
    QUEUED,
    IdempotencyConflict,
    Job,
    JobNotFound,
    JobStoreError,
    NewJob,
    QueueFull,
    Renewal,
    StoreUnavailable,
    check_room,
    is_storable,
    new_job_id,
    replace_unstorable,
)
from serve_app.webhook_store import DeliveryStore

__all__ = [
    "IdempotencyConflict",
    "Job",
    "JobNotFound",
    "JobStore",
    "JobStoreError",
    "NewJob",
    "QueueFull",
    "Renewal",
    "StoreUnavailable",
    "check_database",
    "new_job_id",
]

_c = jobs.c
_JOB_COLUMNS = [_c[field.name] for field in dataclasses.fields(Job)]
_CLAIM_ORDER = (_c.priority.desc(), _c.seq)


class JobStore:
    """Every process opens its own; any number of processes share one database.

    Every method may raise `StoreUnavailable`. `owner=None` means whoever's job it is.
    """

    def __init__(
        self,
        database: JobDatabase,
        *,
        retention_s: float | None,
        announces_ends: bool,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._retention_s = retention_s
        self._announces_ends = announces_ends
        self._clock = clock
        self.deliveries = DeliveryStore(database, clock=clock)

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        retention_s: float | None = None,
        announces_ends: bool = False,
        patience_s: float = OPEN_PATIENCE_S,
        clock: Callable[[], float] = time.time,
    ) -> JobStore:
        """Connect and bring the table to the newest revision; many processes may open at once.

        `url`: `sqlite:///FILE` or `postgresql://...`. Finished jobs expire `retention_s` after
        their end (None = never), cancelled ones at once. With `announces_ends` the transaction that
        completes or fails a job also leaves a webhook delivery in `deliveries`. A database that
        does not answer yet is waited for, up to `patience_s`.

        Raises:
            ValueError: a database other than these two, or SQLite without a file.
        """
        database = await JobDatabase.open(url, patience_s=patience_s)
        return cls(database, retention_s=retention_s, announces_ends=announces_ends, clock=clock)

    async def close(self) -> None:
        await self._database.close()

    # --- the client's side -------------------------------------------------------------------

    @runs_to_its_end
    async def submit(
        self,
        new: NewJob,
        *,
        max_queued_jobs: int | None = None,
        max_queued_s: float | None = None,
    ) -> Job:
        """Queue `new`, or return the job that the same (owner, idempotency_key) made before.

        An empty queue takes a job of any length, or one longer than `max_queued_s` could never run.

        Raises:
            QueueFull: one more job passes `max_queued_jobs` or `max_queued_s`.
            IdempotencyConflict: the key was used with another `request_hash`.
        """
        async with self._database.transaction(write=True) as connection:
            # Submits run one at a time, or two would both see the last free place.
            await self._database.lock(connection, SUBMIT_LOCK)
            if new.idempotency_key is not None:
                earlier = await _first_job(
                    connection,
                    sa.select(*_JOB_COLUMNS).where(
                        _c.owner == new.owner, _c.idempotency_key == new.idempotency_key
                    ),
                )
                if earlier is not None:
                    return _same_request(earlier, new)
            num_queued, queued_s = await _queue_size(connection)
            check_room(new, num_queued, queued_s, max_queued_jobs, max_queued_s)
            row = dataclasses.asdict(new) | {"created_at": self._clock()}
            insert = sa.insert(jobs).values(row).returning(*_JOB_COLUMNS)
            return _job((await connection.execute(insert)).one())

    @runs_to_its_end
    async def get(self, job_id: str, *, owner: str | None = None) -> Job | None:
        async with self._database.transaction() as connection:
            query = sa.select(*_JOB_COLUMNS).where(_is_job(job_id, owner))
            return await _first_job(connection, query)

    @runs_to_its_end
    async def list(
        self,
        *,
        owner: str | None = None,
        limit: int = 20,
        after: str | None = None,
        order: str = "desc",
    ) -> list[Job]:
        """At most `limit` jobs in order of submission, those that follow the job `after`.

        Raises:
            JobNotFound: `after` is not a job of this owner.
            ValueError: `order` is neither "asc" nor "desc".
        """
        if order not in ("asc", "desc"):
            raise ValueError(f'order is "asc" or "desc", not {order!r}')
        query = sa.select(*_JOB_COLUMNS).limit(limit)
        query = query.order_by(_c.seq if order == "asc" else _c.seq.desc())
        if owner is not None:
            query = query.where(_c.owner == owner)
        async with self._database.transaction() as connection:
            if after is not None:
                seq = await connection.scalar(sa.select(_c.seq).where(_is_job(after, owner)))
                if seq is None:
                    raise JobNotFound(f"no job {after!r} to list from")
                query = query.where(_c.seq > seq if order == "asc" else _c.seq < seq)
            return [_job(row) for row in await connection.execute(query)]

    @runs_to_its_end
    async def request_cancel(self, job_id: str, *, owner: str | None = None) -> Job | None:
        """Cancel a queued job now, ask the owner of a running one to stop; a finished one stays.

        Once this was accepted the job ends cancelled, even if its last step is already done.
        Returns the job as it now stands, None when there is none.
        """
        update = (
            sa.update(jobs)
            .where(_is_job(job_id, owner), _c.status.in_((QUEUED, IN_PROGRESS)))
            .values(transitions.cancel_asked(**self._ending()))
        )
        async with self._database.transaction(write=True) as connection:
            await connection.execute(update)
            query = sa.select(*_JOB_COLUMNS).where(_is_job(job_id, owner))
            return await _first_job(connection, query)

    @runs_to_its_end
    async def delete(self, job_id: str, *, owner: str | None = None) -> Job | None:
        """Forget a finished job, whose artifacts the caller has deleted: without its row nobody
        would. None: unknown or unfinished."""
        delete = (
            sa.delete(jobs)
            .where(_is_job(job_id, owner), _c.status.in_(FINISHED))
            .returning(*_JOB_COLUMNS)
        )
        async with self._database.transaction(write=True) as connection:
            return await _first_job(connection, delete)

    @runs_to_its_end
    async def expired(self, *, limit: int = 100) -> builtins.list[Job]:
        """At most `limit` jobs whose time is over; a cancelled one's is at once. The caller deletes
        their artifacts, and then them."""
        over = sa.select(*_JOB_COLUMNS).where(
            _c.status.in_(FINISHED), _c.expires_at <= self._clock()
        )
        async with self._database.transaction() as connection:
            return [_job(row) for row in await connection.execute(over.limit(limit))]

    @runs_to_its_end
    async def queue_position(self, job_id: str) -> int | None:
        """The number of jobs of its model that will be claimed before this one: models do not wait
        for each other. None once it is not queued."""
        other = jobs.alias().c
        ahead = sa.or_(
            other.priority > _c.priority,
            sa.and_(other.priority == _c.priority, other.seq < _c.seq),
        )
        num_ahead = sa.select(sa.func.count()).where(
            other.status == QUEUED, other.model == _c.model, ahead
        )
        query = sa.select(num_ahead.correlate(jobs).scalar_subquery())
        async with self._database.transaction() as connection:
            return await connection.scalar(query.where(_is_job(job_id, None), _c.status == QUEUED))

    @runs_to_its_end
    async def queue_size(self) -> tuple[int, float]:
        """(number of queued jobs, the sum of their predicted seconds)."""
        async with self._database.transaction() as connection:
            return await _queue_size(connection)

    # --- the owner's side ---------------------------------------------------------------------

    async def claim(
        self,
        worker: str,
        *,
        lease_s: float,
        max_attempts: int,
        max_failures: int | None = None,
        models: Collection[str] | None = None,
    ) -> Job | None:
        """Lease the job of the highest priority, then the oldest; None when none waits.

        Jobs whose lease ran out go back to the queue first, or end: a lost lease is a failed
        attempt, and the `max_attempts`-th of those since the last checkpoint, or the
        `max_failures`-th in all (None: no bound), fails the job with "too_many_attempts".
        `models` limits the claim to jobs of these models. A cancelled call takes no job.
        """
        claiming = asyncio.create_task(
            self._claim(worker, lease_s, (max_attempts, max_failures), models)
        )
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            with contextlib.suppress(StoreUnavailable):
                if job := await claiming:
                    await self.release(job.id, job.attempt)
            raise

    @runs_to_its_end
    async def _claim(
        self,
        worker: str,
        lease_s: float,
        limits: tuple[int, int | None],
        models: Collection[str] | None,
    ) -> Job | None:
        now = self._clock()
        max_attempts, max_failures = limits
        lost = sa.select(_c.seq).where(_c.status == IN_PROGRESS, _c.lease_until <= now)
        requeue_lost = (
            sa.update(jobs)
            .where(_c.seq.in_(lost.with_for_update(skip_locked=True)))
            .values(
                transitions.attempt_failed(
                    reason="the process that ran it was lost",
                    max_attempts=max_attempts,
                    max_failures=max_failures,
                    **self._ending(now),
                )
            )
            .returning(_c.id, _c.status, _c.announced)
        )
        waiting = sa.select(_c.seq).where(_c.status == QUEUED, _c.available_at <= now)
        if models is not None:
            waiting = waiting.where(_c.model.in_(models))
        first = waiting.order_by(*_CLAIM_ORDER).limit(1).with_for_update(skip_locked=True)
        claim = (
            sa.update(jobs)
            .where(_c.seq == first.scalar_subquery())
            .values(transitions.claimed(worker=worker, now=now, lease_s=lease_s))
            .returning(*_JOB_COLUMNS)
        )
        async with self._database.transaction(write=True) as connection:
            await self._announce(connection, (await connection.execute(requeue_lost)).all())
            return await _first_job(connection, claim)

    @runs_to_its_end
    async def renew_many(
        self, attempts: Mapping[str, int], *, lease_s: float
    ) -> dict[str, Renewal]:
        """Renew the leases of {job_id: attempt} in one statement; one answer for each of them."""
        held: dict[str, bool] = {}
        if attempts:
            renew = (
                sa.update(jobs)
                .where(sa.tuple_(_c.id, _c.attempt).in_(attempts.items()), _c.status == IN_PROGRESS)
                .values(lease_until=self._clock() + lease_s)
                .returning(_c.id, _c.cancel_requested)
            )
            async with self._database.transaction(write=True) as connection:
                held = {row.id: row.cancel_requested for row in await connection.execute(renew)}
        return {
            job_id: Renewal(held=job_id in held, cancel_requested=held.get(job_id, False))
            for job_id in attempts
        }

    async def record_progress(
        self, job_id: str, attempt: int, *, stage: str, step: int, progress: int
    ) -> Renewal:
        """Move stage, step and progress (0..100) forward together.

        What lies behind the furthest point so far is not shown: a later attempt repeats steps.
        """
        values = transitions.progressed(stage=stage, step=step, progress=progress)
        return await self._write(job_id, attempt, values)

    async def record_checkpoint(
        self,
        job_id: str,
        attempt: int,
        *,
        key: str | None,
        step: int,
        is_boundary: bool = False,
    ) -> Renewal:
        """The next attempt starts at `step` from the artifact `key` (None, 0: from the start).

        `is_boundary`: branches may begin with it too. Progress forgives: failures count again from
        0, so that a long job on shaky machines ends, and one that fails at the same place each time
        is given up early.
        """
        further = _c.checkpoint_step < step
        values = {
            "checkpoint": key,
            "checkpoint_step": step,
            "failures": sa.case((further, 0), else_=_c.failures),
        }
        if is_boundary:
            values["boundary_state"] = key
        return await self._write(job_id, attempt, values)

    async def record_artifacts(
        self, job_id: str, attempt: int, *, artifacts: dict[str, Any]
    ) -> Renewal:
        """What there is to see of a job before its end; `complete` says it anew."""
        return await self._write(job_id, attempt, {"artifacts": artifacts})

    async def record_prompt(
        self, job_id: str, attempt: int, *, revised_prompt: str | None, note: str | None
    ) -> Renewal:
        """What extending the job's prompt led to; every later attempt takes it from there."""
        note = None if note is None else replace_unstorable(note)
        values = {"revised_prompt": revised_prompt, "prompt_note": note}
        return await self._write(job_id, attempt, values)

    async def complete(self, job_id: str, attempt: int, *, artifacts: dict[str, Any]) -> Renewal:
        """End as completed, or as cancelled when that was asked for before."""
        values = transitions.completed(artifacts=artifacts, **self._ending())
        return await self._write(job_id, attempt, values)

    async def fail(self, job_id: str, attempt: int, *, code: str, message: str) -> Renewal:
        """End as failed for good, or as cancelled when that was asked for before."""
        values = transitions.failed(code=code, message=message, **self._ending())
        return await self._write(job_id, attempt, values)

    async def cancelled(self, job_id: str, attempt: int) -> Renewal:
        """The owner has stopped the work, as asked."""
        return await self._write(job_id, attempt, transitions.cancelled(**self._ending()))

    async def release(self, job_id: str, attempt: int, *, delay_s: float = 0) -> Renewal:
        """Give an unfinished job back (drain, shutdown, no storage): no failure, and the next claim
        after `delay_s` takes it."""
        values = transitions.released(delay_s=delay_s, **self._ending())
        return await self._write(job_id, attempt, values)

    async def retry(
        self,
        job_id: str,
        attempt: int,
        *,
        reason: str,
        max_attempts: int,
        max_failures: int | None = None,
        delay_s: float = 0,
    ) -> Renewal:
        """This attempt failed in a way that another may not: queue again after `delay_s`.

        The `max_attempts`-th failed attempt since the last checkpoint, or the `max_failures`-th in
        all, fails the job with "too_many_attempts" instead.
        """
        values = transitions.attempt_failed(
            reason=reason,
            max_attempts=max_attempts,
            max_failures=max_failures,
            delay_s=delay_s,
            **self._ending(),
        )
        return await self._write(job_id, attempt, values)

    # --- statements ---------------------------------------------------------------------------

    @runs_to_its_end
    async def _write(self, job_id: str, attempt: int, values: Mapping[str, Any]) -> Renewal:
        """The fence: changes nothing unless the job is in progress under this attempt."""
        update = (
            sa.update(jobs)
            .where(_c.id == job_id, _c.attempt == attempt, _c.status == IN_PROGRESS)
            .values(**values)
            .returning(_c.id, _c.status, _c.announced, _c.cancel_requested)
        )
        async with self._database.transaction(write=True) as connection:
            row = (await connection.execute(update)).first()
            await self._announce(connection, [row] if row else [])
        if row is None:
            return Renewal(held=False)
        return Renewal(held=True, cancel_requested=row.cancel_requested, status=row.status)

    async def _announce(
        self, connection: AsyncConnection, written: Collection[sa.Row[Any]]
    ) -> None:
        """In the transaction that wrote these rows, of which some may have ended."""
        if self._announces_ends:
            ended = [(row.id, row.status) for row in written if row.announced]
            await webhook_store.announce(connection, ended, now=self._clock())

    def _ending(self, now: float | None = None) -> dict[str, Any]:
        """When an event happens, and how long a job that it ends is kept."""
        now = self._clock() if now is None else now
        return {"now": now, "retention_s": self._retention_s}


def _is_job(job_id: str, owner: str | None) -> sa.ColumnElement[bool]:
    if not is_storable(job_id):  # an id straight from a URL, which PostgreSQL may refuse to compare
        return sa.false()
    return _c.id == job_id if owner is None else sa.and_(_c.id == job_id, _c.owner == owner)


def _job(row: sa.Row[Any]) -> Job:
    return Job(**row._mapping)


async def _first_job(connection: AsyncConnection, statement: sa.Executable) -> Job | None:
    row = (await connection.execute(statement)).first()
    return None if row is None else _job(row)


async def _queue_size(connection: AsyncConnection) -> tuple[int, float]:
    total_s = sa.func.coalesce(sa.func.sum(_c.predicted_s), 0.0)
    query = sa.select(sa.func.count(), total_s).where(_c.status == QUEUED)
    num_jobs, predicted_s = (await connection.execute(query)).one()
    return num_jobs, predicted_s


def _same_request(earlier: Job, new: NewJob) -> Job:
    if earlier.request_hash != new.request_hash:
        raise IdempotencyConflict(
            f"idempotency key {new.idempotency_key!r} was used before with another request"
        )
    return earlier
