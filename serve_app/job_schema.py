"""What a job is: the values that travel to and from the job store, and its errors.

Owns the names of the job's fields and statuses and the store's error tree. Knows nothing about
SQL, HTTP or stages; `jobs.py` keeps these values in a table.

    JobStoreError
     ├── QueueFull             submit again after `retry_after_s`
     ├── IdempotencyConflict   one key, two different requests
     ├── JobNotFound           the `after` of a page is no job of this owner
     └── StoreUnavailable      the database does not answer (retryable)
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
FINISHED = (COMPLETED, FAILED, CANCELLED)

TOO_MANY_ATTEMPTS = "too_many_attempts"
MIN_RETRY_AFTER_S = 1.0
UNPREDICTED_RETRY_AFTER_S = 30.0  # where no profile says how long a job takes
MAX_PRIORITY = 2**31 - 1  # the column is a 32-bit integer


def new_job_id() -> str:
    """`video_` and 24 hex digits. Known before submit, so inputs can be stored under it first."""
    return f"video_{secrets.token_hex(12)}"


def is_storable(text: str) -> bool:
    """Whether a database takes this text: PostgreSQL has no NUL, UTF-8 has no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def replace_unstorable(text: str) -> str:
    """The same text for a message that must be stored whatever it holds."""
    return text.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a client asked for. `input_image` and `last_image` are artifact keys.

    `cinematography` holds the choices that are composed into the prompt, {field: value}.
    `remixed_from` and `branch_from` are ids of other jobs; `extend_prompt` asks for a
    `revised_prompt`, `preview` for a look at the boundary, `announced` whether a
    webhook tells its end.
    """

    id: str = field(default_factory=new_job_id)
    owner: str = ""  # "" = the service runs without API keys
    user: str | None = None
    model: str
    prompt: str
    negative_prompt: str | None = None
    params: dict[str, Any]  # dataclasses.asdict(VideoParams)
    num_steps: int
    predicted_s: float
    priority: int = 0  # higher first
    input_image: str | None = None
    last_image: str | None = None
    idempotency_key: str | None = None
    request_hash: str | None = None
    cinematography: dict[str, str] | None = None
    extend_prompt: bool = False
    remixed_from: str | None = None
    branch_from: str | None = None
    preview: bool = False
    announced: bool = True
    # A branch has these from the beginning: its source's state is its own first checkpoint.
    checkpoint: str | None = None  # artifact key
    checkpoint_step: int = 0
    boundary_state: str | None = None  # artifact key

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str) and not is_storable(value):
                raise ValueError(f"{name} holds a NUL character or half a surrogate pair")
        if abs(self.priority) > MAX_PRIORITY:
            raise ValueError(f"priority {self.priority} is outside +-{MAX_PRIORITY}")


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """A job as its row stands: what was asked, and what has come of it. Times are unix seconds.

    `attempt` is the fencing token: the number of claims so far, whatever became of them.
    `failures` counts the attempts that ended badly since the last checkpoint, `total_failures` all
    of them; both are capped, and nothing else is.
    `revised_prompt` is what the experts were given instead of `prompt`, `prompt_note` why it is not
    there although asked for. `boundary_state` is the artifact that a branch begins with.
    """

    status: JobStatus
    stage: str | None
    step: int
    progress: int  # 0..100
    attempt: int
    failures: int
    total_failures: int
    worker: str | None
    lease_until: float | None
    cancel_requested: bool
    artifacts: dict[str, Any]
    error_code: str | None
    error_message: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    revised_prompt: str | None
    prompt_note: str | None

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What the owner of a lease learns from a write. Truthy while the lease is held.

    `status`: what the write made of the job; None when it was refused, or was only a renewal.
    """

    held: bool
    cancel_requested: bool = False
    status: JobStatus | None = None

    def __bool__(self) -> bool:
        return self.held


class JobStoreError(Exception):
    """Root of the errors that the job store raises. `retryable` is the whole retry policy."""

    retryable = False


class QueueFull(JobStoreError):
    """The queue bound is reached."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IdempotencyConflict(JobStoreError):
    """The idempotency key was used before, with another request."""


class JobNotFound(JobStoreError):
    """No such job, or not one of this owner's."""


class StoreUnavailable(JobStoreError):
    """The database does not answer now."""

    retryable = True


def check_room(
    new: NewJob,
    num_queued: int,
    queued_s: float,
    max_queued_jobs: int | None,
    max_queued_s: float | None,
) -> None:
    """Raise QueueFull; its wait assumes that one job runs at a time."""
    if max_queued_jobs is not None and num_queued + 1 > max_queued_jobs:
        wait_s = queued_s / num_queued if num_queued else new.predicted_s
        raise QueueFull(
            f"the queue is full: {num_queued} jobs wait, the limit is {max_queued_jobs}",
            retry_after_s=max(MIN_RETRY_AFTER_S, wait_s or UNPREDICTED_RETRY_AFTER_S),
        )
    if max_queued_s is not None and num_queued and queued_s + new.predicted_s > max_queued_s:
        raise QueueFull(
            f"the queue is full: {queued_s:.0f} s of work wait and this job is predicted to take "
            f"{new.predicted_s:.0f} s, the limit is {max_queued_s:.0f} s",
            retry_after_s=max(MIN_RETRY_AFTER_S, queued_s + new.predicted_s - max_queued_s),
        )
