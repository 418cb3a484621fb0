"""One Ray for the whole test session, shared by every test that needs one.

Fixtures
    ray_cluster     Ray with NUM_CPUS logical CPUs and NUM_FAKE_GPUS GPUs that do not exist (they
                    can be placed and show up in CUDA_VISIBLE_DEVICES; CUDA cannot use them).
                    Workers can import this repository and the modules beside the tests.
    serve_running   the same with Serve on it, without an HTTP proxy. A test deploys with
                    `serve.run(app, name="its own name", route_prefix=None)` and deletes what it
                    deployed. For a quick end give deployments graceful_shutdown_wait_loop_s=0.2
                    and graceful_shutdown_timeout_s=3.
    postgres_server, database_url       see postgres.py
"""

import gc
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from one_start import one_start_at_a_time
from postgres import database_url, postgres_server

__all__ = ["database_url", "postgres_server"]

ROOT = Path(__file__).resolve().parent.parent
NUM_CPUS = 8
NUM_FAKE_GPUS = 4

# All of this is read when Ray is imported or started, or inherited by its processes.
_TESTS = ROOT / "tests"
_FOLDERS = [str(ROOT), str(_TESTS), *(str(p) for p in sorted(_TESTS.iterdir()) if p.is_dir())]
sys.path.extend(folder for folder in _FOLDERS if folder not in sys.path)
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, os.environ.get("PYTHONPATH", "")])
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when anything first imports Triton
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores are at work already
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray would start idle workers, one a CPU, of which few are ever used. It reads this name as it is.
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112
os.environ.pop("RAY_ADDRESS", None)


def pytest_collection_finish():
    """What was imported stays: a collection of garbage need not walk through it, a fifth of a
    second each time, and a video in this process collects several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_cluster():
    import ray

    with one_start_at_a_time():
        ray.init(
            address="local",  # never somebody else's cluster on this machine
            num_cpus=NUM_CPUS,
            num_gpus=NUM_FAKE_GPUS,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=256 * 1024**2,
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def serve_running(ray_cluster):
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
