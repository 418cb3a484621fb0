"""The synthetic world: deterministic, split without leaks, rendered and described as sampled."""

import hashlib
import subprocess
import sys
from itertools import combinations as pairs_of

import numpy as np
import pytest

from wan_model.tiny import data
from wan_model.tiny.data import Scene, SecondObject, caption, clip_rng, render, sample_clip

_GOLDEN_CAPTION = "a turquoise triangle becomes smaller on a bright wall"
_GOLDEN_SHA256 = "b741a59b87ae1e9367230aa9294aca801214da957336378e5265ea2b4e10dcb6"


def _scenes(count: int, *, split: str = "train", seed: int = 3) -> list[Scene]:
    return [data.sample_scene(clip_rng(seed, index), split) for index in range(count)]


def _still(**changes) -> Scene:
    given = dict(shape="circle", colour="red", motion="still", background="dark")
    return Scene(**(given | dict(x=0.5, y=0.5, radius=0.125) | changes))


def test_a_clip_is_the_same_bytes_everywhere():
    clip = sample_clip(0, 0)
    assert clip.caption == _GOLDEN_CAPTION
    assert hashlib.sha256(clip.frames.tobytes()).hexdigest() == _GOLDEN_SHA256


def test_another_process_draws_the_same_clip():
    code = (
        "import hashlib; from wan_model.tiny.data import sample_clip; clip = sample_clip(5, 7);"
        "print(clip.caption, hashlib.sha256(clip.frames.tobytes()).hexdigest())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    clip = sample_clip(5, 7)
    digest = hashlib.sha256(clip.frames.tobytes()).hexdigest()
    assert said.stdout.strip() == f"{clip.caption} {digest}"


def test_neighbouring_clips_and_seeds_differ():
    clips = [sample_clip(seed, index) for seed in range(3) for index in range(5)]
    assert len({clip.frames.tobytes() for clip in clips}) == len(clips)


def test_the_splits_share_no_combination_and_sampling_keeps_to_them():
    train, held_out = (set(data.combinations(split)) for split in ("train", "held_out"))
    assert not train & held_out
    assert 0.13 < len(held_out) / len(train | held_out) < 0.17
    for split, allowed in (("train", train), ("held_out", held_out)):
        drawn = {(s.shape, s.colour, s.motion) for s in _scenes(3000, split=split)}
        assert drawn == allowed


def test_training_sees_every_pair_of_attributes_of_a_held_out_combination():
    train = data.combinations("train")
    for names in data.combinations("held_out"):
        for first, second in pairs_of(range(3), 2):
            seen = [t for t in train if (t[first], t[second]) == (names[first], names[second])]
            assert len(seen) >= 2, names


def test_no_circle_rotates_because_nobody_could_see_it():
    for split in ("train", "held_out"):
        assert ("circle", "rotate") not in {names[::2] for names in data.combinations(split)}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held_out"):
        data.combinations("test")


def test_second_objects_and_pans_are_as_rare_as_planned_and_never_together():
    scenes = _scenes(4000)
    assert 0.12 < np.mean([s.second is not None for s in scenes]) < 0.18
    assert 0.08 < np.mean([s.pan is not None for s in scenes]) < 0.12
    assert not any(s.second and s.pan for s in scenes)
    assert all(s.second.colour != s.colour for s in scenes if s.second)


@pytest.mark.parametrize("motion", data.MOTIONS)
def test_no_object_touches_the_edge_of_the_frame(motion):
    for scene in [s for s in _scenes(400) if s.motion == motion and s.background == "dark"]:
        frames = render(scene).astype(int)
        border = np.concatenate(
            [frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)]
        )
        assert (border == border[0]).all(), scene


@pytest.mark.parametrize("shape", data.SHAPES)
def test_every_shape_covers_the_area_of_a_circle_of_its_radius(shape):
    frames = render(_still(shape=shape, radius=0.15), num_frames=1).astype(float)
    background, red = frames[0, 0, 0, 0], data.COLOURS["red"][0]
    area = ((frames[0, :, :, 0] - background) / (red - background)).sum()
    assert area == pytest.approx(np.pi * (0.15 * 128) ** 2, rel=0.01)


def test_a_still_scene_without_pan_has_equal_frames_and_a_pan_does_not():
    still = render(_still(background="stripes"))
    assert (still == still[0]).all()
    panned = render(_still(background="stripes", pan="left"))
    assert (panned[1:] != panned[:-1]).any(axis=(1, 2, 3)).all()


def test_a_camera_that_pans_right_moves_the_background_left():
    row_FW = render(_still(background="stripes", pan="right", y=0.8))[:, 0, :, 0].astype(int)
    step = round(data.PAN_TRAVEL * 128 * 5 / 16)  # 8 pixels after 5 of 16 intervals
    assert abs(row_FW[5, :-step] - row_FW[0, step:]).max() <= 1


def test_scenes_render_at_any_size_and_partly_outside():
    frames = render(_still(x=0.02, y=0.99), num_frames=5, height=48, width=80)
    assert frames.shape == (5, 48, 80, 3) and frames.dtype == np.uint8
    assert (frames[0, -1, 0] == data.COLOURS["red"]).all()


def test_a_caption_names_what_the_scene_shows():
    for index in range(500):
        rng = clip_rng(11, index)
        scene = data.sample_scene(rng)
        text = caption(scene, rng)
        words = data.split_words(text)
        assert any(word in words for word in data.SHAPE_WORDS[scene.shape])
        assert any(word in words for word in data.COLOUR_WORDS[scene.colour])
        assert any(form in text for pair in data.MOTION_PHRASES[scene.motion] for form in pair)
        assert ("camera" in words) == (scene.pan is not None)
        assert ("corner" in words) == (scene.second is not None)
        assert set(words) <= set(data.VOCABULARY)


def test_captions_of_one_scene_vary_and_now_and_then_leave_the_background_open():
    scene = _still(shape="star", motion="left", background="checker")
    said = [caption(scene, clip_rng(2, index)) for index in range(600)]
    phrases = data.BACKGROUND_PHRASES["checker"]
    open_ones = [text for text in said if not any(phrase in text for phrase in phrases)]
    assert len(set(said)) > 50
    assert 0.04 < len(open_ones) / len(said) < 0.13


def test_without_a_generator_the_caption_is_the_plain_one():
    second = SecondObject(shape="star", colour="orange", corner="top left", radius=0.05)
    scene = _still(motion="grow", second=second)
    assert caption(scene) == (
        "a red circle grows on a dark background with a small orange star in the top left corner"
    )


def test_every_word_of_the_vocabulary_is_used():
    said = {
        word
        for index in range(6000)
        for rng in [clip_rng(1, index)]
        for word in data.split_words(caption(data.sample_scene(rng), rng))
    }
    assert said == set(data.VOCABULARY)
