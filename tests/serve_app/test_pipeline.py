"""The pipeline's decisions: order, resume, retries, blame, cancellation, lost leases.

The job store and the artifact store are real; stages are fakes with the handles' interface, so
that a test says what each call does. The real stages behind a real Serve are in tests/e2e.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from http_service import WAN_CONFIGS, StorageThatMayBeDown, is_there, resolved
from ray.exceptions import RayTaskError
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.errors import RankDied
from serve_app import attempt, preview, retry_policy
from serve_app import pipeline as module
from serve_app.app import replica_options
from serve_app.artifacts import ArtifactCorrupt, ArtifactMissing, ArtifactUnavailable
from serve_app.jobs import JobStore, NewJob, StoreUnavailable, new_job_id
from serve_app.pipeline import Pipeline
from serve_app.stages import LeaseLost, StageReport, StageResult
from serve_app.topology import ResolvedService
from wan_model.config import WAN_TINY
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule

pytestmark = pytest.mark.anyio
NUM_STEPS = 20
BOUNDARY = build_schedule(VideoParams.for_model(WAN_TINY, num_steps=NUM_STEPS)).boundary_step


class Response:
    """A DeploymentResponse: awaitable, can be cancelled, can be passed on."""

    def __init__(self, work) -> None:
        self.task = asyncio.create_task(work)

    def __await__(self):
        return asyncio.shield(self.task).__await__()

    def cancel(self) -> None:
        self.task.cancel()


class Method:
    def __init__(self, call: Callable) -> None:
        self.call = call

    def remote(self, *args, **kwargs) -> Response:
        return Response(self.call(*args, **kwargs))


class FakeStages:
    """Every stage at once. `on_run` may raise, or wait, before an expert's segment is done."""

    def __init__(self, service) -> None:
        self.artifacts = module.Artifacts(service.artifacts_url)
        self.calls: list[tuple] = []
        self.on_run: Callable | None = None
        self.encode = Method(self._encode)
        self.run = Method(self._run)
        self.decode = Method(self._decode)
        self.on_decode: Callable | None = None
        self.preview = Method(self._preview)
        self.on_preview: Callable | None = None

    async def _encode(self, job, prompt, negative_prompt):
        self.calls.append(("encode", prompt))
        return self._result("TextEncoder", 0, 0)

    async def _run(self, job, text, image, earlier, *, checkpoint, from_step, to_step, store_as):
        if earlier is None and checkpoint is not None:
            await self.artifacts.get_arrays(checkpoint)
        self.calls.append(("run", job.id, from_step, to_step))
        if self.on_run is not None:
            await self.on_run(job, from_step, to_step)
        await self.artifacts.put_arrays(store_as, {"latents": np.zeros(1, np.float32)})
        return dataclasses.replace(
            self._result("Expert", from_step, to_step), artifacts={"checkpoint": store_as}
        )

    async def _decode(self, job, final, checkpoint):
        self.calls.append(("decode", job.id))
        if self.on_decode is not None:
            await self.on_decode(job)
        await self.artifacts.put(f"{job.id}/v", b"mp4")
        return dataclasses.replace(self._result("VAE", 0, 0), artifacts={"video": f"{job.id}/v"})

    async def _preview(self, job, boundary, checkpoint):
        self.calls.append(("preview", job.id, boundary is None, checkpoint))
        if self.on_preview is not None:
            await self.on_preview(job)
        key = f"{job.id}/preview"
        return dataclasses.replace(self._result("VAE", 0, 0), artifacts={"preview": key})

    def _result(self, stage, from_step, to_step) -> StageResult:
        now = time.time()
        report = StageReport(
            stage=stage, replica="r", started_at=now - 1, ended_at=now, busy_s=1.0,
            from_step=from_step, to_step=to_step,
        )  # fmt: skip
        return StageResult(report=report)

    def segments(self, job_id: str) -> list[tuple[int, int]]:
        return [call[2:] for call in self.calls if call[:2] == ("run", job_id)]


@dataclasses.dataclass
class Running:
    pipeline: Pipeline
    stages: FakeStages
    store: JobStore
    service: ResolvedService
    replicas: dict[str, int]

    async def submit(self, model="wan-tiny", **given) -> str:
        params = VideoParams.for_model(WAN_CONFIGS[model], num_steps=NUM_STEPS)
        job = await self.store.submit(
            NewJob(
                model=model, prompt="a cat", params=dataclasses.asdict(params),
                num_steps=NUM_STEPS, predicted_s=1.0, **given,
            )
        )  # fmt: skip
        return job.id

    async def wait(self, job_id: str, *statuses: str, timeout_s: float = 20.0):
        deadline = time.monotonic() + timeout_s
        statuses = statuses or ("completed", "failed", "cancelled")
        while time.monotonic() < deadline:
            job = await self.store.get(job_id)
            if job.status in statuses:
                return job
            await asyncio.sleep(0.02)
        raise AssertionError(f"still {job} after {timeout_s} s")


@contextlib.asynccontextmanager
async def running(
    tmp_path, monkeypatch, *, models=("wan-tiny",), expert=None, pipeline=None, **jobs
):
    """Every expert has one replica, which takes one job at a time; `replicas` may change."""
    monkeypatch.setattr(retry_policy, "RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(module, "READY_POLL_S", 0.05)
    monkeypatch.setattr(module, "ALL_READY_POLL_S", 0.05)
    expert = {"max_active_jobs": 1} | (expert or {})
    service = resolved(
        models={
            name: {"checkpoint": name, "high_noise_expert": expert, "low_noise_expert": expert}
            for name in models
        },
        data_dir=str(tmp_path),
        jobs={"lease_s": 2, "max_attempts": 3} | jobs,
        **({"pipeline": pipeline} if pipeline else {}),
    )
    stages = FakeStages(service)
    pipeline = Pipeline.__new__(Pipeline)
    names = [stage.name for stage in service.stages]
    # Outside Serve there is nobody to ask.
    replicas = dict.fromkeys([*names, "Pipeline"], 1)
    monkeypatch.setattr(module, "_num_running_replicas", lambda: replicas)
    await pipeline.__init__(service, dict.fromkeys(names, stages))
    try:
        yield Running(pipeline, stages, pipeline.store, service, replicas)
    finally:
        await pipeline.__del__()


async def test_a_job_runs_through_its_stages_in_order(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        job_id = await r.submit()
        job = await r.wait(job_id)
        assert job.status == "completed"
        assert r.stages.calls[0] == ("encode", "a cat")
        assert r.stages.calls[-1] == ("decode", job_id)
        segments = r.stages.segments(job_id)
        assert segments[0] == (0, 1), "the first segment measures one step"
        assert [a for a, _ in segments[1:]] == [b for _, b in segments[:-1]]
        assert any(b == BOUNDARY for _, b in segments), "no segment crosses the boundary"
        assert not await is_there(r.stages.artifacts, f"{job_id}/checkpoints/1-1.safetensors")
        assert [t["stage"] for t in job.artifacts["timings"]][0] == "TextEncoder"


async def test_a_dead_group_costs_no_step_that_was_checkpointed(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        deaths = []

        async def die_once(job, from_step, to_step):
            if from_step >= BOUNDARY and not deaths:
                deaths.append(from_step)
                raise RankDied("killed")

        r.stages.on_run = die_once
        job_id = await r.submit()
        job = await r.wait(job_id)
        assert (job.status, job.attempt) == ("completed", 2)
        starts = [a for a, _ in r.stages.segments(job_id)]
        assert starts.count(0) == 1, "it did not start over"
        assert starts[starts.index(deaths[0]) + 1] == deaths[0], "the lost segment came again"


async def test_a_job_that_always_kills_its_group_is_given_up(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:

        async def always(job, from_step, to_step):
            raise RankDied("killed")

        r.stages.on_run = always
        job = await r.wait(await r.submit())
        assert (job.status, job.error_code) == ("failed", "too_many_attempts")
        assert job.attempt == 3


async def test_retries_wait_longer_each_time_but_no_longer_than_a_minute():
    waits_s = [retry_policy.retry_delay_s(failures) for failures in range(20)]
    assert waits_s[:5] == [0.5, 2, 8, 32, 60]
    assert set(waits_s[5:]) == {60}


@pytest.mark.parametrize(
    ("error", "is_down"),
    [(ArtifactUnavailable, True), (ArtifactMissing, False), (ArtifactCorrupt, False)],
)
async def test_only_storage_that_does_not_answer_is_nobodys_fault(error, is_down):
    here = error("artifact 'k'")
    of_a_stage = RayTaskError("run", "Traceback", here).as_instanceof_cause()
    assert retry_policy.is_storage_down(here) == is_down
    assert retry_policy.is_storage_down(of_a_stage) == is_down


async def test_a_job_that_only_waited_when_the_group_died_is_not_blamed(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        left = [6]

        async def unsent(job, from_step, to_step):
            if left[0]:
                left[0] -= 1
                dead = RankDied("killed by another")
                dead.was_sent = False
                raise dead

        r.stages.on_run = unsent
        job = await r.wait(await r.submit())
        assert (job.status, job.failures) == ("completed", 0)
        assert job.attempt == 7


async def test_storage_that_is_gone_is_waited_for_and_costs_no_job_its_attempts(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(attempt, "STORAGE_DELAY_S", 0.1)
    monkeypatch.setattr(module, "CLAIM_PAUSE_S", 0.02)
    folder, aside = tmp_path / "artifacts", tmp_path / "aside"
    async with running(tmp_path, monkeypatch, max_attempts=3, max_failures=4) as r:

        async def lose_storage(job, from_step, to_step):
            if from_step == 1 and not aside.exists():
                folder.rename(aside)
                folder.write_bytes(b"")  # or the next write would make another folder there

        r.stages.on_run = lose_storage
        jobs = [await r.submit() for _ in range(3)]
        async with asyncio.timeout(20):
            while min(job.attempt for job in await r.store.list()) < 5:
                await asyncio.sleep(0.02)
        folder.unlink()
        aside.rename(folder)
        r.stages.on_run = None
        for job_id in jobs:
            job = await r.wait(job_id)
            assert (job.status, job.failures, job.total_failures) == ("completed", 0, 0)
        assert r.stages.segments(jobs[0]).count((0, 1)) == 1, "it went on from its checkpoint"


async def test_while_the_storage_is_gone_the_queue_does_not_go_round(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:

        async def no_storage(job, from_step, to_step):
            raise ArtifactUnavailable("artifact 'k' cannot be reached")

        r.stages.on_run = no_storage
        first = await r.submit()
        await r.wait(first, "in_progress")
        await r.wait(first, "queued")
        second = await r.submit()
        await asyncio.sleep(0.5)
        assert (await r.store.get(first)).attempt == 1
        assert (await r.store.get(second)).attempt == 0


async def test_an_unreadable_checkpoint_means_starting_over(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        state = {"died": False}

        async def die_and_lose(job, from_step, to_step):
            if from_step == 1 and not state["died"]:
                state["died"] = True
                await r.stages.artifacts.delete_prefix(f"{job.id}/checkpoints")
                raise RankDied("killed")

        r.stages.on_run = die_and_lose
        job_id = await r.submit()
        assert (await r.wait(job_id)).status == "completed"
        assert [a for a, _ in r.stages.segments(job_id)].count(0) == 2


async def test_cancelling_stops_the_running_segment(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        stopped = asyncio.Event()

        async def hang(job, from_step, to_step):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                stopped.set()
                raise

        r.stages.on_run = hang
        job_id = await r.submit()
        await r.wait(job_id, "in_progress")
        await asyncio.sleep(0.2)
        await r.store.request_cancel(job_id)
        assert (await r.wait(job_id)).status == "cancelled"
        await asyncio.wait_for(stopped.wait(), 5)


async def test_an_attempt_that_lost_its_lease_writes_nothing(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:

        async def lose(job, from_step, to_step):
            if job.attempt == 1:
                await r.store.release(job.id, 1)  # as if another pipeline had taken it
                raise LeaseLost(job.id)

        r.stages.on_run = lose
        job = await r.wait(await r.submit())
        assert (job.status, job.attempt, job.failures) == ("completed", 2, 0)


async def test_a_wrong_request_fails_with_its_sentence_and_another_error_with_none(
    tmp_path, monkeypatch
):
    async with running(tmp_path, monkeypatch) as r:
        errors = [ValueError("the image is cut short"), ZeroDivisionError("/etc/secret")]

        async def fail(job, from_step, to_step):
            raise errors.pop(0)

        r.stages.on_run = fail
        first = await r.wait(await r.submit())
        assert (first.error_code, first.error_message) == (
            "invalid_request", "the image is cut short",
        )  # fmt: skip
        second = await r.wait(await r.submit())
        assert second.error_code == "internal_error"
        assert "secret" not in second.error_message


async def test_the_most_urgent_job_goes_first_and_then_the_oldest(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        busy = asyncio.Event()

        async def hold_the_first(job, from_step, to_step):
            # The first until all four have come, all others longer than a job needs between two.
            await asyncio.sleep(0.1 if busy.is_set() else 0.6)
            busy.set()

        r.stages.on_run = hold_the_first
        jobs = [await r.submit() for _ in range(3)]
        urgent = await r.submit(priority=5)
        for job_id in (*jobs, urgent):
            assert (await r.wait(job_id)).status == "completed"
        high = [call[1] for call in r.stages.calls if call[0] == "run" and call[2] < BOUNDARY]
        # The first was inside when the others came; it is behind the urgent one for its second.
        assert list(dict.fromkeys(high[1:])) == [urgent, *jobs]


async def test_a_long_queue_of_one_model_leaves_the_others_their_experts(tmp_path, monkeypatch):
    models = ("wan-tiny", "wan-tiny-i2v")
    async with running(tmp_path, monkeypatch, models=models) as r:

        async def hang_the_many(job, from_step, to_step):
            if job.id != alone:
                await asyncio.sleep(60)

        alone = None
        r.stages.on_run = hang_the_many
        many = [await r.submit("wan-tiny") for _ in range(80)]
        alone = await r.submit("wan-tiny-i2v")
        assert (await r.wait(alone)).status == "completed"
        claimed = [job_id for job_id in many if (await r.store.get(job_id)).attempt]
        assert claimed == many[:4], "a place in each of two experts, and two more"


async def test_the_jobs_of_all_models_together_are_bounded(tmp_path, monkeypatch):
    models = ("wan-tiny", "wan-tiny-i2v")
    bound = {"max_active": 3}
    async with running(tmp_path, monkeypatch, models=models, pipeline=bound) as r:

        async def hang(job, from_step, to_step):
            await asyncio.sleep(60)

        r.stages.on_run = hang
        jobs = [await r.submit(model) for model in models for _ in range(3)]
        await r.wait(jobs[2], "in_progress")
        await asyncio.sleep(0.3)
        assert [(await r.store.get(job_id)).attempt for job_id in jobs] == [1, 1, 1, 0, 0, 0]


class Inside:
    """Counts the calls that an expert has at once, and never answers one."""

    def __init__(self, stages: FakeStages) -> None:
        self.num_calls = 0
        stages.on_run = self.hang

    async def hang(self, job, from_step, to_step):
        self.num_calls += 1
        await asyncio.sleep(60)

    async def settled(self, num_calls: int) -> None:
        async with asyncio.timeout(10):
            while self.num_calls < num_calls:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert self.num_calls == num_calls


async def test_an_expert_is_called_as_often_at_once_as_its_replicas_take(tmp_path, monkeypatch):
    expert = {"num_replicas": 3, "max_active_jobs": 2}
    async with running(tmp_path, monkeypatch, expert=expert) as r:
        inside = Inside(r.stages)
        for _ in range(8):
            await r.submit()
        await inside.settled(2)
        r.replicas["HighNoiseExpert"] = 3
        await inside.settled(6)
        r.replicas["Pipeline"] = 2  # the other one has its half: who is inside stays
        await inside.settled(6)
        assert [line.num_places for line in r.pipeline.lines.values()] == [3, 1]


async def test_jobs_that_wait_for_an_autoscaling_expert_make_serve_add_replicas(
    tmp_path, monkeypatch
):
    expert = {"autoscaling": {"max_replicas": 3}, "max_active_jobs": 2}
    async with running(tmp_path, monkeypatch, expert=expert) as r:
        groups = r.service.experts["HighNoiseExpert"]
        inside = Inside(r.stages)
        await r.submit()
        await r.submit()
        await inside.settled(2)
        assert replicas_wanted(groups, inside.num_calls) == 1
        for _ in range(8):
            await r.submit()
        await inside.settled(6)
        assert replicas_wanted(groups, inside.num_calls) == 3


def replicas_wanted(groups, num_calls: int) -> float:
    """By Serve's own policy, with one replica running."""
    context = AutoscalingContext(
        deployment_id=None, deployment_name=groups.name, app_name="wan", current_num_replicas=1,
        target_num_replicas=1, running_replicas=[], total_num_requests=num_calls,
        total_queued_requests=None, aggregated_metrics=None, raw_metrics=None,
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=3, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=None,
        config=AutoscalingConfig(**replica_options(groups)["autoscaling_config"]),
    )  # fmt: skip
    num_replicas, _ = replica_queue_length_autoscaling_policy(context)
    return num_replicas


async def test_a_row_that_is_not_understood_fails_alone(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        bad = await r.store.submit(
            NewJob(model="wan-tiny", prompt="x", params={"unknown": 1}, num_steps=1, predicted_s=1)
        )
        good = await r.submit()
        assert (await r.wait(bad.id)).status == "failed"
        assert (await r.wait(good)).status == "completed"
        r.pipeline.check_health()


async def test_shutting_down_gives_the_jobs_back(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:

        async def hang(job, from_step, to_step):
            await asyncio.sleep(60)

        r.stages.on_run = hang
        job_id = await r.submit()
        await r.wait(job_id, "in_progress")
    store = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    job = await store.get(job_id)
    assert (job.status, job.failures) == ("queued", 0)
    await store.close()


async def test_a_long_outage_of_the_job_store_is_logged_once_a_minute_and_at_its_ends(
    monkeypatch, caplog
):
    seconds = iter(range(1000))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(module, "OUTAGE_POLL_S", 0)
    over = asyncio.Event()
    now = 0.0

    async def a_loop():
        nonlocal now
        now = float(next(seconds))
        if now in range(10, 140):  # a try a second, down from 10 to 140
            raise StoreUnavailable("the disk is full")
        if now > 150:
            over.set()
            await asyncio.Event().wait()

    with caplog.at_level(logging.INFO, logger=module.logger.name):
        looping = asyncio.create_task(module._forever(a_loop))
        await asyncio.wait_for(over.wait(), 10)
    looping.cancel()
    waits = "a_loop waits: the disk is full"
    lines = [r.getMessage() for r in caplog.records if r.name == module.logger.name]
    assert lines == [waits, waits, waits, "a_loop goes on"]


# --- what goes, and when -----------------------------------------------------------------------


async def test_of_a_job_given_up_no_checkpoint_stays(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch, keep_boundary_states=False) as r:

        async def fail(job, from_step, to_step):
            if from_step:
                raise errors[-1]

        r.stages.on_run = fail
        for error in (ZeroDivisionError("for good"), RankDied("three times")):
            errors = [error]
            job = await r.wait(await r.submit())
            assert job.status == "failed"
            await eventually_gone(r.stages.artifacts, job.checkpoint)


async def test_of_a_job_cancelled_at_the_last_moment_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXPIRE_POLL_S", 0.05)
    async with running(tmp_path, monkeypatch) as r:

        async def cancel(job):
            await r.store.request_cancel(job.id)

        r.stages.on_decode = cancel
        job_id = await r.submit()
        await eventually_forgotten(r, job_id)
        assert not (tmp_path / "artifacts" / job_id).exists()


async def test_a_job_is_forgotten_after_its_files_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXPIRE_POLL_S", 0.05)
    async with running(tmp_path, monkeypatch, retention_s=0.5) as r:
        artifacts = r.pipeline.artifacts = StorageThatMayBeDown(str(tmp_path / "artifacts"))
        artifacts.is_down = True
        job_id = await r.submit()
        assert (await r.wait(job_id)).status == "completed"
        await asyncio.sleep(1.0)
        assert await r.store.get(job_id) is not None
        artifacts.is_down = False
        await eventually_forgotten(r, job_id)
        assert not (tmp_path / "artifacts" / job_id).exists()


async def eventually_forgotten(r: Running, job_id: str) -> None:
    async with asyncio.timeout(10):
        while await r.store.get(job_id) is not None:
            await asyncio.sleep(0.02)


# --- the boundary ----------------------------------------------------------------------------


async def test_the_state_at_the_boundary_outlives_the_job(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        job_id = await r.submit()
        job = await r.wait(job_id)
        assert job.boundary_state == f"{job_id}/boundary-1.safetensors"
        assert await is_there(r.stages.artifacts, job.boundary_state)
        await eventually_gone(r.stages.artifacts, f"{job_id}/checkpoints/1-20.safetensors")


async def test_no_boundary_state_is_kept_where_that_is_off(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch, keep_boundary_states=False) as r:
        job_id = await r.submit()
        assert (await r.wait(job_id)).boundary_state is None
        assert not await is_there(r.stages.artifacts, f"{job_id}/boundary-1.safetensors")


async def eventually_gone(artifacts, key: str) -> None:
    deadline = time.monotonic() + 5
    while await is_there(artifacts, key):
        assert time.monotonic() < deadline, f"{key} is still there"
        await asyncio.sleep(0.02)


async def submit_branch(r: Running) -> str:
    job_id = new_job_id()
    state = f"{job_id}/boundary-0.safetensors"
    await r.stages.artifacts.put_arrays(state, {"latents": np.zeros(1, np.float32)})
    return await r.submit(
        id=job_id, branch_from="video_1", checkpoint=state, checkpoint_step=BOUNDARY,
        boundary_state=state,
    )  # fmt: skip


async def test_a_branch_runs_the_low_noise_half_and_survives_a_death_in_it(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        deaths = []

        async def die_at_once(job, from_step, to_step):
            assert job.first_step == BOUNDARY
            if not deaths:
                deaths.append(from_step)
                raise RankDied("killed")

        r.stages.on_run = die_at_once
        job_id = await submit_branch(r)
        job = await r.wait(job_id)
        assert (job.status, job.attempt) == ("completed", 2)
        assert [a for a, _ in r.stages.segments(job_id)][:2] == [BOUNDARY, BOUNDARY]
        assert job.boundary_state == f"{job_id}/boundary-0.safetensors"
        assert await is_there(r.stages.artifacts, job.boundary_state), "branches of it need it"


async def test_a_branch_whose_state_is_gone_fails_in_plain_words(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        job_id = new_job_id()
        key = f"{job_id}/boundary-0.safetensors"
        await r.submit(
            id=job_id, branch_from="video_1", checkpoint=key, checkpoint_step=BOUNDARY,
            boundary_state=key,
        )  # fmt: skip
        job = await r.wait(job_id)
        assert (job.status, job.error_code) == ("failed", "boundary_state_gone")
        assert "branch from the video again" in job.error_message
        assert r.stages.segments(job_id) == []


async def test_an_unreadable_checkpoint_after_the_boundary_costs_only_the_way_from_there(
    tmp_path, monkeypatch
):
    async with running(tmp_path, monkeypatch) as r:
        state = {"died": False}

        async def die_and_lose(job, from_step, to_step):
            if from_step > BOUNDARY and not state["died"]:
                state["died"] = True
                await r.stages.artifacts.delete_prefix(f"{job.id}/checkpoints")
                raise RankDied("killed")

        r.stages.on_run = die_and_lose
        job_id = await r.submit()
        assert (await r.wait(job_id)).status == "completed"
        starts = [a for a, _ in r.stages.segments(job_id)]
        assert (starts.count(0), starts.count(BOUNDARY)) == (1, 2)


async def test_a_preview_is_there_while_the_low_noise_expert_goes_on(tmp_path, monkeypatch):
    async with running(tmp_path, monkeypatch) as r:
        seen = asyncio.Event()

        async def wait_for_the_preview(job, from_step, to_step):
            if from_step >= BOUNDARY:
                await asyncio.wait_for(seen.wait(), 10)

        r.stages.on_run = wait_for_the_preview
        job_id = await r.submit(preview=True)
        while not (job := await r.store.get(job_id)).artifacts:
            await asyncio.sleep(0.02)
        assert (job.status, job.artifacts) == ("in_progress", {"preview": f"{job_id}/preview"})
        seen.set()
        job = await r.wait(job_id)
        assert {"preview", "video"} <= set(job.artifacts)
        assert [c for c in r.stages.calls if c[0] == "preview"] == [
            ("preview", job_id, False, f"{job_id}/boundary-1.safetensors")
        ]


async def test_a_preview_neither_delays_nor_fails_its_job(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "GRACE_S", 0.2)
    async with running(tmp_path, monkeypatch) as r:
        stopped = asyncio.Event()

        async def fail(job):
            raise RankDied("the VAE died")

        async def hang(job):
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        for on_preview in (fail, hang):
            r.stages.on_preview = on_preview
            job = await r.wait(await r.submit(preview=True))
            assert (job.status, job.attempt) == ("completed", 1)
            assert "preview" not in job.artifacts
        await asyncio.wait_for(stopped.wait(), 5)


async def test_an_attempt_after_the_boundary_makes_the_preview_that_is_missing(
    tmp_path, monkeypatch
):
    async with running(tmp_path, monkeypatch) as r:
        died = []

        async def fail_once(job):
            if not died:
                raise RankDied("the VAE died")

        async def die_once(job, from_step, to_step):
            if from_step > BOUNDARY and not died:
                died.append(from_step)
                raise RankDied("killed")

        r.stages.on_preview, r.stages.on_run = fail_once, die_once
        job = await r.wait(await r.submit(preview=True))
        assert "preview" in job.artifacts
        previews = [c[2:] for c in r.stages.calls if c[0] == "preview"]
        assert previews == [(False, job.boundary_state), (True, job.boundary_state)]
