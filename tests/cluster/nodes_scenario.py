"""Run by test_nodes.py: two GPU nodes, one group inside a node and one across both; one dies.

Writes what happened as JSON to the file named on the command line (raylets use stdout).
"""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)

import ray  # noqa: E402
from one_start import one_start_at_a_time  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from cluster.errors import GroupDead  # noqa: E402
from cluster.ray_group import RayGroup  # noqa: E402
from cluster.spec import GroupSpec  # noqa: E402

STORE_BYTES = 128 * 1024**2


def spec_of(strategy):
    return GroupSpec(
        engine="toy_engine:Toy",
        engine_kwargs={"device": "auto", "num_workers": 2},
        num_workers=2,
        num_gpus_per_worker=1,
        num_cpus_per_worker=0.5,
        strategy=strategy,
        start_timeout_s=60,
        step_timeout_s=30,
        collective_backend="gloo",
    )


async def scenario(cluster, add_node):
    seen = {}
    packed = await RayGroup.start(spec_of("STRICT_PACK"))
    seen["packed_nodes"] = [info.node_id for info in packed.workers]
    spread = await RayGroup.start(spec_of("STRICT_SPREAD"))
    seen["spread_nodes"] = [info.node_id for info in spread.workers]
    seen["sum_over_two_nodes"] = float((await spread.call("add_up", [1.0]))[0])

    home = packed.workers[0].node_id
    [victim] = [node for node in cluster.worker_nodes if node.node_id != home]
    running = asyncio.create_task(spread.call("late_collective", late_rank=1, sleep_s=25))
    await asyncio.sleep(0.5)
    kill_node(victim)
    killed = time.monotonic()
    try:
        await running
    except GroupDead as dead:
        seen["death"] = type(dead).__name__
    seen["detected_s"] = time.monotonic() - killed
    cluster.remove_node(victim, allow_graceful=False)
    seen["other_group_lives"] = await packed.call("note", "alive") == "alive"
    await spread.aclose()

    add_node()
    again = await RayGroup.start(spec_of("STRICT_SPREAD"))
    seen["sum_after_a_new_node_came"] = float((await again.call("add_up", [1.0]))[0])
    await again.aclose()
    await packed.aclose()
    return seen


def kill_node(node):
    """End the raylet and every process under it at one moment, as the loss of a machine does."""
    [raylet] = node.all_processes["raylet"]
    pids = [raylet.process.pid]
    for pid in pids:
        pids += [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def main():
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        },
    )

    def add_node():
        cluster.add_node(num_cpus=2, num_gpus=3, object_store_memory=STORE_BYTES)

    try:
        with one_start_at_a_time():
            add_node()
            add_node()
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
        seen = asyncio.run(scenario(cluster, add_node))
        Path(sys.argv[1]).write_text(json.dumps(seen))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
