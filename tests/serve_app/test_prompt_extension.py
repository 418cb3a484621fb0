"""What a job's prompt becomes before it is encoded, and who may ask for an extension.

The job store is real; the language model is a function of the test. Real engines in real groups:
tests/wan_model/test_prompt_extender.py and tests/e2e.
"""

import asyncio
import dataclasses
import time
from types import SimpleNamespace

import pytest
from dashscope_stub import dashscope_stub
from http_service import http_service, picture, resolved

from cluster.errors import RankDied
from cluster.group import InProcessGroup
from serve_app import prompt_extension as module
from serve_app.app import group_spec
from serve_app.artifacts import Artifacts
from serve_app.jobs import JobStore, NewJob
from serve_app.prompt_extension import Extender, PromptExtender, prompt_to_encode
from serve_app.stages import JobTicket, LeaseLost, StageReport, StageResult, StageStores
from wan_model.config import WAN_TINY
from wan_model.params import VideoParams

pytestmark = pytest.mark.anyio
EXTENSION = {"backend": "local_qwen", "num_gpus": 0}


class LanguageModel:
    """`reply` makes the revised prompt of (prompt, task, image), or raises."""

    def __init__(self, reply):
        self.reply = reply
        self.asked = []

    async def call(self, _method, ticket, prompt, task, image):
        self.asked.append((prompt, task, image))
        revised = await self.reply()
        now = time.time()
        report = StageReport(stage="s", replica="r", started_at=now, ended_at=now, busy_s=0.0)
        return None, StageResult(report=report, artifacts={"revised_prompt": revised})


async def revised():
    return "a cat, at length"


async def claimed(store, **given):
    params = dataclasses.asdict(VideoParams.for_model(WAN_TINY, num_frames=9))
    new = NewJob(
        model="m", prompt="a cat", params=params, num_steps=1, predicted_s=1.0,
        **({"extend_prompt": True} | given),
    )  # fmt: skip
    await store.submit(new)
    return await store.claim("w", lease_s=30, max_attempts=3)


async def encoded(store, job, model, *, max_s=5.0, there=True):
    handle = SimpleNamespace(extend="extend")
    ticket = JobTicket(id=job.id, attempt=job.attempt, rank=(0, 0.0), params=job.params)

    async def progress(stage, percent):
        await store.record_progress(job.id, job.attempt, stage=stage, step=0, progress=percent)

    return await prompt_to_encode(
        job, ticket, extender=Extender(handle=handle, max_s=max_s) if there else None,
        store=store, call=model.call, progress=progress,
    )  # fmt: skip


@pytest.fixture
async def store(tmp_path):
    store = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    yield store
    await store.close()


async def test_the_extended_prompt_is_encoded_and_kept(store):
    job = await claimed(store)
    model = LanguageModel(revised)
    assert await encoded(store, job, model) == "a cat, at length"
    kept = await store.get(job.id)
    assert (kept.prompt, kept.revised_prompt, kept.prompt_note) == (
        "a cat", "a cat, at length", None,
    )  # fmt: skip
    assert kept.stage == "PromptExtender"


@pytest.mark.parametrize("reply", [revised, RuntimeError("secret detail")])
async def test_a_retry_of_the_job_extends_nothing_again(store, reply):
    model = LanguageModel(reply if callable(reply) else fails(reply))
    job = await claimed(store)
    first = await encoded(store, job, model)
    await store.release(job.id, job.attempt)
    again = await store.claim("w", lease_s=30, max_attempts=3)
    assert again.attempt == 2
    assert await encoded(store, again, model) == first
    assert len(model.asked) == 1


async def test_nobody_is_asked_unless_the_request_says_so(store):
    model = LanguageModel(revised)
    job = await claimed(store, extend_prompt=False, cinematography={"lens": "fisheye lens"})
    assert await encoded(store, job, model) == "Fisheye lens. a cat"
    assert model.asked == [] and (await store.get(job.id)).revised_prompt is None


async def test_the_cinematography_is_composed_before_the_extension(store):
    model = LanguageModel(revised)
    await encoded(store, await claimed(store, cinematography={"lens": "fisheye lens"}), model)
    assert model.asked[0][0] == "Fisheye lens. a cat"


def fails(error):
    async def reply():
        raise error

    return reply


async def hangs():
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    "reply, reason",
    [
        (hangs, "it took too long"),
        (fails(TimeoutError()), "it took too long"),
        (fails(ValueError("DashScope did not answer (503)")), "DashScope did not answer (503)"),
        (fails(RuntimeError("secret detail")), "an error in the service"),
        (fails(RankDied("killed")), "an error in the service"),
    ],
    ids=["time-out", "engine's time-out", "refusal", "error", "death"],
)
async def test_what_goes_wrong_leaves_the_prompt_as_it_is_and_a_note(
    store, monkeypatch, reply, reason
):
    monkeypatch.setattr(module, "RETRY_DELAY_S", 0.01)
    job = await claimed(store, cinematography={"lens": "fisheye lens"})
    prompt = await encoded(store, job, LanguageModel(reply), max_s=0.1)
    assert prompt == "Fisheye lens. a cat"
    kept = await store.get(job.id)
    assert kept.revised_prompt is None
    assert kept.prompt_note == f"the prompt was used without extension: {reason}"


async def test_a_lost_process_is_asked_a_second_time(store, monkeypatch):
    monkeypatch.setattr(module, "RETRY_DELAY_S", 0.01)
    deaths = [RankDied("killed")]

    async def dies_once():
        if deaths:
            raise deaths.pop()
        return await revised()

    assert await encoded(store, await claimed(store), LanguageModel(dies_once)) == (
        "a cat, at length"
    )


async def test_a_job_whose_service_lost_its_extender_goes_on_with_its_prompt(store):
    job = await claimed(store)
    assert await encoded(store, job, LanguageModel(revised), there=False) == "a cat"
    assert "none any more" in (await store.get(job.id)).prompt_note


async def test_an_attempt_without_its_lease_uses_nothing(store):
    job = await claimed(store)
    await store.release(job.id, job.attempt)
    with pytest.raises(LeaseLost):
        await encoded(store, job, LanguageModel(revised))


async def test_a_cancelled_attempt_is_cancelled_and_not_a_failed_extension(store):
    job = await claimed(store)
    task = asyncio.create_task(encoded(store, job, LanguageModel(hangs)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await store.get(job.id)).prompt_note is None


@pytest.mark.parametrize(
    "given, frames, task",
    [({}, 9, "t2v"), ({}, 1, "image"), ({"input_image": "key"}, 9, "i2v")],
)
async def test_the_instructions_follow_what_is_made(store, given, frames, task):
    model = LanguageModel(revised)
    job = await claimed(store, **given)
    job = dataclasses.replace(job, params=job.params | {"num_frames": frames})
    await encoded(store, job, model)
    assert model.asked == [("a cat", task, given.get("input_image"))]


# ------------------------------------------------------------------------------ request, answer


async def test_a_service_without_extension_refuses_to_be_asked_for_it(tmp_path):
    async with http_service(tmp_path) as service, service.client() as client:
        asked = {"prompt": "a cat", "prompt_extend": True}
        answer = await client.post("/v1/videos", json=asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt_extend"
        fine = await client.post("/v1/videos", json=asked | {"prompt_extend": False})
        assert fine.json()["prompt_extend"] is False


async def test_the_answer_says_what_became_of_the_prompt(tmp_path):
    service = resolved(prompt_extension=EXTENSION)
    async with http_service(tmp_path, service) as http, http.client() as client:
        form = {"prompt": "a cat", "model": "wan-tiny", "prompt_extend": "true"}
        made = (await client.post("/v1/videos", data=form)).json()
        assert (made["prompt_extend"], made["revised_prompt"]) == (True, None)
        job = await http.store.claim("w", lease_s=30, max_attempts=1)
        await http.store.record_prompt(
            job.id, job.attempt, revised_prompt=None, note="no model in /srv/models/qwen"
        )
        answer = (await client.get(f"/v1/videos/{made['id']}")).json()
        assert (answer["prompt"], answer["prompt_note"]) == ("a cat", "no model in (path)")


# ---------------------------------------------------------------------------------- the options


def extender(environ=None, *, models=None, **options):
    models = models or ("wan-tiny", "wan-tiny-i2v")
    return resolved(
        models={name: {"checkpoint": name} for name in models},
        prompt_extension=EXTENSION | options,
        environ=environ or {},
    ).prompt_extender


async def test_only_the_language_models_that_a_job_can_need_are_loaded():
    both = extender()
    assert (both.checkpoint, both.vl_checkpoint) == (
        "Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct",
    )  # fmt: skip
    assert extender(models=("wan-tiny",)).vl_checkpoint is None
    assert extender(models=("wan-tiny-i2v",)).checkpoint is None


@pytest.mark.parametrize(
    "options, models, word",
    [
        ({"backend": "off"}, None, "num_gpus has no effect while prompt_extension.backend is off"),
        ({"checkpoint": "q"}, ("wan-tiny-i2v",), "checkpoint has no effect: every served model"),
        ({"vl_checkpoint": "q"}, ("wan-tiny",), "vl_checkpoint has no effect: no served model"),
        ({"timeout_s": 600}, None, "timeout_s 600 >= step_timeout_s 600"),
        ({"backend": "dashscope"}, None, "DASH_API_KEY"),
        ({"backend": "dashscope", "num_gpus": 1}, None, "num_gpus has no effect"),
    ],
)
async def test_an_option_without_effect_is_refused(options, models, word):
    with pytest.raises(ValueError, match="prompt_extension") as refused:
        extender(models=models, **options)
    assert word in str(refused.value)


async def test_dashscopes_key_reaches_its_engine_and_no_printed_form():
    environ = {"DASH_API_KEY": "sk-secret", "DASH_API_URL": "http://127.0.0.1:1/api/v1"}
    groups = extender(environ, backend="dashscope")
    assert "sk-secret" not in repr(groups)
    spec = group_spec(PromptExtender, groups, "not.used")
    assert spec.engine == "wan_model.dashscope_extender:DashScopeExtenderEngine"
    assert spec.engine_kwargs["api_key"] == "sk-secret"
    assert spec.engine_kwargs["api_url"] == "http://127.0.0.1:1/api/v1"
    assert spec.num_gpus_per_worker == 0
    assert "sk-secret" not in repr(spec)


async def test_the_extender_is_one_of_the_services_stages():
    service = resolved(prompt_extension=EXTENSION)
    assert [stage.name for stage in service.stages].count("PromptExtender") == 1
    assert "PromptExtender" not in [stage.name for stage in resolved().stages]


# --------------------------------------------------------------- the stage, its group, DashScope


async def through_the_stage(tmp_path, stub, job, store, **options):
    """`prompt_to_encode` with the real stage and engine of the backend that `options` configure."""
    environ = {"DASH_API_KEY": "sk-1", "DASH_API_URL": stub.url}
    groups = extender(environ, backend="dashscope", **options)
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    await artifacts.put("image", picture(64, 48))
    stage = PromptExtender.__new__(PromptExtender)
    await stage.__init__(
        groups.name,
        group_spec(PromptExtender, groups, "not.used"),
        StageStores(
            job_store_url=f"sqlite:///{tmp_path / 'jobs.sqlite'}",
            artifacts_url=str(tmp_path / "artifacts"),
        ),
        InProcessGroup.start,
    )

    class TheStage(LanguageModel):
        async def call(self, _method, *arguments):
            return None, await stage.extend(*arguments)

    try:
        return await encoded(store, job, TheStage(None))
    finally:
        await stage.__del__()


async def test_dashscope_extends_a_jobs_prompt_with_its_picture(tmp_path, store):
    with dashscope_stub() as stub:
        job = await claimed(store, input_image="image", cinematography={"lens": "fisheye lens"})
        prompt = await through_the_stage(tmp_path, stub, job, store, target_language="zh")
    assert prompt == (await store.get(job.id)).revised_prompt == "A cat, at length."
    [asked] = stub.asked
    assert asked["parameters"]["seed"] == job.params["seed"] % 2**31
    assert "Fisheye lens. a cat" in asked["input"]["messages"][1]["content"][1]["text"]


async def test_a_dashscope_that_does_not_answer_in_time_costs_the_job_nothing_else(tmp_path, store):
    with dashscope_stub() as stub:
        stub.delay_s = 1.0
        job = await claimed(store)
        assert await through_the_stage(tmp_path, stub, job, store, timeout_s=0.2) == "a cat"
    assert (await store.get(job.id)).prompt_note.endswith("it took too long")
