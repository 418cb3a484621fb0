"""A living group: order, results, errors, cancellation. The same holds in process and on Ray."""

import asyncio
import os
import time

import numpy as np
import pytest
import toy_engine

from cluster.errors import DeadlinePassed, EngineError, GroupClosed, RankBroken
from cluster.group import InProcessGroup
from cluster.ray_group import RayGroup
from cluster.spec import GroupSpec

ONE = GroupSpec(
    engine="toy_engine:Toy",
    engine_kwargs={"device": "auto"},
    num_cpus_per_worker=0.5,
    start_timeout_s=60,
    step_timeout_s=10,
)
TWO = GroupSpec(
    engine="toy_engine:Toy",
    engine_kwargs={"device": "auto", "num_workers": 2},
    num_workers=2,
    num_gpus_per_worker=1,
    num_cpus_per_worker=0.5,
    worker_env={"NCCL_DEBUG": "WARN"},
    collective_backend="gloo",  # the GPUs are not real
    start_timeout_s=60,
    step_timeout_s=10,
)


@pytest.fixture(scope="module")
def two(ray_cluster, run):
    """One group of two ranks over gloo for every test that leaves it alive."""
    group = run(RayGroup.start(TWO))
    yield group
    run(group.aclose())


@pytest.fixture(scope="module", params=["in process", "on Ray"])
def one(request, run):
    """A group of one rank, in both forms."""
    if request.param == "on Ray":
        request.getfixturevalue("ray_cluster")
    kind = RayGroup if request.param == "on Ray" else InProcessGroup
    group = run(kind.start(ONE))
    yield group
    run(group.aclose())


def test_results_arrays_and_keywords_go_through_and_come_back(one, run):
    arrays = {"latents": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int64(3)}
    scaled = run(one.call("scale", arrays, by=2))
    np.testing.assert_array_equal(scaled["latents"], arrays["latents"] * 2)
    assert scaled["latents"].dtype == np.float32
    assert scaled["step"] == 6
    assert not scaled["latents"].flags.writeable


def test_array_arguments_are_read_only_for_the_engine_however_large(one, run):
    assert not run(one.call("writeable", np.zeros(10)))
    assert not run(one.call("writeable", np.zeros(1_000_000)))
    assert not run(one.call("writeable", array=np.zeros(1_000_000)))


def test_an_engine_error_comes_back_as_itself_and_the_group_lives_on(one, run):
    with pytest.raises(toy_engine.Refused) as caught:
        run(one.call("refuse"))
    assert type(caught.value) is toy_engine.Refused
    assert caught.value.field == "num_frames"
    assert "in refuse" in caught.value.__notes__[0], "the worker's traceback is kept"
    assert one.dead is None
    assert run(one.call("note", "after")) == "after"


def test_an_error_that_cannot_travel_becomes_its_built_in_class(one, run):
    with pytest.raises(ValueError, match="Unpicklable: holds a lock") as caught:
        run(one.call("refuse", "unpicklable"))
    assert type(caught.value) is ValueError


def test_an_unknown_method_is_an_attribute_error(one, run):
    with pytest.raises(AttributeError, match="no_such_method"):
        run(one.call("no_such_method"))


def test_the_engine_is_built_and_called_in_one_thread(one, run):
    assert run(one.call("same_thread"))


def test_device_auto_is_cpu_without_gpus(one, run):
    assert run(one.call("where"))["device"] == "cpu"


@pytest.mark.parametrize("kind", [InProcessGroup, RayGroup])
def test_an_engine_that_cannot_be_built_raises_its_own_error(kind, ray_cluster, run):
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        run(kind.start(GroupSpec(engine="toy_engine:ImportsNothing", num_cpus_per_worker=0.5)))


def test_calls_of_many_coroutines_reach_every_rank_in_one_order(two, run):
    async def many():
        return await asyncio.gather(*(two.call("note", ("order", i)) for i in range(40)))

    assert run(many()) == [("order", i) for i in range(40)]
    first, second = run(two.call("logs"))
    assert first == second
    assert [n for n in first if n[0] == "order"] == [("order", i) for i in range(40)]


def test_ranks_reduce_over_gloo_and_only_rank_0_answers(two, run):
    total = run(two.call("add_up", np.ones(1000, np.float32)))
    np.testing.assert_array_equal(total, np.full(1000, 3, np.float32))


def test_a_large_argument_reaches_every_rank(two, run):
    total = run(two.call("add_up", np.ones(500_000, np.float32)))
    assert total.sum() == 1_500_000


def test_ranks_first_asks_rank_0_alone(two, run):
    run(two.call("note", ("alone",), ranks="first"))
    first, second = run(two.call("logs"))
    assert ("alone",) in first
    assert ("alone",) not in second


def test_an_error_on_every_rank_leaves_the_group_alive(two, run):
    with pytest.raises(toy_engine.Refused):
        run(two.call("refuse"))
    assert run(two.call("add_up", [1.0])) == [3.0]


def test_a_cancelled_caller_leaves_the_ranks_equal(two, run):
    async def cancel_one_sent_and_one_waiting():
        sent = asyncio.create_task(two.call("note", ("sent",), sleep_s=1.0))
        waiting = asyncio.create_task(two.call("note", ("waiting",)))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        for task in (sent, waiting):
            task.cancel()
        results = await asyncio.gather(sent, waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert time.monotonic() - started < 0.6, "the callers did not wait for the ranks"
        return await two.call("logs")

    first, second = run(cancel_one_sent_and_one_waiting())
    assert first.count(("sent",)) == second.count(("sent",)) == 1
    assert ("waiting",) not in first + second


def test_a_check_does_not_wait_for_a_running_call(two, run):
    async def check_during_a_call():
        call = asyncio.create_task(two.call("note", ("slow",), sleep_s=0.5))
        await asyncio.sleep(0.1)
        await two.check()
        assert not call.done()
        await call

    run(check_during_a_call())


def test_each_worker_sees_its_own_gpu_and_its_own_environment(two, run):
    wheres = run(two.call("wheres"))
    assert len({where["gpus"] for where in wheres}) == 2
    assert [where["gpus"] for where in wheres] == [info.gpu_ids[0] for info in two.workers]
    assert [where["pid"] for where in wheres] == [info.pid for info in two.workers]
    for where in wheres:
        assert where["device"] == "cuda:0"
        assert where["nccl"] == "WARN"
        assert where["threads"] == "1"
    assert "NCCL_DEBUG" not in os.environ


def test_an_in_process_call_past_its_deadline_kills_the_group(run):
    async def too_slow():
        deaths = []
        group = await InProcessGroup.start(ONE, on_death=deaths.append)
        with pytest.raises(DeadlinePassed, match=r"note\(\) took over 0.1 s"):
            await group.call("note", 1, sleep_s=0.5, timeout_s=0.1)
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlinePassed):
            await group.check()
        return deaths

    assert len(run(too_slow())) == 1


def test_a_cuda_error_is_the_end_of_the_group_even_with_one_rank(run):
    async def broken():
        group = await InProcessGroup.start(ONE)
        with pytest.raises(RankBroken) as caught:
            await group.call("refuse", "CUDA error: an illegal memory access was encountered")
        assert isinstance(caught.value.__cause__, RuntimeError)
        return caught.value

    assert run(broken()).retryable


def test_running_out_of_gpu_memory_is_an_ordinary_engine_error(one, run):
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        run(one.call("refuse", "CUDA out of memory. Tried to allocate 2 GiB"))
    assert one.dead is None


def test_a_closed_group_refuses_calls_and_does_not_report_a_death(run):
    async def close():
        deaths = []
        group = await InProcessGroup.start(ONE, on_death=deaths.append)
        pending = asyncio.create_task(group.call("note", 1, sleep_s=0.3))
        await asyncio.sleep(0.1)
        await group.aclose()
        with pytest.raises(GroupClosed):
            await pending
        with pytest.raises(GroupClosed):
            await group.call("note", 2)
        return deaths

    assert run(close()) == []


def test_errors_say_whether_another_group_may_be_tried():
    assert GroupClosed("").retryable
    assert not EngineError("").retryable


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "wan_model.engine"}, "package.module:Class"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"num_gpus_per_worker": 2}, "a rank drives one GPU"),
        ({"num_gpus_per_worker": 0.5, "num_workers": 2}, "cannot form an NCCL group"),
        ({"num_cpus_per_worker": 0}, "must ask for something"),
        ({"strategy": "TOGETHER"}, "strategy must be one of"),
        ({"collective_backend": "mpi"}, "collective_backend must be one of"),
        ({"step_timeout_s": 0}, "step_timeout_s must be above 0"),
    ],
)
def test_a_spec_that_cannot_work_names_the_number(given, message):
    with pytest.raises(ValueError, match=message):
        GroupSpec(**{"engine": "a:B", **given})


def test_bundles_hold_one_worker_each_and_nothing_for_the_leader():
    spec = GroupSpec(engine="a:B", num_workers=2, num_gpus_per_worker=1, num_cpus_per_worker=4)
    assert spec.bundles() == [{"CPU": 4.0, "GPU": 1.0}] * 2
    assert spec.backend == "nccl"
    assert spec.deployment_options() == {
        "placement_group_bundles": spec.bundles(),
        "placement_group_strategy": "STRICT_PACK",
        "ray_actor_options": {"num_cpus": 0, "num_gpus": 0},
    }
