"""Whatever ends a group on Ray: noticed at once, told to every caller, nothing left behind."""

import asyncio
import os
import signal
import time

import pytest
import ray
import toy_engine

from cluster.errors import DeadlinePassed, GroupDead, RankDied, RanksDiverged
from cluster.ray_group import RayGroup
from cluster.spec import GroupSpec

DETECTION_S = 1.0


def spec_of(num_workers, **given):
    given.setdefault("engine_kwargs", {"num_workers": num_workers})
    return GroupSpec(
        engine="toy_engine:Toy",
        num_workers=num_workers,
        num_cpus_per_worker=0.5,
        start_timeout_s=given.pop("start_timeout_s", 60),
        step_timeout_s=20,
        divergence_grace_s=0.5,
        **given,
    )


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition, within_s=5.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


def test_a_rank_killed_during_a_collective_is_told_to_every_caller_within_a_second(
    ray_cluster, run
):
    async def kill_while_calls_wait():
        deaths = []
        group = await RayGroup.start(spec_of(2), on_death=deaths.append)
        calls = [
            asyncio.create_task(group.call("late_collective", late_rank=1, sleep_s=15)),
            asyncio.create_task(group.call("note", 2)),
            asyncio.create_task(group.call("logs")),
        ]
        await asyncio.sleep(0.3)
        os.kill(group.workers[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - killed < DETECTION_S
        assert [type(result) for result in results] == [RankDied] * 3
        assert f"rank 1 of the group of 2 x toy_engine:Toy (process {group.workers[1].pid}" in str(
            results[0]
        )
        assert all(result.retryable for result in results)
        await until(lambda: deaths)
        assert isinstance(group.dead, RankDied)
        assert deaths == [group.dead], "told once"
        await until(lambda: not any(is_running(info.pid) for info in group.workers))
        await group.aclose()

    run(kill_while_calls_wait())


def test_a_rank_that_raises_does_not_leave_the_others_waiting_in_a_collective(ray_cluster, run):
    async def raise_beside_a_collective():
        group = await RayGroup.start(spec_of(2))
        with pytest.raises(RanksDiverged, match="only I saw it") as caught:
            await group.call("stuck_collective", absent_rank=1)
        assert isinstance(caught.value.__cause__, toy_engine.Refused)
        await until(lambda: not any(is_running(info.pid) for info in group.workers))
        await group.aclose()

    run(raise_beside_a_collective())


def test_the_death_of_an_idle_worker_is_noticed_within_a_second(ray_cluster, run):
    async def kill_idle():
        deaths = []
        group = await RayGroup.start(spec_of(1), on_death=deaths.append)
        await group.check()
        os.kill(group.workers[0].pid, signal.SIGKILL)
        await until(lambda: deaths, within_s=DETECTION_S)
        with pytest.raises(RankDied):
            await group.check()
        await group.aclose()

    run(kill_idle())


def test_a_call_past_its_deadline_ends_the_workers(ray_cluster, run):
    async def too_slow():
        group = await RayGroup.start(spec_of(1))
        started = time.monotonic()
        with pytest.raises(DeadlinePassed, match=r"note\(\) took over 0.5 s"):
            await group.call("note", 1, sleep_s=15, timeout_s=0.5)
        assert time.monotonic() - started < 0.5 + DETECTION_S
        await until(lambda: not is_running(group.workers[0].pid))
        await group.aclose()

    run(too_slow())


def test_an_engine_that_only_one_rank_can_build_raises_its_own_error(ray_cluster, run):
    with pytest.raises(toy_engine.Refused, match="rank 1 refuses"):
        run(RayGroup.start(spec_of(2, engine_kwargs={"num_workers": 2, "fail_at_start": 1})))


def test_a_group_that_finds_no_room_gives_up_and_leaves_nothing_pending(ray_cluster, run):
    spec = spec_of(1, num_gpus_per_worker=1, start_timeout_s=1.0)
    hog = ray.util.placement_group([{"GPU": 4}])
    assert hog.wait(5)
    try:
        with pytest.raises(GroupDead, match=r"did not start in 1 s .*'GPU': 1.0"):
            run(RayGroup.start(spec))
    finally:
        ray.util.remove_placement_group(hog)
    states = {table["state"] for table in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


def test_a_closed_group_returns_its_resources(ray_cluster, run):
    async def start_and_close():
        group = await RayGroup.start(spec_of(1, num_gpus_per_worker=1))
        await until(lambda: ray.available_resources().get("GPU") == 3)
        await group.aclose()
        await until(lambda: ray.available_resources().get("GPU") == 4)
        await until(lambda: not is_running(group.workers[0].pid))

    run(start_and_close())
