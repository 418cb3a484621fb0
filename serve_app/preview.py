"""Preview: a look at a job's boundary, made beside its low-noise expert.

Owns when it is made and what becomes of its failure: nothing. The job neither waits for it (but for
a moment at its very end) nor fails with it. Knows nothing about how it is decoded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from serve_app.job_schema import Job
from serve_app.jobs import JobStore
from serve_app.stages import StageResult

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""A finished video waits so long for a preview that is still being made. The VAE took it first, so
this matters only with several VAE replicas."""


class Preview:
    """Of one attempt. Does nothing unless the job asks for a preview and has none yet."""

    def __init__(self, job: Job, store: JobStore) -> None:
        self._job = job
        self._store = store
        self._key: str | None = job.artifacts.get("preview")
        self._task: asyncio.Task[None] | None = None

    def start(self, make: Callable[[], Awaitable[StageResult]]) -> None:
        if self._job.preview and self._key is None and self._task is None:
            self._task = asyncio.create_task(self._run(make))

    async def artifacts(self) -> dict[str, Any]:
        """Those of the finished job; at once, or after the grace."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=GRACE_S)
        return {} if self._key is None else {"preview": self._key}

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self, make: Callable[[], Awaitable[StageResult]]) -> None:
        job = self._job
        try:
            made = (await make()).artifacts
            if await self._store.record_artifacts(job.id, job.attempt, artifacts=made):
                self._key = made["preview"]
        except Exception as error:  # a job without its preview is worth more than none
            logger.warning("%s: no preview: %s", job.id, error, exc_info=error)
