"""The wire forms, without HTTP: requests to VideoParams, jobs to answers, predictions."""

import dataclasses

import pytest
from http_service import PROFILE, resolved

from serve_app.create_video import (
    check_images,
    nest_form_fields,
    parse_create,
    request_hash,
    video_params,
)
from serve_app.errors import InvalidRequest
from serve_app.jobs import Job
from serve_app.openai_api import poll_after_ms, seconds_left, video
from serve_app.served_model import StageProfile, predict_s
from wan_model.config import I2V_A14B, T2V_A14B, WAN_TINY, WAN_TINY_I2V, WAN_TINY_TI2V
from wan_model.params import VideoParams

MODELS = resolved().served_models
TINY = MODELS["wan-tiny"]


def params(model=TINY, image_size=None, **fields) -> VideoParams:
    request = parse_create({"prompt": "a cat", **fields})
    return video_params(request, model, seed=7, image_size=image_size)


def refusal(model=TINY, **fields) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        params(model, **fields)
    return caught.value


def job(**given) -> Job:
    made = {
        "id": "video_" + "0" * 24, "model": "wan-tiny", "prompt": "a cat",
        "params": dataclasses.asdict(params()), "num_steps": 20, "predicted_s": 100.0,
        "status": "queued", "stage": None, "step": 0, "progress": 0, "attempt": 0, "failures": 0,
        "total_failures": 0,
        "worker": None, "lease_until": None, "cancel_requested": False, "checkpoint": None,
        "checkpoint_step": 0, "artifacts": {}, "error_code": None, "error_message": None,
        "created_at": 1000.9, "started_at": None, "completed_at": None, "expires_at": None,
            "revised_prompt": None, "prompt_note": None, "boundary_state": None,
    }  # fmt: skip
    return Job(**made | given)


def answer(**given):
    return video(job(**given), queue_position=None, seconds_left=None)


def test_an_empty_request_takes_every_number_from_the_model():
    assert params() == VideoParams.for_model(WAN_TINY, seed=7)


def test_every_wire_name_reaches_its_own_number():
    got = params(
        size="64x128", num_frames=9, fps=4, num_inference_steps=3, guidance_scale=2.5,
        guidance_scale_2=1.5, seed=11, flow_shift=6.0, boundary_ratio=0.5, solver="euler",
        cache=0.05,
    )  # fmt: skip
    assert got == VideoParams(
        width=64, height=128, num_frames=9, fps=4, num_steps=3, guidance_high_noise=2.5,
        guidance_low_noise=1.5, seed=11, shift=6.0, boundary_ratio=0.5, solver="euler",
        cache=0.05,
    )  # fmt: skip


def test_a_cache_of_0_computes_every_step_though_the_model_reuses():
    model = dataclasses.replace(TINY, default_cache=0.05)
    assert [params(model, **given).cache for given in ({}, {"cache": 0})] == [0.05, None]
    assert [answer(params=dataclasses.asdict(params(model, **given))).cache
            for given in ({}, {"cache": "0"})] == [0.05, 0]  # fmt: skip


def test_numbers_may_arrive_as_strings():
    as_numbers = params(num_frames=9, guidance_scale=2.5, seed=3)
    assert params(num_frames="9", guidance_scale="2.5", seed="3") == as_numbers


def test_guidance_scale_alone_sets_both_experts():
    got = params(guidance_scale=6.0)
    assert (got.guidance_high_noise, got.guidance_low_noise) == (6.0, 6.0)


def test_guidance_scale_2_alone_leaves_the_high_noise_expert_its_default():
    got = params(guidance_scale_2=6.0)
    assert (got.guidance_high_noise, got.guidance_low_noise) == (4.0, 6.0)


@pytest.mark.parametrize(
    ("seconds", "fps", "num_frames"),
    [("2", 8, 17), (4, 8, 33), (1.5, 8, 13), ("0.01", 8, 1), (1, 12, 13), (1.2, 12, 13), (1, 6, 5)],
)
def test_seconds_become_the_nearest_legal_number_of_frames(seconds, fps, num_frames):
    assert params(seconds=seconds, fps=fps).num_frames == num_frames


@pytest.mark.parametrize("seconds", ["5", 5, 5.0])
def test_five_seconds_are_the_makers_eighty_one_frames(seconds):
    model = dataclasses.replace(TINY, config=T2V_A14B, max_area=2**20, max_num_frames=161)
    assert params(model, seconds=seconds).num_frames == 81


def test_seconds_are_answered_as_they_were_asked():
    for asked in ("1", "2", "4"):
        got = answer(params=dataclasses.asdict(params(seconds=asked)))
        assert got.seconds == asked


def test_seconds_and_frames_may_agree():
    assert params(seconds=2, num_frames=17).num_frames == 17


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("seconds", {"seconds": 2, "num_frames": 13}),
        ("seconds", {"seconds": 60}),
        ("seconds", {"seconds": 0}),
        ("seconds", {"seconds": "a while"}),
        ("seconds", {"seconds": float("nan")}),
        ("size", {"size": "100x128"}),
        ("size", {"size": "large"}),
        ("size", {"size": "1280x720"}),
        ("size", {"size": "0x128"}),
        ("num_frames", {"num_frames": 16}),
        ("num_frames", {"num_frames": 2**70}),
        ("num_frames", {"num_frames": True}),
        ("num_frames", {"num_frames": 8.5}),
        ("num_frames", {"num_frames": 41}),
        ("fps", {"fps": 1000}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("num_inference_steps", {"num_inference_steps": 101}),
        ("guidance_scale", {"guidance_scale": 1e9}),
        ("guidance_scale_2", {"guidance_scale_2": 101}),
        ("flow_shift", {"flow_shift": 1e-9}),
        ("boundary_ratio", {"boundary_ratio": 1.5}),
        ("solver", {"solver": "magic"}),
        ("cache", {"cache": 1.5}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
        ("priority", {"priority": 101}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "nul \0"}),
        ("negative_prompt", {"negative_prompt": "half \ud800"}),
        ("user", {"user": "u" * 257}),
        ("frames", {"frames": 17}),
        ("input_reference.file_id", {"input_reference": {"image_url": "x", "file_id": "f"}}),
        ("input_reference.image_url", {"input_reference": {}}),
        ("input_reference", {"input_reference": "{not json"}),
        ("input_reference", {"input_reference": 3}),
    ],
)
def test_a_refusal_names_the_wires_field(param, fields):
    assert refusal(**fields).param == param


def test_a_refusal_speaks_of_no_inner_name():
    error = refusal(MODELS["wan-tiny-ti2v"], guidance_scale=3, guidance_scale_2=4)
    assert error.param == "guidance_scale_2"
    assert "noise" not in error.message
    assert "num_inference_steps must be at most 100" in refusal(num_inference_steps=500).message


def test_an_unknown_field_is_called_unknown():
    assert refusal(frames=17).code == "unknown_field"


def test_a_missing_prompt_is_called_missing():
    with pytest.raises(InvalidRequest) as caught:
        parse_create({})
    assert (caught.value.param, caught.value.code) == ("prompt", "missing_field")


def test_null_means_absent():
    nulls = dict.fromkeys(("user", "seconds", "size", "seed", "input_reference", "priority"))
    assert params(**nulls) == params()


def test_with_an_image_the_size_is_an_area():
    got = params(MODELS["wan-tiny-i2v"], image_size=(1000, 250), size="128x128")
    assert (got.width, got.height) == (256, 64)


def test_a_form_nests_bracketed_keys_and_drops_empty_values():
    got = nest_form_fields([("a", "1"), ("b[c]", "2"), ("b[d]", "3"), ("e", "")])
    assert got == {"a": "1", "b": {"c": "2", "d": "3"}}


@pytest.mark.parametrize("twice", [["a", "a"], ["a[b]", "a[b]"], ["a", "a[b]"], ["a[b]", "a"]])
def test_a_form_field_given_twice_is_refused(twice):
    with pytest.raises(InvalidRequest, match="a is given twice"):
        nest_form_fields([(name, "1") for name in twice])


@pytest.mark.parametrize(
    ("config", "given", "num_frames", "param"),
    [
        (WAN_TINY_I2V, set(), 17, "input_reference"),
        (WAN_TINY_I2V, {"last_image"}, 17, "input_reference"),
        (WAN_TINY_I2V, {"input_reference", "last_image"}, 1, "last_image"),
        (WAN_TINY_TI2V, {"input_reference", "last_image"}, 17, "last_image"),
        (WAN_TINY_TI2V, {"last_image"}, 17, "last_image"),
        (WAN_TINY_TI2V, {"input_reference"}, 1, "input_reference"),
        (WAN_TINY, {"input_reference"}, 17, "input_reference"),
    ],
)
def test_images_a_model_cannot_use_are_refused(config, given, num_frames, param):
    with pytest.raises(InvalidRequest) as caught:
        check_images(config, given, num_frames)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("config", "given", "num_frames"),
    [
        (WAN_TINY, set(), 17),
        (WAN_TINY_TI2V, set(), 17),
        (WAN_TINY_TI2V, set(), 1),
        (WAN_TINY_TI2V, {"input_reference"}, 17),
        (WAN_TINY_I2V, {"input_reference"}, 17),
        (WAN_TINY_I2V, {"input_reference"}, 1),
        (WAN_TINY_I2V, {"input_reference", "last_image"}, 17),
    ],
)
def test_images_a_model_can_use_are_taken(config, given, num_frames):
    check_images(config, given, num_frames)


def test_the_request_hash_sees_every_field_and_the_images_bytes_alone():
    plain = parse_create({"prompt": "a cat"})
    by_reference = parse_create({"prompt": "a cat", "input_reference": {"image_url": "data:,x"}})
    images = {"input_reference": b"pixels"}
    assert request_hash(plain, images) == request_hash(by_reference, images)
    others = [
        request_hash(plain, {}),
        request_hash(plain, images),
        request_hash(plain, {"last_image": b"pixels"}),
        request_hash(plain, {"input_reference": b"other"}),
        request_hash(parse_create({"prompt": "a dog"}), {}),
        request_hash(parse_create({"prompt": "a cat", "seed": 1}), {}),
    ]
    assert len(set(others)) == len(others)


def test_strings_and_numbers_hash_alike():
    one, other = ({"prompt": "a cat", "seed": seed, "seconds": seed} for seed in (2, "2"))
    assert request_hash(parse_create(one), {}) == request_hash(parse_create(other), {})


def test_a_queued_video_is_answered_whole():
    got = answer().model_dump()
    expected = {
        "object": "video", "created_at": 1000, "status": "queued", "size": "128x128",
        "seconds": "2", "error": None, "remixed_from_video_id": None, "seed": 7, "num_frames": 17,
        "fps": 8, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "flow_shift": 5.0,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == expected


def test_a_cancelled_job_is_failed_with_the_code_cancelled():
    got = answer(status="cancelled", completed_at=1001.0)
    assert (got.status, got.error.code) == ("failed", "cancelled")


def test_a_failure_does_not_show_the_servers_paths():
    message = "cannot read '/srv/data/artifacts/video_1/x.mp4': gone (2/3 parts, see http://h/doc)"
    got = answer(status="failed", error_code="oops", error_message=message)
    assert got.error.message == "cannot read '(path)': gone (2/3 parts, see http://h/doc)"


def test_time_left_is_the_prediction_at_first_and_the_pace_at_last():
    start = {"status": "in_progress", "started_at": 0.0}
    left_s = [
        seconds_left(job(**start, progress=progress), now=now, queued_before_s=None)
        for progress, now in ((0, 5.0), (50, 200.0), (99, 594.0))
    ]
    # At half time: predicted 50 s, pace 200 s, the mean of both. At 99 %: nearly 6 s of pace.
    assert left_s == [100.0, 125.0, 6.0]


def test_time_left_of_a_queued_job_holds_the_queue():
    assert seconds_left(job(), now=0.0, queued_before_s=40.0) == 140.0


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_finished_job_has_no_time_left(status):
    assert seconds_left(job(status=status), now=0.0, queued_before_s=None) is None


def test_without_a_profile_nothing_is_known_before_the_first_progress():
    unknown = {"status": "in_progress", "started_at": 0.0, "predicted_s": 0.0}
    assert seconds_left(job(**unknown), now=10.0, queued_before_s=None) is None
    got = seconds_left(job(**unknown, progress=20), now=10.0, queued_before_s=None)
    assert got == pytest.approx(40.0)


@pytest.mark.parametrize(("left_s", "ms"), [(None, 1000), (0.5, 500), (20, 2000), (9000, 5000)])
def test_the_poll_interval_has_bounds(left_s, ms):
    assert poll_after_ms(left_s) == ms


def profile(**given) -> StageProfile:
    made = PROFILE | {"text_encode_s": 0.0, "image_encode_s": 0.0, "step_low_noise_s": 0.5}
    return StageProfile(**made | given)


def predicted_s(config, given_profile, *, has_image=False, **fields) -> float:
    return predict_s(
        given_profile, config, VideoParams.for_model(config, **fields), has_image=has_image
    )


def test_at_the_profiles_own_size_the_prediction_is_the_sum_of_the_stages():
    stages = profile(text_encode_s=3.0, image_encode_s=100.0)
    assert predicted_s(WAN_TINY, stages, num_steps=4) == pytest.approx(3.0 + 4 * 0.5 + 1.0)
    assert predicted_s(WAN_TINY, stages, num_steps=4, has_image=True) == pytest.approx(106.0)


def test_each_expert_is_predicted_with_its_own_step():
    stages = profile(step_high_noise_s=10.0, step_low_noise_s=1.0, decode_s=0.0)
    # shift 5, boundary 0.875, 4 steps: sigmas 1, 0.94, 0.83, 0.62 -> two steps of each expert.
    assert predicted_s(WAN_TINY, stages, num_steps=4) == pytest.approx(22.0)


def test_a_larger_video_is_predicted_by_its_work():
    # Work counted for one A14B pass: 1.68 PFLOP at 480p, 6.52 at 720p.
    stages = profile(num_tokens=32_760, decode_s=0.0)
    small = predicted_s(I2V_A14B, stages, width=832, height=480)
    large = predicted_s(I2V_A14B, stages, width=1280, height=720)
    assert large / small == pytest.approx(6.52 / 1.68, rel=0.02)


def test_a_row_of_another_version_is_shown_as_far_as_it_is_understood():
    numbers = dataclasses.asdict(params())
    del numbers["shift"]
    timing = {
        "stage": "VAE", "replica": "r", "started_at": 1.0, "ended_at": 2.0, "busy_s": 1.0,
        "from_step": 0, "to_step": 0,
    }  # fmt: skip
    got = answer(
        params=numbers | {"new_field": [1]},
        artifacts={"video": "k", "timings": [timing | {"new": 1}, {"stage": "VAE"}]},
        status="completed",
    )
    assert (got.flow_shift, got.seed, got.num_frames) == (None, 7, 17)
    assert (got.seconds, got.size) == ("2", "128x128")
    assert len(got.timings) == 1, "the one that lacks fields is left out"
    stranger = answer(params={"frames": 5})
    assert (stranger.seconds, stranger.size, stranger.seed) == ("?", "?x?", None)


def test_the_files_that_can_be_downloaded_are_named():
    assert answer().variants == []
    assert answer(status="in_progress", artifacts={"preview": "k"}).variants == ["preview"]
    made = {"thumbnail": "k", "video": "k", "image": "k", "timings": [], "num_frames": 17}
    assert answer(status="completed", artifacts=made).variants == ["video", "thumbnail"]
