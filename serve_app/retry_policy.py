"""What a failed attempt means for its job: blame, another try, when, and in which words.

Owns the policy, which reads `retryable` off the error. Knows nothing about stages or the job table.
"""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import GroupDead
from serve_app.artifacts import ArtifactError

RETRY_DELAY_S = 0.5
RETRY_DELAY_GROWTH = 4  # per failure: the fifth attempt begins 40 s after the first
MAX_RETRY_DELAY_S = 60.0
STORAGE_DELAY_S = 30.0
"""How long a job waits that could not be stored: storage is waited for, however long it is gone."""

INTERNAL_MESSAGE = "the video could not be made because of an error in the service"
BRANCH_LOST_MESSAGE = (
    "the stored state that this branch begins with cannot be read: branch from the video again"
)


def is_blameless(error: BaseException) -> bool:
    """The group died while this job only waited for its turn in it."""
    cause = getattr(error, "cause", error)
    return isinstance(cause, GroupDead) and not cause.was_sent


def is_storage_down(error: BaseException) -> bool:
    """The artifact store does not answer: no job is to blame, and none would fare better."""
    cause = getattr(error, "cause", error)
    return isinstance(cause, ArtifactError) and cause.retryable


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may go better: the error says so itself, or a process was lost."""
    if isinstance(error, RayActorError | RayServeException):
        return True
    if hasattr(error, "retryable"):
        return bool(error.retryable)
    cause = getattr(error, "cause", None)
    if cause is not None and cause is not error:
        return is_retryable(cause)
    return isinstance(error, RayError) and cause is None


def retry_delay_s(failures: int) -> float:
    """How long a job waits that has failed `failures` times before, since its last checkpoint."""
    return min(MAX_RETRY_DELAY_S, RETRY_DELAY_S * RETRY_DELAY_GROWTH**failures)


def reason_of(error: BaseException) -> str:
    """For the client: no path, no host."""
    if isinstance(error, ArtifactError):
        return "the artifact store failed"
    return "a process that worked on it was lost"
