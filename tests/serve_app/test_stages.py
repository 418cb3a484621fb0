"""A stage by hand, without Serve: when it is ready, and how long its steps may take."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from cluster.deadline import FLOOR_S
from cluster.spec import GroupSpec
from serve_app.jobs import JobStore, NewJob
from serve_app.stages import (
    Expert,
    JobCancelled,
    JobTicket,
    StageReport,
    StageResult,
    StageStores,
)
from wan_model.config import WAN_TINY
from wan_model.params import VideoParams

pytestmark = pytest.mark.anyio
SPEC = GroupSpec(engine="not:Used", start_timeout_s=50, step_timeout_s=500)


class RecordingGroup:
    """Answers like a group of one expert, in no time; `ready` holds its warm-up back."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float | None]] = []
        self.ready = asyncio.Event()
        self.dead = None
        self.step_index = 0
        self.on_step: Callable[[int], Awaitable[None]] | None = None

    async def start(self, spec, on_death):
        return self

    async def call(self, method, *args, ranks="all", timeout_s=None, **kwargs):
        self.calls.append((method, timeout_s))
        if method == "warm_up":
            await self.ready.wait()
        if method == "step":
            self.step_index += 1
            if self.on_step is not None:
                await self.on_step(self.step_index)
            return {"step_index": self.step_index, "seconds": 0.1, "reused": False}
        return {"latents": np.zeros(1, np.float32)}

    async def aclose(self):
        pass


async def open_expert(tmp_path, group) -> Expert:
    stores = StageStores(
        job_store_url=f"sqlite:///{tmp_path / 'jobs.sqlite'}", artifacts_url=str(tmp_path)
    )
    expert = Expert.__new__(Expert)
    await expert.__init__("HighNoiseExpert", SPEC, stores, group.start)
    return expert


async def test_a_stage_is_ready_when_its_group_has_warmed_up_and_not_before(tmp_path):
    group = RecordingGroup()
    opening = asyncio.create_task(open_expert(tmp_path, group))
    while not group.calls:
        await asyncio.sleep(0.01)
    assert group.calls == [("warm_up", SPEC.start_timeout_s)]
    assert not opening.done()
    group.ready.set()
    expert = await asyncio.wait_for(opening, 5)
    await expert.__del__()


async def test_steps_have_the_configured_time_until_steps_of_their_kind_were_measured(tmp_path):
    group = RecordingGroup()
    group.ready.set()
    expert = await open_expert(tmp_path, group)
    async with RunningJob(tmp_path, width=128) as small, RunningJob(tmp_path, width=256) as large:
        await run_steps(expert, small, 3)
        await run_steps(expert, large, 1)
        await run_steps(expert, small, 1)
    deadlines = [timeout_s for method, timeout_s in group.calls if method == "step"]
    assert deadlines == [500, 500, FLOOR_S, 500, FLOOR_S]
    await expert.__del__()


@pytest.mark.parametrize("cancelled_in_step", [1, 4])
async def test_a_cancelled_job_frees_the_group_within_one_step(tmp_path, cancelled_in_step):
    group = RecordingGroup()
    group.ready.set()
    expert = await open_expert(tmp_path, group)
    async with RunningJob(tmp_path, width=128) as job:

        async def cancel(step_index: int) -> None:
            if step_index == cancelled_in_step:
                assert await expert.store.request_cancel(job.id)

        group.on_step = cancel
        with pytest.raises(JobCancelled):
            await run_steps(expert, job, 20)
    assert group.step_index <= cancelled_in_step + 1
    assert group.calls[-1][0] == "close"
    await expert.__del__()


class RunningJob:
    """A claimed job in the table, as a ticket."""

    def __init__(self, tmp_path, *, width: int) -> None:
        self.url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        self.params = VideoParams.for_model(WAN_TINY, width=width, num_steps=20)

    async def __aenter__(self) -> JobTicket:
        self.store = await JobStore.open(self.url)
        params = dataclasses.asdict(self.params)
        await self.store.submit(
            NewJob(model="m", prompt="p", params=params, num_steps=20, predicted_s=1.0)
        )
        job = await self.store.claim("w", lease_s=60, max_attempts=3)
        return JobTicket(id=job.id, attempt=job.attempt, rank=(0, job.created_at), params=params)

    async def __aexit__(self, *_) -> None:
        await self.store.close()


async def run_steps(expert: Expert, job: JobTicket, num_steps: int) -> None:
    report = StageReport(stage="TextEncoder", replica="r", started_at=0, ended_at=1, busy_s=1)
    await expert.run(
        job, StageResult(report=report), None, None,
        checkpoint=None, from_step=0, to_step=num_steps, store_as=f"{job.id}/state.safetensors",
    )  # fmt: skip
