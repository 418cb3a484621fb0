"""The load generator against a service of a few lines, in this process."""

import asyncio
import itertools
import json
import time

import httpx
import pytest

from benchmarks.client import ServiceFailed, connect
from benchmarks.loadgen import Load, parse, run_load
from benchmarks.workload import Workload

JOB_S = 0.05


class FakeService:
    """Completes a video `job_s` after its creation; `full_for` answers 429 that many times."""

    def __init__(self, *, job_s=JOB_S, full_for=0, pages_of=100, forget=()):
        self.videos = {}
        self.keys = {}
        self.job_s = job_s
        self.full_for = full_for
        self.pages_of = pages_of
        self.forget = forget
        self.refused_at = []
        self.num_in_flight_at_submit = []
        self.ids = itertools.count()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return self.create(request)
        if request.url.path == "/v1/videos":
            return self.page(request.url.params)
        return httpx.Response(200, json=self.show(self.videos[request.url.path.split("/")[-1]]))

    def create(self, request):
        if len(self.refused_at) < self.full_for:
            self.refused_at.append(time.monotonic())
            error = {"error": {"message": "the queue is full"}}
            return httpx.Response(429, json=error, headers={"Retry-After": "0.2"})
        body = json.loads(request.content)
        if body["prompt"] == "bad":
            return httpx.Response(400, json={"error": {"message": "prompt is bad"}})
        self.num_in_flight_at_submit.append(
            sum(self.show(v)["status"] != "completed" for v in self.videos.values())
        )
        video = {"id": f"video_{next(self.ids)}", "created": time.time(), "model": "m"}
        key = request.headers["Idempotency-Key"]
        assert key not in self.keys
        self.keys[key] = video
        self.videos[video["id"]] = video
        return httpx.Response(200, json=self.show(video))

    def page(self, query):
        newest_first = [v for v in reversed(self.videos.values()) if v["id"] not in self.forget]
        if "after" in query:
            ids = [video["id"] for video in newest_first]
            newest_first = newest_first[ids.index(query["after"]) + 1 :]
        data = [self.show(video) for video in newest_first[: self.pages_of]]
        return httpx.Response(
            200,
            json={
                "data": data,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(newest_first) > len(data),
            },
        )

    def show(self, video):
        start, end = video["created"], video["created"] + self.job_s
        timing = {"stage": "s", "replica": "r", "started_at": start, "ended_at": end}
        timing |= {"busy_s": end - start, "from_step": 0, "to_step": 0}
        done = time.time() >= end
        return {
            "id": video["id"], "model": "m", "error": None,
            "status": "completed" if done else "queued", "timings": [timing] if done else [],
        }  # fmt: skip


def play(service, load, bodies=None):
    async def go():
        transport = httpx.MockTransport(service)
        async with connect("http://service", transport=transport, poll_s=0.01) as client:
            chosen = Workload().bodies(load.num_jobs, seed=0) if bodies is None else bodies
            return await run_load(client, load, chosen)

    return asyncio.run(go())


def test_a_closed_loop_keeps_at_most_its_number_of_jobs_in_flight():
    service = FakeService(job_s=0.2)
    jobs = play(service, Load.closed(concurrency=3, num_jobs=9))
    assert [job.status for job in jobs] == ["completed"] * 9
    assert max(service.num_in_flight_at_submit) == 2
    assert all(0.2 <= job.latency_s < 5 for job in jobs)
    assert all(job.timings for job in jobs)


def test_sequential_jobs_never_meet():
    service = FakeService()
    load = Load.open(jobs_per_minute=60, duration_s=5, seed=0).sequential
    play(service, load)
    assert set(service.num_in_flight_at_submit) == {0}


def test_an_open_loop_submits_without_waiting_for_answers():
    service = FakeService(job_s=0.5)
    load = Load(name="burst", num_jobs=4, arrivals=(0.0, 0.005, 0.01, 0.015))
    play(service, load)
    assert max(service.num_in_flight_at_submit) >= 2


def test_a_full_service_is_asked_again_after_retry_after():
    service = FakeService(full_for=2)
    [job] = play(service, Load.closed(concurrency=1, num_jobs=1))
    assert job.num_refusals == 2
    assert service.refused_at[1] - service.refused_at[0] >= 0.2
    assert job.latency_s >= 0.4 + JOB_S  # the client waited all that time


def test_the_poller_finds_jobs_on_later_pages():
    jobs = play(FakeService(pages_of=2), Load.closed(concurrency=7, num_jobs=7))
    assert [job.status for job in jobs] == ["completed"] * 7


def test_a_refusal_for_good_ends_the_run_with_the_services_words():
    with pytest.raises(ServiceFailed, match="prompt is bad"):
        play(FakeService(), Load.closed(concurrency=1, num_jobs=1), [{"prompt": "bad"}])


def test_a_job_that_the_service_forgot_ends_the_run():
    with pytest.raises(ServiceFailed, match="video_1 is not among"):
        play(FakeService(forget=("video_1",)), Load.closed(concurrency=2, num_jobs=3))


def test_a_connection_that_breaks_is_tried_again(monkeypatch):
    monkeypatch.setattr("benchmarks.client.RETRY_S", 0.01)
    service, broken = FakeService(), iter([True, False, True])

    def sometimes(request):
        if next(broken, False):
            raise httpx.ReadError("cut", request=request)
        return service(request)

    [job] = play(sometimes, Load.closed(concurrency=1, num_jobs=1))
    assert job.status == "completed"


@pytest.mark.parametrize(
    "line",
    ["--rate 5", "--rate 5 --duration 60 --jobs 3", "--sequential --compare", "--jobs 0",
     "--rate 0 --duration 5", "--sequential --concurrency 2"],
)  # fmt: skip
def test_contradictory_options_are_refused(line, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert "error: " in capsys.readouterr().err


def test_options_make_the_load_they_name():
    _, closed = parse(["--concurrency", "3", "--jobs", "5"])
    assert (closed.name, closed.concurrency, closed.num_jobs) == ("closed-3", 3, 5)
    _, arriving = parse(["--rate", "60", "--duration", "30", "--seed", "1"])
    assert arriving.num_jobs == len(arriving.arrivals) > 10
    _, sequential = parse(["--sequential", "--jobs", "4"])
    assert (sequential.name, sequential.num_jobs) == ("sequential", 4)
