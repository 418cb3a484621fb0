"""The numbers of a request: defaults, limits, and the official size rules for images."""

import math

import pytest

from wan_model.config import I2V_A14B, ROWS, T2V_A14B, TI2V_5B, WAN21_T2V_14B, row_for
from wan_model.params import VideoParams, size_for_image


def test_defaults_come_from_the_models_row():
    params = VideoParams.for_model(T2V_A14B)
    assert (params.num_steps, params.shift, params.boundary_ratio) == (40, 12.0, 0.875)
    assert (params.guidance_high_noise, params.guidance_low_noise) == (4.0, 3.0)
    i2v = VideoParams.for_model(I2V_A14B)
    assert (i2v.shift, i2v.boundary_ratio, i2v.guidance_low_noise) == (5.0, 0.9, 3.5)
    ti2v = VideoParams.for_model(TI2V_5B)
    assert (ti2v.num_steps, ti2v.fps, ti2v.num_frames) == (50, 24, 121)


def test_token_counts_of_the_standard_sizes():
    small = VideoParams.for_model(T2V_A14B, width=832, height=480)
    assert small.num_tokens(T2V_A14B) == 32_760
    assert VideoParams.for_model(T2V_A14B).num_tokens(T2V_A14B) == 75_600
    assert VideoParams.for_model(TI2V_5B).num_tokens(TI2V_5B) == 27_280


def test_guidance_sets_both_experts_and_a_single_one_wins_over_it():
    params = VideoParams.for_model(T2V_A14B, guidance=6.0, guidance_low_noise=2.0)
    assert (params.guidance_high_noise, params.guidance_low_noise) == (6.0, 2.0)


def test_on_one_expert_the_guidance_names_are_one_number():
    params = VideoParams.for_model(TI2V_5B, guidance_low_noise=7.0)
    assert params.guidance_high_noise == 7.0
    with pytest.raises(ValueError, match="one expert"):
        VideoParams.for_model(TI2V_5B, guidance_low_noise=7.0, guidance_high_noise=6.0)
    with pytest.raises(ValueError, match="boundary_ratio has no effect"):
        VideoParams.for_model(WAN21_T2V_14B, boundary_ratio=0.9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_frames": 82}, "num_frames 82 is not 4n[+]1: try 81 or 85"),
        ({"width": 833}, "width 833 is not a multiple of 16: try 832 or 848"),
        ({"height": 8}, "height 8 is not a multiple of 16: try 16"),
        ({"num_steps": 0}, "num_steps must be between 1 and 1000, not 0"),
        ({"num_steps": 2.0}, "num_steps must be a whole number"),
        ({"guidance_high_noise": math.nan}, "guidance_high_noise must be a finite number"),
        ({"shift": math.inf}, "shift must be a finite number"),
        ({"seed": -1}, "seed must be between"),
        ({"seed": True}, "seed must be a whole number"),
        ({"solver": "heun"}, "solver must be one of unipc, dpm[+][+], euler, not 'heun'"),
        ({"boundary_ratio": 1.5}, "boundary_ratio must be between 0 and 1"),
        ({"cache": 1.5}, "cache must be between 0 and 1"),
        ({"cache": 0.0}, "cache must be more than 0"),
    ],
)
def test_a_wrong_number_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        VideoParams.for_model(T2V_A14B, **given)


@pytest.mark.parametrize(
    ("image", "i2v_720p", "i2v_480p", "ti2v_704p"),
    [
        ((1920, 1080), (1280, 720), (832, 464), (1248, 704)),
        ((1080, 1920), (720, 1280), (464, 832), (704, 1248)),
        ((1024, 1024), (960, 960), (624, 624), (960, 928)),
        ((832, 480), (1248, 720), (832, 464), (1248, 704)),
        ((4000, 3000), (1104, 816), (720, 544), (1088, 800)),
        ((1080, 1350), (848, 1072), (560, 704), (832, 1056)),
    ],
)
def test_an_image_decides_the_shape_as_in_the_reference(image, i2v_720p, i2v_480p, ti2v_704p):
    assert size_for_image(I2V_A14B, area=1280 * 720, image_size=image) == i2v_720p
    assert size_for_image(I2V_A14B, area=832 * 480, image_size=image) == i2v_480p
    assert size_for_image(TI2V_5B, area=1280 * 704, image_size=image) == ti2v_704p


def test_an_image_too_narrow_for_one_token_is_refused():
    with pytest.raises(ValueError, match="aspect 1:4000"):
        size_for_image(I2V_A14B, area=832 * 480, image_size=(1, 4000))


def test_every_row_has_legal_defaults_of_its_own():
    for row in ROWS.values():
        VideoParams.for_model(row)


def test_a_checkpoint_finds_its_row_by_task_and_experts():
    assert row_for(task="t2v", num_experts=2, dim=96) is T2V_A14B
    assert row_for(task="t2v", num_experts=1, dim=5120) is WAN21_T2V_14B
    with pytest.raises(ValueError, match="no Wan model"):
        row_for(task="i2v", num_experts=3, dim=96)
