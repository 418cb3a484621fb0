"""The state at the boundary: a branch that begins with it, and the preview that shows it."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from wan_model import engine as engine_module
from wan_model.config import Expert
from wan_model.engine import ExpertEngine, VAEEngine
from wan_model.generate import Placement, Request, denoise, encode
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.state import DenoiseState, draw_noise
from wan_model.weights import open_checkpoint

SOLVERS = ("unipc", "dpm++", "euler")
ONE_PROCESS = Placement()
RED, BLUE = "a red circle", "a blue square"


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("t2v-A14B")


@pytest.fixture(scope="module")
def config(folder):
    return open_checkpoint(str(folder)).config


@pytest.fixture(scope="module")
def vae(folder):
    return VAEEngine(checkpoint=str(folder), device="cpu")


@pytest.fixture(scope="module")
def by_hand(folder, config):
    """by_hand(params, prompt, steps, state=None): single steps of engines that are loaded once."""
    given = {"checkpoint": str(folder), "device": "cpu"}
    experts = {expert: ExpertEngine(**given, expert=expert.value) for expert in Expert}
    text = {
        prompt: encode(request(folder, config, prompt), ONE_PROCESS, config)
        for prompt in (RED, BLUE)
    }

    def run(params, prompt, steps, state=None):
        schedule = build_schedule(params)
        for step_index in steps:
            engine = experts[schedule.expert_at(step_index)]
            given = {"params": dataclasses.asdict(params), "conditioning": text[prompt]}
            engine.open("j", **given, state=state)
            engine.step("j")
            state = engine.export("j")
        return state

    run.experts = experts
    return run


def request(folder, config, prompt=RED, **given) -> Request:
    return Request(checkpoint=str(folder), prompt=prompt, params=numbers(config, **given))


def numbers(config, **given) -> VideoParams:
    given = {"width": 64, "height": 32, "num_frames": 9, "num_steps": 6, "seed": 11} | given
    return VideoParams.for_model(config, **given)


def boundary_of(params: VideoParams) -> int:
    return build_schedule(params).boundary_step


def test_a_branch_equals_a_full_run_with_the_same_high_noise_half(folder, config, by_hand):
    source = request(folder, config, RED)
    branch = request(folder, config, BLUE, guidance_low_noise=2.0)
    boundary = boundary_of(source.params)
    conditioning = {each: encode(each, ONE_PROCESS, config) for each in (source, branch)}
    state = denoise(source, ONE_PROCESS, conditioning[source], to_step=boundary)
    branched = denoise(branch, ONE_PROCESS, conditioning[branch], state=state)["latents"]
    half = by_hand(source.params, RED, range(boundary))
    whole = by_hand(branch.params, BLUE, range(boundary, 6), half)["latents"]
    assert np.array_equal(branched, whole)
    same = denoise(source, ONE_PROCESS, conditioning[source], state=state)["latents"]
    assert np.array_equal(same, by_hand(source.params, RED, range(6))["latents"])
    assert not np.array_equal(branched, same), "the other prompt made no difference"
    from_the_seed = by_hand(branch.params, BLUE, range(6))["latents"]
    assert not np.array_equal(branched, from_the_seed), "the source made no difference"


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_boundary_seed_is_new_noise_for_the_low_noise_expert(folder, config, by_hand, solver):
    """Equal in one process, from the stored state, and when a segment ends after any step."""
    plain = request(folder, config, solver=solver)
    made = request(folder, config, solver=solver, boundary_seed=12)
    conditioning = encode(plain, ONE_PROCESS, config)
    whole = denoise(made, ONE_PROCESS, conditioning)["latents"]
    boundary = boundary_of(plain.params)
    state = denoise(plain, ONE_PROCESS, conditioning, to_step=boundary)
    assert np.array_equal(whole, denoise(made, ONE_PROCESS, conditioning, state=state)["latents"])
    assert np.array_equal(whole, by_hand(made.params, RED, range(6))["latents"])
    assert not np.array_equal(whole, by_hand(plain.params, RED, range(6))["latents"])
    # What the low-noise expert's first step saw: the predicted video under other noise.
    engine = by_hand.experts[Expert.LOW_NOISE]
    given = {"params": dataclasses.asdict(made.params), "conditioning": conditioning}
    engine.open("j", **given, state=state)
    sigma = build_schedule(made.params).sigmas[boundary]
    latents = engine.jobs["j"].state.latents.numpy()
    noise = (latents - (1 - sigma) * state["x0_history.0"]) / sigma
    assert np.allclose(noise, draw_noise(noise.shape, 12).numpy(), atol=1e-5)


def test_a_boundary_seed_does_nothing_where_the_low_noise_expert_begins(folder, config, by_hand):
    params = numbers(config, boundary_ratio=1.0, boundary_seed=12)
    noise = draw_noise(params.latent_shape(config), params.seed)
    state = DenoiseState(latents=noise).to_arrays()
    conditioning = encode(request(folder, config), ONE_PROCESS, config)
    engine = by_hand.experts[Expert.LOW_NOISE]
    engine.open("j", params=vars(params), conditioning=conditioning, state=state)
    assert torch.equal(engine.jobs["j"].state.latents, noise)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_newest_prediction_is_what_the_last_high_noise_step_saw(config, by_hand, solver):
    """x0 = x - sigma v, from the state before that step."""
    params = numbers(config, solver=solver)
    last = boundary_of(params) - 1
    before = by_hand(params, RED, range(last))
    after = by_hand(params, RED, [last], before)
    engine = by_hand.experts[Expert.HIGH_NOISE]
    job = engine.jobs["j"]  # as the step left it
    at_the_step = dataclasses.replace(job, state=DenoiseState.from_arrays(before))
    with torch.inference_mode():
        velocity = engine._predict(at_the_step).numpy()
    x0 = before["latents"] - np.float32(build_schedule(params).sigmas[last]) * velocity
    np.testing.assert_allclose(after["x0_history.0"], x0, atol=1e-5)


def test_a_preview_is_an_animation_of_the_predicted_clean_latents(
    config, by_hand, vae, monkeypatch
):
    made = numbers(config, width=64, height=64)
    state, params = by_hand(made, RED, range(boundary_of(made))), dataclasses.asdict(made)
    clean = vae.decode_frames({"latents": state["x0_history.0"]})
    picture = Image.open(io.BytesIO(vae.preview(params=params, state=state)))
    assert (picture.format, picture.size, picture.is_animated) == ("WEBP", (64, 64), True)
    first = np.asarray(picture.convert("RGB"), float)
    noise = vae.decode_frames({"latents": state["latents"]})
    assert np.abs(first - clean[0]).mean() < 0.5 * np.abs(first - noise[0]).mean()
    monkeypatch.setattr(engine_module, "PREVIEW_PIXELS", 9 * 32 * 32)
    small = Image.open(io.BytesIO(vae.preview(params=params, state=state)))
    assert small.width == small.height and small.width < 40


@pytest.mark.parametrize("shape", [(16, 21, 90, 160), (16, 31, 160, 90), (16, 1, 90, 160)])
def test_what_a_preview_decodes_is_bounded_and_keeps_its_aspect(shape):
    stride = (4, 8, 8)
    shrunk = engine_module._shrink(torch.zeros(shape), stride, 2**23)
    assert shrunk[0].numel() * math.prod(stride) < 1.05 * 2**23
    assert shrunk.shape[:2] == shape[:2]
    assert shrunk.shape[2] / shrunk.shape[3] == pytest.approx(shape[2] / shape[3], rel=0.03)


def test_a_decoded_video_comes_with_its_pictures_and_one_frame_as_png(config, vae):
    for num_frames, cells in ((9, (192, 96)), (1, (64, 32))):
        params = numbers(config, num_frames=num_frames)
        shape = params.latent_shape(config)
        latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        decoded = vae.decode(params=dataclasses.asdict(params), state={"latents": latents})
        assert Image.open(io.BytesIO(decoded["spritesheet"])).size == cells
        assert Image.open(io.BytesIO(decoded["thumbnail"])).size == (64, 32)
        assert ("png" in decoded) == (num_frames == 1)
    frames = vae.decode_frames({"latents": latents})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(decoded["png"]))), frames[0])
