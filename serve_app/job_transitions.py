"""What each event makes of a job's row: the SQL values to write, evaluated by the database.

    queued --claim--> in_progress --complete--> completed (cancelled, if that was asked for)
      ^                   |--------fail-------> failed    (cancelled, if that was asked for)
      |--release, retry---|---failure no. n---> failed with "too_many_attempts"
      |---------------------cancel------------> cancelled

Owns what follows from a change of status: lease, times, error. Knows no connection; `jobs.py` says
which rows the values go to.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from serve_app.job_database import jobs
from serve_app.job_schema import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    IN_PROGRESS,
    QUEUED,
    TOO_MANY_ATTEMPTS,
    replace_unstorable,
)

_c = jobs.c
Values = dict[str, Any]


def claimed(*, worker: str, now: float, lease_s: float) -> Values:
    return {
        "status": IN_PROGRESS,
        "worker": worker,
        "attempt": _c.attempt + 1,
        "lease_until": now + lease_s,
        "started_at": sa.func.coalesce(_c.started_at, now),
    }


def progressed(*, stage: str, step: int, progress: int) -> Values:
    """Nothing changes behind the furthest point so far."""
    forward = sa.or_(_c.progress < progress, sa.and_(_c.progress == progress, _c.step <= step))
    furthest = {"stage": stage, "step": step, "progress": progress}
    return {name: _when(forward, value, _c[name]) for name, value in furthest.items()}


def completed(*, artifacts: dict[str, Any], now: float, retention_s: float | None) -> Values:
    moved = _moved_to(_unless_cancelled(COMPLETED), now=now, retention_s=retention_s)
    progress = _when(_c.cancel_requested, _c.progress, 100)
    return moved | {"artifacts": artifacts, "progress": progress}


def failed(*, code: str, message: str, now: float, retention_s: float | None) -> Values:
    error = (code, replace_unstorable(message))
    return _moved_to(_unless_cancelled(FAILED), now=now, retention_s=retention_s, error=error)


def cancelled(*, now: float, retention_s: float | None) -> Values:
    return _moved_to(sa.literal(CANCELLED), now=now, retention_s=retention_s)


def cancel_asked(*, now: float, retention_s: float | None) -> Values:
    """Ends a job that nobody runs; the owner of a running one will see the mark."""
    nobody_runs_it = sa.or_(_c.status == QUEUED, _c.lease_until <= now)
    moved = _moved_to(_when(nobody_runs_it, CANCELLED, _c.status), now=now, retention_s=retention_s)
    return moved | {"cancel_requested": True}


def released(*, delay_s: float, now: float, retention_s: float | None) -> Values:
    moved = _moved_to(_unless_cancelled(QUEUED), now=now, retention_s=retention_s)
    return moved | {"available_at": now + delay_s}


def attempt_failed(
    *,
    reason: str,
    max_attempts: int,
    max_failures: int | None,
    delay_s: float = 0,
    now: float,
    retention_s: float | None,
) -> Values:
    """Back to the queue, or to the end when this was the `max_attempts`-th failure at one place or
    the `max_failures`-th in all."""
    failures, total = _c.failures + 1, _c.total_failures + 1
    stuck = failures >= max_attempts
    worn_out = sa.false() if max_failures is None else total >= max_failures
    status = _unless_cancelled(_when(sa.or_(stuck, worn_out), FAILED, QUEUED))
    last = f"; the last: {replace_unstorable(reason)}"
    message = sa.case(
        (stuck, "gave up after " + sa.cast(failures, sa.Text) + " failed attempts" + last),
        else_="gave up after " + sa.cast(total, sa.Text) + " failed attempts in all, though it"
        " came further now and then" + last,
    )
    error = (TOO_MANY_ATTEMPTS, message)
    moved = _moved_to(status, now=now, retention_s=retention_s, error=error)
    counted = {"failures": failures, "total_failures": total}
    return moved | counted | {"available_at": now + delay_s}


def _moved_to(
    status: sa.ColumnElement[str],
    *,
    now: float,
    retention_s: float | None,
    error: tuple[str, str | sa.ColumnElement[str]] = ("", ""),
) -> Values:
    """`status`, and what follows from whichever it turns out to be."""
    code, message = error
    # Nobody can see a cancelled job any more, so nothing of it is kept. Typed, because PostgreSQL
    # takes a bare NULL for text.
    kept_until = sa.literal(None if retention_s is None else now + retention_s, sa.Double)
    expires_at = _when(status == CANCELLED, now, kept_until)
    ended, running = status.in_(FINISHED), status == IN_PROGRESS
    return {
        "status": status,
        "worker": _when(running, _c.worker, None),
        "lease_until": _when(running, _c.lease_until, None),
        "completed_at": _when(ended, now, None),
        "expires_at": _when(ended, expires_at, None),
        "error_code": _when(status == FAILED, code, None),
        "error_message": _when(status == FAILED, message, None),
    }


def _unless_cancelled(status: str | sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """A cancel that was accepted before the end wins: its client was told so."""
    return _when(_c.cancel_requested, CANCELLED, status)


def _when(condition: sa.ColumnElement[bool], value: Any, otherwise: Any) -> sa.ColumnElement[Any]:
    return sa.case((condition, value), else_=otherwise)
