"""Remix and branch over HTTP: what is taken over, what may differ, and what is refused by name."""

import dataclasses

import numpy as np
import pytest
from http_service import WAN_CONFIGS, http_service, picture, resolved
from test_ingress import CAT, UNKNOWN_ID, assert_error, created, finish_next

from serve_app import derived_jobs
from serve_app.create_video import CreateVideo
from wan_model.config import WAN_TINY
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule

pytestmark = pytest.mark.anyio

T2V = CAT | {"model": "wan-tiny", "num_inference_steps": 20, "num_frames": 17, "size": "64x128"}
I2V = T2V | {"model": "wan-tiny-i2v"}
DOG = {"prompt": "a dog"}


async def with_state(service, client, **fields) -> dict:
    """A video that has passed its boundary, as a pipeline leaves it."""
    form = {name: str(value) for name, value in (I2V | fields).items()}
    files = {"input_reference": ("a.png", picture(64, 128), "image/png")}
    if fields.get("model", "wan-tiny") == "wan-tiny":
        video = await created(client, **T2V | fields)
    else:
        video = (await client.post("/v1/videos", data=form, files=files)).json()
    job = await service.store.claim("worker", lease_s=30, max_attempts=1)
    assert job.id == video["id"]
    key = f"{job.id}/boundary-1.safetensors"
    await service.artifacts.put_arrays(key, {"latents": np.ones(3, np.float32)})
    await service.store.record_checkpoint(job.id, job.attempt, key=key, step=9, is_boundary=True)
    return (await client.get(f"/v1/videos/{job.id}")).json()


# --------------------------------------------------------------------------------------- remix


async def test_a_remix_is_the_same_video_with_another_prompt(service, client):
    numbers = {"seed": 7, "guidance_scale": 2.5, "fps": 4, "negative_prompt": "rain", "user": "ann"}
    source = await created(client, **T2V | numbers, priority=3)
    answer = await client.post(f"/v1/videos/{source['id']}/remix", json=DOG)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["remixed_from_video_id"], made["prompt"]) == (source["id"], "a dog")
    differs = {"id", "prompt", "remixed_from_video_id", "created_at", "queue_position",
               "seconds_left"}  # fmt: skip
    assert {k: v for k, v in made.items() if k not in differs} == {
        k: v for k, v in source.items() if k not in differs
    }
    assert (await client.get(f"/v1/videos/{made['id']}")).json()["remixed_from_video_id"]


async def test_a_remix_has_its_own_copy_of_the_image(service, client):
    files = {"input_reference": ("a.png", picture(64, 128), "image/png")}
    form = {name: str(value) for name, value in I2V.items()}
    source = (await client.post("/v1/videos", data=form, files=files)).json()
    made = (await client.post(f"/v1/videos/{source['id']}/remix", json=DOG)).json()
    await client.delete(f"/v1/videos/{source['id']}")
    job = await service.store.get(made["id"])
    assert job.input_image.startswith(made["id"])
    assert await service.artifacts.get(job.input_image) == picture(64, 128)


async def test_a_remix_honours_its_idempotency_key(client):
    source = await created(client, **T2V)
    path, headers = f"/v1/videos/{source['id']}/remix", {"Idempotency-Key": "k"}
    first = await client.post(path, json=DOG, headers=headers)
    assert (await client.post(path, json=DOG, headers=headers)).json()["id"] == first.json()["id"]
    answer = await client.post(path, json={"prompt": "a bird"}, headers=headers)
    assert_error(answer, 409, code="idempotency_key_reused")


async def test_a_remix_takes_a_prompt_and_nothing_else(client):
    source = await created(client, **T2V)
    path = f"/v1/videos/{source['id']}/remix"
    assert_error(await client.post(path, json={}), 400, param="prompt", code="missing_field")
    answer = await client.post(path, json=DOG | {"seed": 1})
    assert_error(answer, 400, param="seed", code="unknown_field")
    answer = await client.post(f"/v1/videos/{UNKNOWN_ID}/remix", json=DOG)
    assert_error(answer, 404, code="video_not_found")


async def test_a_video_of_another_version_can_be_listed_but_not_remixed(service, client, tmp_path):
    source = await created(client, **T2V)
    job = await service.store.get(source["id"])
    job_fields = {"params": job.params | {"sharpness": 3}, "id": UNKNOWN_ID}
    new = {f.name: getattr(job, f.name) for f in dataclasses.fields(job.__class__.__base__)}
    await service.store.submit(job.__class__.__base__(**new | job_fields))
    video = (await client.get(f"/v1/videos/{UNKNOWN_ID}")).json()
    assert video["seed"] == source["seed"]
    assert len((await client.get("/v1/videos")).json()["data"]) == 2
    answer = await client.post(f"/v1/videos/{UNKNOWN_ID}/remix", json=DOG)
    assert_error(answer, 409, code="unknown_parameters")


# -------------------------------------------------------------------------------------- branch


@pytest.mark.parametrize("model", ["wan-tiny", "wan-tiny-i2v"])
async def test_a_branch_begins_with_its_sources_state(service, client, model):
    source = await with_state(service, client, model=model)
    assert source["can_branch"]
    answer = await client.post(
        "/v1/videos", json=DOG | {"branch_from": source["id"], "guidance_scale_2": 1.5}
    )
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["branch_from"], made["model"]) == (source["id"], model)
    assert (made["guidance_scale_2"], made["prompt"]) == (1.5, "a dog")
    same = ("seed", "size", "num_frames", "num_inference_steps", "guidance_scale", "solver")
    assert [made[name] for name in same] == [source[name] for name in same]
    await client.delete(f"/v1/videos/{source['id']}")
    await service.artifacts.delete_prefix(source["id"])  # as its worker does when it stops
    job = await service.store.get(made["id"])
    assert job.checkpoint_step == 9 and job.checkpoint == job.boundary_state
    state = await service.artifacts.get_arrays(job.checkpoint)
    assert np.array_equal(state["latents"], np.ones(3, np.float32))
    assert (job.input_image is None) == (model == "wan-tiny")


async def test_a_branch_costs_its_half_of_the_predicted_time(service, client):
    source = await with_state(service, client)
    made = (await client.post("/v1/videos", json=DOG | {"branch_from": source["id"]})).json()
    whole, half = [(await service.store.get(v["id"])).predicted_s for v in (source, made)]
    step_s = (whole - half) / 9
    # The profile's second of decoding, for half of its tokens.
    assert whole - 20 * step_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "128x128"), ("seconds", 4), ("num_frames", 9), ("num_inference_steps", 21),
        ("guidance_scale", 9), ("flow_shift", 3), ("boundary_ratio", 0.8), ("solver", "euler"),
        ("cache", 0.05),
        ("preview", True), ("model", "wan-tiny-i2v"), ("guidance_scale_2", 1000),
        ("input_reference", {"image_url": "data:image/png;base64,AAAA"}),
    ],
)  # fmt: skip
async def test_what_would_change_the_high_noise_half_is_refused_by_name(
    service, client, field, value
):
    source = await with_state(service, client, seed=1)
    body = DOG | {"branch_from": source["id"], field: value}
    message = assert_error(await client.post("/v1/videos", json=body), 400, param=field)
    assert field in message


async def test_another_seed_is_noise_of_its_own_from_the_boundary_on(service, client):
    source = await with_state(service, client, seed=1)
    body = DOG | {"branch_from": source["id"]}
    made = (await client.post("/v1/videos", json=body | {"seed": 12345})).json()
    assert made["seed"] == 12345
    params = (await service.store.get(made["id"])).params
    assert (params["seed"], params["boundary_seed"]) == (1, 12345)
    same = (await client.post("/v1/videos", json=body | {"seed": 1})).json()
    assert (await service.store.get(same["id"])).params["boundary_seed"] is None
    for seed, expected in ((None, 12345), (12345, 12345), (1, None), (7, 7)):  # branches of it
        again = derived_jobs.branched_params(CreateVideo(**DOG, seed=seed), VideoParams(**params))
        assert (again.seed, again.boundary_seed) == (1, expected)
    remixed = await client.post(f"/v1/videos/{made['id']}/remix", json=DOG)
    assert (await service.store.get(remixed.json()["id"])).params == params


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ({"style": "anime"}, "rain")),
        ({"cinematography": None, "negative_prompt": None}, ({"style": "anime"}, "rain")),
        ({"cinematography": {"lens": "medium lens"}}, ({"lens": "medium lens"}, "rain")),
        ({"cinematography": {}}, (None, "rain")),
        ({"negative_prompt": ""}, ({"style": "anime"}, WAN_TINY.negative_prompt)),
    ],
)
async def test_what_a_branch_leaves_out_is_its_sources_and_what_is_empty_is_not(
    service, client, fields, expected
):
    source = await with_state(
        service, client, cinematography={"style": "anime"}, negative_prompt="rain"
    )
    body = DOG | {"branch_from": source["id"]}
    made = (await client.post("/v1/videos", json=body | fields)).json()
    assert (made["cinematography"], made["negative_prompt"]) == expected


async def test_saying_again_what_the_source_has_is_no_change(service, client):
    source = await with_state(service, client, seed=1)
    again = ("size", "num_frames", "num_inference_steps", "guidance_scale", "solver", "seed",
             "flow_shift", "boundary_ratio", "cache", "seconds", "model")  # fmt: skip
    body = DOG | {"branch_from": source["id"], "fps": source["fps"]}
    answer = await client.post("/v1/videos", json=body | {name: source[name] for name in again})
    assert answer.status_code == 200, answer.text


async def test_there_must_be_a_state_to_branch_from(service, client):
    async def branch_of(video):
        return await client.post("/v1/videos", json=DOG | {"branch_from": video["id"]})

    early = await created(client, **T2V)
    assert_error(await branch_of(early), 409, param="branch_from", code="boundary_not_reached")
    await finish_next(service)
    assert_error(await branch_of(early), 409, param="branch_from", code="boundary_state_gone")
    one = await created(client, **CAT | {"model": "wan-tiny-ti2v"})
    assert "one expert" in assert_error(await branch_of(one), 400, param="branch_from")
    low_only = await created(client, **T2V | {"boundary_ratio": 1.0})
    assert_error(await branch_of(low_only), 400, param="branch_from")
    answer = await branch_of({"id": UNKNOWN_ID})
    assert_error(answer, 400, param="branch_from", code="video_not_found")


async def test_another_keys_video_is_no_source(tmp_path):
    async with http_service(tmp_path, resolved(api_keys="one,two")) as service:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        async with service.client() as client:
            video = (await client.post("/v1/videos", json=T2V, headers=mine)).json()
            path = f"/v1/videos/{video['id']}/remix"
            assert_error(await client.post(path, json=DOG, headers=theirs), 404)
            body = DOG | {"branch_from": video["id"]}
            answer = await client.post("/v1/videos", json=body, headers=theirs)
            assert_error(answer, 400, param="branch_from", code="video_not_found")


async def test_a_lora_is_another_served_model_with_the_same_networks(tmp_path, monkeypatch):
    monkeypatch.setitem(WAN_CONFIGS, "with-lora", WAN_TINY)
    lora = {"low_noise_expert": {"lora": [{"path": "style.safetensors"}]}}
    models = {"wan-tiny": {"checkpoint": "x"}, "with-lora": {"checkpoint": "x"} | lora}
    async with (
        http_service(tmp_path, resolved(models=models)) as service,
        service.client() as client,
    ):
        source = await with_state(service, client)
        body = DOG | {"branch_from": source["id"], "model": "with-lora"}
        made = (await client.post("/v1/videos", json=body)).json()
        assert (made["model"], made["branch_from"]) == ("with-lora", source["id"])
        assert (await service.store.get(made["id"])).checkpoint_step == 9


# ------------------------------------------------------------------------------------- preview


async def test_a_preview_can_be_seen_before_the_video_is_done(service, client):
    video = await created(client, **T2V | {"preview": True})
    path = f"/v1/videos/{video['id']}/content?variant=preview"
    assert_error(await client.get(path), 409, code="video_not_ready")
    job = await service.store.claim("worker", lease_s=30, max_attempts=1)
    await service.artifacts.put(f"{job.id}/preview-1.webp", picture(8, 8, format="WEBP"))
    shown = {"preview": f"{job.id}/preview-1.webp"}
    await service.store.record_artifacts(job.id, job.attempt, artifacts=shown)
    answer = await client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert (await client.get(f"/v1/videos/{job.id}")).json()["variants"] == ["preview"]
    assert_error(await client.get(f"/v1/videos/{job.id}/content"), 409, code="video_not_ready")
    await service.store.fail(job.id, job.attempt, code="internal_error", message="x")
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "fields", [{"model": "wan-tiny-ti2v"}, {"boundary_ratio": 1.0}, {"boundary_ratio": 0.0}]
)
async def test_a_preview_without_a_boundary_is_refused(client, fields):
    answer = await client.post("/v1/videos", json=CAT | {"preview": True} | fields)
    assert_error(answer, 400, param="preview")


def test_the_boundary_of_these_tests_is_the_tiny_models():
    served = resolved().served_models["wan-tiny"]
    assert build_schedule(VideoParams.for_model(served.config, num_steps=20)).boundary_step == 9
