"""A Serve replica that leads a group: its workers die with it, and Serve replaces both."""

import os
import signal
import time

import numpy as np
import pytest
from ray import serve
from ray.exceptions import RayActorError

from cluster.errors import GroupDead
from cluster.group import exit_on_death
from cluster.ray_group import RayGroup
from cluster.spec import GroupSpec

SPEC = GroupSpec(
    engine="toy_engine:Toy",
    engine_kwargs={"device": "auto", "num_workers": 2},
    num_workers=2,
    num_gpus_per_worker=1,
    num_cpus_per_worker=0.5,
    start_timeout_s=60,
    step_timeout_s=10,
    collective_backend="gloo",
)


@serve.deployment(
    **SPEC.deployment_options(),
    health_check_period_s=1,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=3,
)
class Leader:
    async def __init__(self):
        self.group = await RayGroup.start(SPEC, on_death=exit_on_death())

    async def check_health(self):
        await self.group.check()

    async def call(self, method, *args, **kwargs):
        return await self.group.call(method, *args, **kwargs)

    async def pids(self):
        return os.getpid(), [info.pid for info in self.group.workers]


@pytest.fixture(scope="module")
def leader(serve_running):
    handle = serve.run(Leader.bind(), name="leader", route_prefix=None)
    yield handle
    serve.delete("leader")


def ask(handle, method, *args, within_s=75.0, **kwargs):
    return getattr(handle, method).remote(*args, **kwargs).result(timeout_s=within_s)


def ask_until_replaced(handle, old_pid, within_s=75.0):
    """The new replica's pids, asking again whatever a caller is to retry."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            pids = ask(handle, "pids", within_s=within_s)
        except (GroupDead, RayActorError):
            pids = (old_pid, [])
        if pids[0] != old_pid:
            return pids
        time.sleep(0.05)
    raise AssertionError(f"no new replica within {within_s} s")


def test_a_replica_leads_a_group_on_the_gpus_of_its_placement_group(leader):
    wheres = ask(leader, "call", "wheres")
    assert len({where["gpus"] for where in wheres}) == 2
    assert all(where["device"] == "cuda:0" for where in wheres)
    assert ask(leader, "call", "add_up", [1.0])[0] == 3.0


def test_a_cancelled_caller_leaves_the_group_alive_whenever_it_is_cancelled(leader):
    """Ray cancels what a cancelled task has called and is not running yet; the group's calls must
    not count as its callers'."""
    before = ask(leader, "pids")
    large = np.zeros(2**22)
    for delay_ms in range(0, 24, 2):
        running = leader.call.remote("scale", {"x": large}, by=2.0)
        time.sleep(delay_ms / 1000)
        running.cancel()
        assert ask(leader, "call", "add_up", [1.0])[0] == 3.0
    assert ask(leader, "pids") == before


def test_a_killed_worker_fails_the_running_call_at_once_and_the_replica_is_replaced(leader):
    leader_pid, worker_pids = ask(leader, "pids")
    running = leader.call.remote("note", "slow", sleep_s=8)
    time.sleep(0.5)
    os.kill(worker_pids[1], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(GroupDead) as caught:
        running.result(timeout_s=5)
    told_s = time.monotonic() - killed
    new_leader_pid, new_worker_pids = ask_until_replaced(leader, leader_pid)
    replaced_s = time.monotonic() - killed
    print(f"told after {told_s:.2f} s, replaced after {replaced_s:.1f} s")
    assert told_s < 1.0
    assert caught.value.retryable
    assert not {leader_pid, *worker_pids} & {new_leader_pid, *new_worker_pids}
    assert ask(leader, "call", "add_up", [1.0])[0] == 3.0


@pytest.mark.chaos
def test_the_workers_die_with_a_killed_replica_and_their_gpus_are_used_again(leader):
    leader_pid, worker_pids = ask(leader, "pids")
    os.kill(leader_pid, signal.SIGKILL)
    killed = time.monotonic()
    ask_until_replaced(leader, leader_pid)
    print(f"replaced after {time.monotonic() - killed:.1f} s")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in worker_pids)
    assert len({where["gpus"] for where in ask(leader, "call", "wheres")}) == 2
