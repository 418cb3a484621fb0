"""Everything killed at once and started again: every accepted job is completed, and the same.

Two starts of a service of its own, on PostgreSQL (on SQLite in the long matrix).
"""

import pytest
from live_service import live, service_args

pytestmark = pytest.mark.timeout(600)
PROMPT = "a red circle moves"
JOB = {"num_inference_steps": 100, "num_frames": 17, "size": "256x256"}


@pytest.mark.parametrize(
    "database", ["postgresql", pytest.param("sqlite", marks=pytest.mark.chaos)]
)
def test_everything_killed_at_once_loses_no_job(request, tmp_path, checkpoints, database):
    more = {}
    if database == "postgresql":
        more["job_store_url"] = request.getfixturevalue("postgres_server").create_database()
    with live(tmp_path, service_args({"ti2v": checkpoints["ti2v"]}, **more)) as service:
        first = service.submit(PROMPT, **JOB)
        assert service.wait(first)["status"] == "completed"
        undisturbed = service.content(first)
        running, waiting = (service.submit(PROMPT, **JOB) for _ in range(2))
        # A segment is half a second of steps: some have ended by then.
        service.wait_for(running, lambda video: video["step"] >= 60)
        service.kill_everything()
        service.start()
        for video_id in (running, waiting):
            video = service.wait(video_id, 240)
            assert video["status"] == "completed", video["error"]
            assert service.content(video_id) == undisturbed
        resumed = [t for t in service.get(running)["timings"] if t["to_step"]]
        assert resumed[0]["from_step"] > 0, "the job began again instead of going on"
        service.kill_everything()  # all has been seen: no time for a shutdown in good order
