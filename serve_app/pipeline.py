"""The pipeline: claims jobs and keeps their leases while its attempts take them through the stages.

Owns how many jobs of each model are in flight, their lines in front of the experts, leases and
expiry. Knows nothing about HTTP, how a stage computes or what an attempt does (attempt.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.artifacts import Artifacts
from serve_app.attempt import Attempt, ModelStages, cleaned_up
from serve_app.jobs import JobStore, StoreUnavailable
from serve_app.line import Line
from serve_app.logs import log_as_serve_does
from serve_app.prompt_extension import Extender
from serve_app.retry_policy import INTERNAL_MESSAGE
from serve_app.stages import JobCancelled, LeaseLost
from serve_app.topology import JobSettings, ResolvedService
from serve_app.webhooks import WebhookSender

logger = logging.getLogger(__name__)

JOBS_BESIDE_EXPERTS = 2
"""Of each model, more than its experts have places for: while some are encoded or decoded, none of
the experts' places is empty."""
CLAIM_POLL_S = 0.1
CLAIM_PAUSE_S = 5.0
"""Without storage every claimed job only comes back: too short, and the whole queue goes round."""
RENEW_AT_MOST_S = 1.0
EXPIRE_POLL_S = 60.0
OUTAGE_POLL_S = 1.0
OUTAGE_LOG_S = 60.0
READY_POLL_S = 1.0
ALL_READY_POLL_S = 5.0  # Serve's answer costs tens of milliseconds here and in its controller


class Pipeline:
    """One replica: up to `max_active` jobs in flight, each with its own asyncio task.

    A model whose experts have their fill claims no more: were they all one model's, the experts of
    the others would be idle. `handles` maps deployment names (topology.py) to Serve handles.
    """

    async def __init__(self, service: ResolvedService, handles: Mapping[str, Any]) -> None:
        log_as_serve_does()
        self.handles = dict(handles)
        self.experts = service.experts
        self.lines = {name: Line(groups.num_places(1)) for name, groups in self.experts.items()}
        self.models = {
            name: ModelStages(
                served=model.served,
                text_encoder=handles[model.text_encoder],
                vae=handles[model.vae],
                experts={e.value: handles[g.name] for e, g in model.experts.items()},
                lines={e.value: self.lines[g.name] for e, g in model.experts.items()},
                segment_s={e.value: g.segment_s for e, g in model.experts.items()},
            )
            for name, model in service.models.items()
        }
        self.extender: Extender | None = None
        if (groups := service.prompt_extender) is not None:
            self.extender = Extender(
                handle=handles[groups.name], max_s=groups.max_wait_s + groups.timeout_s
            )
        self.settings: JobSettings = service.jobs
        self.max_active = service.pipeline.max_active
        self.artifacts = Artifacts(service.artifacts_url)
        self.store = await JobStore.open(
            service.job_store_url,
            retention_s=service.jobs.retention_s,
            announces_ends=service.webhooks is not None,
        )
        self.webhooks = service.webhooks and WebhookSender(service.webhooks, self.store.deliveries)
        self.worker = f"pipeline-{uuid.uuid4().hex[:12]}"
        self.step_s: dict[tuple[str, str, int], float] = {}
        self.attempts: dict[Attempt, asyncio.Task] = {}
        self.claims_from = time.monotonic()
        self.ready = dict.fromkeys(handles, False)
        loops = [self._claim_loop, self._renew_loop, self._expire_loop, self._ready_loop]
        if self.webhooks is not None:
            loops.append(self.webhooks.deliver_due)
        self.loops = [asyncio.create_task(_forever(loop)) for loop in loops]
        self.open = True

    async def readiness(self) -> dict[str, bool]:
        """For every stage, whether it has a running replica: its group has really run once."""
        return self.ready

    def check_health(self) -> None:
        ended = [loop for loop in self.loops if loop.done()]
        if ended:
            raise RuntimeError(f"a loop of the pipeline ended: {ended}")

    def __del__(self) -> Awaitable[None] | None:
        """Serve calls and awaits this once, Python calls it again at the end: that does nothing."""
        if getattr(self, "open", False):
            self.open = False
            return self._close()
        return None

    async def _close(self) -> None:
        """Gives the unfinished jobs back, so that another replica need not wait for the leases."""
        for loop in self.loops:
            loop.cancel()
        await asyncio.wait(self.loops)  # a claim that was under way gives its job back
        for attempt, task in list(self.attempts.items()):
            task.cancel()
            with contextlib.suppress(StoreUnavailable):
                await self.store.release(attempt.job.id, attempt.job.attempt)
        if self.webhooks is not None:
            await self.webhooks.close()
        await self.store.close()

    def pause_claims(self) -> None:
        """For an attempt that found no storage: another job would find none either."""
        self.claims_from = time.monotonic() + CLAIM_PAUSE_S

    async def _claim_loop(self) -> None:
        while (pause_s := self.claims_from - time.monotonic()) > 0:
            await asyncio.sleep(pause_s)
        job = None
        if models := self._models_with_room():
            job = await self.store.claim(
                self.worker,
                lease_s=self.settings.lease_s,
                max_attempts=self.settings.max_attempts,
                max_failures=self.settings.max_failures,
                models=models,
            )
        if job is None:
            await asyncio.sleep(CLAIM_POLL_S)
            return
        try:
            attempt = Attempt(self, job)
        except (TypeError, ValueError) as error:  # a row of another version: it fails alone
            logger.warning("%s is not understood: %s", job.id, error)
            await self.store.fail(
                job.id, job.attempt, code="internal_error", message=INTERNAL_MESSAGE
            )
            return
        task = asyncio.create_task(attempt.run())
        self.attempts[attempt] = task
        task.add_done_callback(lambda _: self.attempts.pop(attempt))

    def _models_with_room(self) -> list[str]:
        if len(self.attempts) >= self.max_active:
            return []
        num_active = Counter(attempt.job.model for attempt in self.attempts)
        return [
            name
            for name, stages in self.models.items()
            if num_active[name]
            < sum(line.num_places for line in stages.lines.values()) + JOBS_BESIDE_EXPERTS
        ]

    async def _renew_loop(self) -> None:
        """Keeps the leases, and stops attempts that lost theirs or whose job is cancelled."""
        attempts: list[Attempt] = []
        while not attempts:  # with none, nothing would be asked of the job store
            await asyncio.sleep(min(RENEW_AT_MOST_S, self.settings.lease_s / 3))
            attempts = list(self.attempts)
        # After a lost lease there may be two of one job here: the later one has the lease.
        numbers = {attempt.job.id: attempt.job.attempt for attempt in attempts}
        renewals = await self.store.renew_many(numbers, lease_s=self.settings.lease_s)
        for attempt in attempts:
            renewal = renewals[attempt.job.id]
            held = renewal.held and numbers[attempt.job.id] == attempt.job.attempt
            if (held and not renewal.cancel_requested) or attempt.stop is not None:
                continue
            if (task := self.attempts.get(attempt)) is not None:
                attempt.stop = JobCancelled if held else LeaseLost
                task.cancel()

    async def _expire_loop(self) -> None:
        for job in await self.store.expired():
            if await cleaned_up(self.artifacts.delete_prefix(job.id)):
                await self.store.delete(job.id)
        await asyncio.sleep(EXPIRE_POLL_S)

    async def _ready_loop(self) -> None:
        # Asks Serve, not the stages: a question to a busy stage would wait behind its jobs.
        try:
            running = await asyncio.to_thread(_num_running_replicas)
        except (RayError, RayServeException) as error:
            logger.warning("the stages' readiness is not known: %s", error)
        else:
            self.ready = {name: running.get(name, 0) > 0 for name in self.handles}
            num_pipelines = max(1, running.get("Pipeline", 1))
            for name, line in self.lines.items():
                num_places = self.experts[name].num_places(running.get(name, 0))
                line.resize(num_places // num_pipelines)
        await asyncio.sleep(ALL_READY_POLL_S if all(self.ready.values()) else READY_POLL_S)


def _num_running_replicas() -> dict[str, int]:
    """By deployment. A replica runs once its constructor is done, its group's warm-up included."""
    app_name = serve.get_replica_context().app_name
    app = serve.status().applications.get(app_name)
    return {
        name: deployment.replica_states.get("RUNNING", 0)
        for name, deployment in (app.deployments.items() if app else ())
    }


async def _forever(loop: Any) -> None:
    """Runs `loop` again and again; a job store that does not answer is waited for.

    An outage is logged as it begins and ends, and once a minute meanwhile.
    """
    logged_at: float | None = None
    while True:
        try:
            await loop()
        except StoreUnavailable as error:
            if logged_at is None or time.monotonic() >= logged_at + OUTAGE_LOG_S:
                logger.warning("%s waits: %s", loop.__name__, error)
                logged_at = time.monotonic()
            await asyncio.sleep(OUTAGE_POLL_S)
        else:
            if logged_at is not None:
                logger.warning("%s goes on", loop.__name__)
                logged_at = None
