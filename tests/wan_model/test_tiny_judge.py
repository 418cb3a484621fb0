"""The judge is right on ground truth, clean and degraded, and refuses what shows no object."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from wan_model.tiny import data
from wan_model.tiny.data import Scene, clip_rng, render, sample_scene
from wan_model.tiny.judge import ATTRIBUTES, judge, psnr, score
from wan_model.tiny.score import main as score_command

_RED_STAR = Scene(
    shape="star", colour="red", motion="right", background="stripes", x=0.3, y=0.5, radius=0.13
)


def _blurred_and_noisy(frames: np.ndarray, sigma_px: float, noise: float) -> np.ndarray:
    taps = np.arange(-int(3 * sigma_px), int(3 * sigma_px) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma_px**2)).astype(np.float32)
    taps_weights = list(zip(taps, weights / weights.sum(), strict=True))
    blurred = frames.astype(np.float32)
    for axis in (1, 2):
        blurred = sum(weight * np.roll(blurred, tap, axis) for tap, weight in taps_weights)
    rng = np.random.default_rng(0)
    noisy = blurred + noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return noisy.clip(0, 255).round().astype(np.uint8)


def _through_mp4(frames: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "28"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


_DEGRADATIONS = {
    # (what is done to the frames, number of clips, least share right)
    "clean": (lambda frames: frames, 100, 0.99),
    "blur and noise": (lambda frames: _blurred_and_noisy(frames, 1.0, 6.0), 40, 0.97),
    "mp4": (_through_mp4, 40, 0.97),
}


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", _DEGRADATIONS)
def test_the_judge_is_right_on_ground_truth(split, kind):
    degrade, num_clips, least = _DEGRADATIONS[kind]
    scenes = [sample_scene(clip_rng(21, index), split) for index in range(num_clips)]
    shares = score(scenes, [degrade(render(scene)) for scene in scenes])
    assert min(shares[name] for name in ATTRIBUTES) >= least, shares


def test_the_judge_is_right_at_other_sizes_and_lengths():
    scenes = [sample_scene(clip_rng(22, index), "train") for index in range(40)]
    for size in (dict(height=64, width=64, num_frames=5), dict(height=96, width=160)):
        shares = score(scenes, [render(scene, **size) for scene in scenes])
        assert min(shares[name] for name in ATTRIBUTES) >= 0.97, (size, shares)


@pytest.mark.parametrize(
    ("attribute", "changes"),
    [
        ("shape", {"shape": "square"}),
        ("colour", {"colour": "orange"}),
        ("motion", {"motion": "still"}),
        ("motion", {"motion": "rotate"}),
        ("background", {"background": "checker"}),
    ],
)
def test_a_video_of_another_scene_fails_in_just_what_differs(attribute, changes):
    shares = score([_RED_STAR], [render(replace(_RED_STAR, **changes))])
    wrong = {name for name in ATTRIBUTES if shares[name] == 0}
    assert wrong == {attribute}
    assert shares["all"] == (1 if attribute == "background" else 0)


def test_a_video_played_backwards_moves_the_other_way():
    assert judge(render(_RED_STAR)[::-1]).motion == "left"
    assert judge(render(replace(_RED_STAR, motion="grow", radius=0.09))[::-1]).motion == "shrink"


def test_a_small_second_object_does_not_confuse_the_judge():
    second = data.SecondObject(shape="circle", colour="blue", corner="top left", radius=0.055)
    scene = replace(_RED_STAR, y=0.6, second=second)
    assert score([scene], [render(scene)])["all"] == 1


def test_noise_and_empty_backgrounds_show_nothing():
    rng = np.random.default_rng(1)
    shape = (17, 128, 128, 3)
    coarse = np.kron(rng.normal(128, 60, (17, 8, 8, 3)), np.ones((1, 16, 16, 1)))
    outside = dict(x=-1.0, motion="still")
    videos = [
        rng.integers(0, 256, shape, dtype=np.uint8),
        rng.normal(128, 20, shape).clip(0, 255).astype(np.uint8),
        coarse.clip(0, 255).astype(np.uint8),
        np.zeros(shape, np.uint8),
        *(render(replace(_RED_STAR, background=b, **outside)) for b in data.BACKGROUNDS),
    ]
    for video in videos:
        verdict = judge(video)
        assert (verdict.shape, verdict.colour, verdict.motion) == (None, None, None)


def test_an_object_that_vanishes_halfway_does_not_count():
    video = render(_RED_STAR)
    video[9:] = render(replace(_RED_STAR, x=-1.0))[9:]
    assert judge(video).motion is None


def test_an_object_that_changes_colour_has_no_colour():
    video = render(_RED_STAR)
    video[9:] = render(replace(_RED_STAR, colour="blue"))[9:]
    assert judge(video).colour is None


def test_half_a_motion_or_two_at_once_is_no_motion():
    video = render(_RED_STAR)
    at_40_percent = np.round(0.4 * np.arange(17)).astype(int)
    assert judge(video[at_40_percent]).motion is None
    growing = render(replace(_RED_STAR, motion="grow", radius=0.09, x=0.5))
    shifts = np.round(np.linspace(-20, 20, 17)).astype(int)
    both = np.stack([np.roll(f, s, axis=0) for f, s in zip(growing, shifts, strict=True)])
    assert judge(both).motion is None


def test_an_ellipse_or_a_melted_triangle_has_no_name():
    y, x = np.mgrid[:128, :128] - 63.5
    video = np.full((17, 128, 128, 3), 30, np.uint8)
    video[:, (x / 26) ** 2 + (y / 13) ** 2 < 1] = data.COLOURS["green"]
    assert judge(video).shape is None
    # Radius 18 with a third harmonic of 0.1, a third of a triangle's.
    angle = np.arctan2(y, x)
    video[:] = 30
    video[:, np.hypot(x, y) < 18 * (1 + 0.1 * np.cos(3 * angle))] = data.COLOURS["green"]
    assert judge(video).shape is None


def test_psnr_follows_its_definition_in_decibel():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(a, a) == np.inf
    assert psnr(a, a + np.uint8(51)) == pytest.approx(20 * np.log10(5))


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"uint8 \[F,H,W,3\]"):
        judge(np.zeros((17, 128, 128, 3), np.float32))
    with pytest.raises(ValueError, match="one video a scene"):
        score([_RED_STAR], [])
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(np.zeros((2, 2)), np.zeros((3, 2)))


def test_the_packaged_models_are_scored_by_one_command(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert score_command(["--clips", "1", "--steps", "6", "--sheet", str(sheet)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| wan-tiny", "| wan-tiny-i2v", "| wan-tiny-ti2v, image", "| wan-tiny-ti2v",
    ]  # fmt: skip
    assert all(row.split(" | ")[2] == "100.0 %" for row in rows), "six steps show the colour"
    assert Image.open(sheet).height > 4 * 128 / 2
